# The image that the TorchX components name by default: docker build -t tandemrec:latest .
# For GPUs: docker build --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg DEVICE=cuda \
#   -t tandemrec:latest .
# The base needs a Python of 3.11 or newer; docs/cluster.md says what has been tried.
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG DEVICE=cpu
# Of torch; empty: its CPU builds for cpu, what PyPI has, a CUDA build, for cuda.
ARG TORCH_INDEX=

# What slim and CUDA bases lack: bash runs the components' command lines, libgomp1 is torch's.
RUN apt-get update \
 && apt-get install --no-install-recommends --yes bash libgomp1 python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tandemrec
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# The environment before the code, so that a change of code does not install it again.
COPY requirements requirements
RUN index=$TORCH_INDEX \
 && if [ "$DEVICE" = cpu ]; then index=${index:-https://download.pytorch.org/whl/cpu}; fi \
 && pip install --no-cache-dir ${index:+--index-url "$index"} torch==2.13.0 \
 && pip install --no-cache-dir --no-deps -r "requirements/$DEVICE.txt" -r requirements/s3.txt

COPY pyproject.toml README.md LICENSE ./
COPY launch launch
COPY pipelines pipelines
COPY trainer trainer
COPY embeddings embeddings
COPY configs configs
# The search on a CPU is C; nothing else needs the compiler.
RUN apt-get update \
 && apt-get install --no-install-recommends --yes gcc libc6-dev \
 && pip install --no-cache-dir --no-deps --no-build-isolation -e . \
 && apt-get purge --yes --auto-remove gcc libc6-dev

# Mounted folders must be writable for this user.
RUN useradd --create-home --uid 1000 tandemrec
USER tandemrec

# The components bring a command of their own; without one, the image is the command line.
CMD ["python", "-m", "launch.cli", "--help"]
