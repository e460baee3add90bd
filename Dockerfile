# Two images from one file:
#   docker build --target balancer   -t gpu-balancer:0.1.0 .
#   docker build --target node-agent -t gpu-node-agent:0.1.0 .
#
# For a build that can be repeated, name the base by its digest, --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:…,
# and pin what is installed in a constraints.txt beside this file (`pip freeze --exclude gpu-balancer` where the tests
# passed). Without that file the newest releases that pyproject.toml allows are taken.
# No HEALTHCHECK: Kubernetes' probes ask /healthz and /readyz, and other runtimes can ask the same.

ARG PYTHON_IMAGE=python:3.11-slim

# The project as a wheel, and an empty environment to install it into.
FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# A pattern may match nothing, so LICENSE* and constraints*.txt are optional.
COPY pyproject.toml README.md LICENSE* constraints*.txt ./
COPY balancer balancer
COPY node_agent node_agent
COPY loadtest loadtest
RUN touch constraints.txt \
 && pip wheel --no-deps --wheel-dir /wheels . \
 && python -m venv --without-pip /opt/venv

# Dependencies come as wheels only: nothing is compiled, so no compiler is needed.
FROM build AS build-balancer
RUN pip --python /opt/venv/bin/python install --only-binary=:all: --constraint constraints.txt \
        "$(echo /wheels/gpu_balancer-*.whl)[balancer,semantic]"

FROM build AS build-node-agent
RUN pip --python /opt/venv/bin/python install --only-binary=:all: --constraint constraints.txt \
        "$(echo /wheels/gpu_balancer-*.whl)[agent]"

# What both images stand on: Python without its installers, and a user that owns nothing.
FROM ${PYTHON_IMAGE} AS runtime
RUN pip uninstall --yes --root-user-action=ignore setuptools wheel pip \
 && groupadd --system --gid 10001 balancer \
 && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin balancer
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001

FROM runtime AS node-agent
LABEL org.opencontainers.image.title="gpu-node-agent" \
      org.opencontainers.image.description="Reports the health of the GPUs and inference servers on its host" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-node-agent /opt/venv /opt/venv
# The NVIDIA container runtime then mounts NVML of all GPUs, and nothing to compute with.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=utility
EXPOSE 9477
ENTRYPOINT ["gpu-node-agent"]
# Give it at least one --engine, and --listen 0.0.0.0:9477: its default is loopback, here the container's own.
CMD ["serve"]

# Last, so that it is what a build without --target makes.
FROM runtime AS balancer
LABEL org.opencontainers.image.title="gpu-balancer" \
      org.opencontainers.image.description="A health-aware load balancer for LLM inference" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-balancer /opt/venv /opt/venv
EXPOSE 8080 8081
ENTRYPOINT ["gpu-balancer"]
# As arguments and not as BALANCER_LISTEN, which would win over a settings file.
CMD ["serve", "--listen", "0.0.0.0:8080", "--ops-listen", "0.0.0.0:8081"]
