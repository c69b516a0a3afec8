# SPDX-License-Identifier: Apache-2.0
# vLLM's CPU build and this plugin, for engines:
#   docker build --file deploy/container/engine.Dockerfile --tag vllm-attn-offload:cpu .
FROM python:3.11-slim-bookworm

# The compiler stays: vLLM compiles when it starts.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vllm-attn-offload
COPY . .
ENV PIP_NO_CACHE_DIR=1
RUN make install && install --directory --mode 1777 /cache
ENV PATH=/opt/vllm-attn-offload/.venv/bin:$PATH HOME=/cache USER=vllm
USER 1000:1000
