# The server in a container, for CPUs:
#
#   docker build -t supervit-serve .
#   docker run --read-only --tmpfs /tmp -v profiles:/var/cache/supervit -p 127.0.0.1:8000:8000 supervit-serve
#
# For NVIDIA GPUs, several gigabytes larger; the host needs the driver and NVIDIA's container toolkit:
#
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t supervit-serve:cuda .
#   docker run --gpus all ... supervit-serve:cuda
#
# What we need changes seldom and weighs a lot, our own code changes often and weighs little. So they are layers apart,
# and a change of code rebuilds, pushes and pulls a few megabytes.

FROM python:3.11-slim-bookworm AS base
# The base image's pip fills the environment, which needs none of its own.
RUN python -m venv --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Apart, so that another change of pyproject.toml than one of the dependencies installs nothing anew.
FROM base AS requirements
COPY pyproject.toml .
RUN python -c "import tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    print(*project['dependencies'], *extras['grpc'], *extras['otel'], sep='\n')" > requirements.txt

FROM base AS dependencies
# Where PyTorch's builds for one kind of machine are. Their versions, such as 2.9.0+cpu, win over 2.9.0 of PyPI. Where
# the index cannot be reached, pip warns and takes PyPI's, with CUDA inside: it serves too, but takes gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Left out is what only those need who compile against PyTorch: its headers, and its own tests.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --no-compile --extra-index-url "$TORCH_INDEX" torch torchvision \
    && cd /opt/venv/lib/python3.11/site-packages/torch && rm -rf include test
COPY --from=requirements /requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --no-compile -r requirements.txt

# A folder laid out like the environment, with nothing in it but us.
FROM base AS application
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY models models
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --no-compile --no-deps --prefix /application .

FROM base
RUN apt-get update && apt-get install --yes --no-install-recommends tini \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
# Group 0 may write too: some platforms run containers as a user of their own choice in that group.
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin supervit \
    && install --directory --owner=10001 --group=0 --mode=0775 /var/cache/supervit
COPY --from=dependencies /opt/venv /opt/venv
# Bytecode, which the server's user may not write later, but only of what is imported: that of everything takes 170 MB.
# The base image comes without the bytecode of Python's own library.
# OpenVINO's telemetry is kept from reporting the import, as the server keeps it.
RUN python -c "import sys; sys.modules['openvino_telemetry'] = None; import fastapi, grpc.aio, openvino, timm, uvicorn; \
    import opentelemetry.exporter.otlp.proto.http.trace_exporter"
COPY --from=application /application /opt/venv
# The rest of it. And where an import fails, there is no image.
RUN python -c "import service.hosting.serve, service.engines.torch_engine" && supervit serve --help > /dev/null

# HOME is where libraries look for caches of theirs; a user of the platform's choice would have none.
ENV HOME=/tmp \
    SUPERVIT_HOST=0.0.0.0 \
    SUPERVIT_PROFILE_FOLDER=/var/cache/supervit
USER 10001:10001
EXPOSE 8000
# A start takes seconds, and minutes where others keep the CPUs busy. There is no curl in the image.
HEALTHCHECK --interval=15s --timeout=5s --start-period=3m --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; \
        server = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('SUPERVIT_PORT', 8000)), timeout=4); \
        server.request('GET', '/health/ready'); \
        sys.exit(server.getresponse().status != 200)"]
# SIGTERM reaches the server, which answers those that it has admitted and then ends of the signal: 143, as good as 0.
# The kernel would keep it from a process 1 that has no handler yet, and Python has none during seconds of imports.
ENTRYPOINT ["tini", "-e", "143", "--", "supervit"]
CMD ["serve"]
