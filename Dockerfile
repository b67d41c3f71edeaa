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
# The dependencies are large and change seldom; the project's code is small and changes often. They are separate layers,
# so that a change of code rebuilds, pushes and pulls a few megabytes.

FROM python:3.11-slim-bookworm AS base
# The base image's pip installs into the environment, which needs no pip of its own.
RUN python -m venv --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# A separate stage: a change of pyproject.toml that leaves the dependencies alone reinstalls nothing.
FROM base AS requirements
COPY pyproject.toml .
RUN python -c "import tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    print(*project['dependencies'], *extras['grpc'], *extras['otel'], sep='\n')" > requirements.txt

FROM base AS dependencies
# The index of PyTorch's builds for one kind of machine. Their versions, such as 2.9.0+cpu, take precedence over PyPI's
# 2.9.0. If the index cannot be reached, pip warns and installs PyPI's build with CUDA, which works but takes gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Remove PyTorch's headers, which only compiling against it needs, and its tests.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --no-compile --extra-index-url "$TORCH_INDEX" torch torchvision \
    && cd /opt/venv/lib/python3.11/site-packages/torch && rm -rf include test
COPY --from=requirements /requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --no-compile -r requirements.txt

# A folder laid out like the environment that contains only this project.
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
# Group 0 may write too: some platforms run containers as an arbitrary user in that group.
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin supervit \
    && install --directory --owner=10001 --group=0 --mode=0775 /var/cache/supervit
COPY --from=dependencies /opt/venv /opt/venv
# Compile bytecode, which the server's user cannot write later, but only of imported modules: that of all takes 170 MB.
# The base image has no bytecode of Python's standard library.
# OpenVINO's telemetry is disabled, as in the server, so that it does not report the import.
RUN python -c "import sys; sys.modules['openvino_telemetry'] = None; import fastapi, grpc.aio, openvino, timm, uvicorn; \
    import opentelemetry.exporter.otlp.proto.http.trace_exporter"
COPY --from=application /application /opt/venv
# Compile the rest of the bytecode. If an import fails, the build fails.
RUN python -c "import service.hosting.serve, service.engines.torch_engine" && supervit serve --help > /dev/null

# Libraries keep their caches in HOME, which an arbitrary user of the platform would not have.
ENV HOME=/tmp \
    SUPERVIT_HOST=0.0.0.0 \
    SUPERVIT_PROFILE_FOLDER=/var/cache/supervit
USER 10001:10001
EXPOSE 8000
# A start takes seconds, or minutes if other processes keep the CPUs busy. There is no curl in the image.
HEALTHCHECK --interval=15s --timeout=5s --start-period=3m --retries=3 \
    CMD ["python", "-c", "import http.client, os, ssl, sys; \
        address = '127.0.0.1', int(os.environ.get('SUPERVIT_PORT', 8000)); \
        tls = ssl._create_unverified_context() if os.environ.get('SUPERVIT_TLS_CERTIFICATE') else None; \
        server = http.client.HTTPSConnection(*address, timeout=4, context=tls) if tls \
            else http.client.HTTPConnection(*address, timeout=4); \
        server.request('GET', '/health/ready'); \
        sys.exit(server.getresponse().status != 200)"]
# On SIGTERM the server answers the requests that it has admitted and then exits by the signal; tini turns 143 into 0.
# The kernel does not deliver SIGTERM to a process 1 without a handler, and Python has none during seconds of imports.
ENTRYPOINT ["tini", "-e", "143", "--", "supervit"]
CMD ["serve"]
