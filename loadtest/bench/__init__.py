"""`python -m loadtest.bench`: what the balancer costs beside nginx, on this machine, in one run.

nginx and the balancer stand in turn in front of the same fast backend (`backend.c`) under the same load (`load.c`). The
proxy has one core to itself, load and backend share another. Every figure is the median of several rounds; what the
proxy used is read from its CPU clock at the very start and end of each measured window, by the load generator itself.

Reading order: `rows.py` (what is measured and what must hold), `measure.py` (one measurement), `proxies.py` (how nginx
and the balancer are set up), `disturbance.py` (when a figure says less than it seems to), `report.py` (medians, ratios,
verdicts); below them `processes.py`, `redis_server.py` and `programs.py`, which compiles the C parts.
"""
