"""Policies compared over HTTP: the balancer in front of fake nodes, beside the simulator on the same trace."""
