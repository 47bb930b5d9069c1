# One image for CPUs, GPUs and TPUs: EXTRAS are the extras of setup.py that it adds to the base, with commas between.
#
#   docker build --tag=latent_delib .                              # CPU
#   docker build --tag=latent_delib:cuda --build-arg EXTRAS=cuda . # NVIDIA GPUs
#   docker build --tag=latent_delib:tpu --build-arg EXTRAS=tpu .   # what launch/gke_xpk.sh builds
#   docker run --rm latent_delib python -m latent_delib.train --help
#   docker run --rm --gpus=all --volume="$PWD/runs:/latent_delib/runs" --volume=latent_delib:/root/.cache \
#       latent_delib:cuda ./launch/gpu.sh python -m benchmarks.chip    # the volumes keep what it finds
FROM python:3.12-slim
ARG EXTRAS=
WORKDIR /latent_delib

# All that setup.sh reads, so that a change of the code does not install everything again.
COPY setup.py constraints.txt constraints-3.12.txt ./
COPY launch/setup.sh launch/
COPY latent_delib/__init__.py latent_delib/
RUN PIP_NO_CACHE_DIR=1 LATENT_DELIB_EXTRAS=$EXTRAS ./launch/setup.sh base

COPY . .
ENV PATH=/latent_delib/.venv/bin:$PATH PYTHONUNBUFFERED=1
