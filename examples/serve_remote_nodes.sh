#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serves a model with its KV cache on two memory nodes that listen on TCP with a token:
#
#   examples/serve_remote_nodes.sh MODEL [options of vllm serve]
#
# For a trial both nodes run here. In earnest each has a host: copy the token there, run
# the command of the loop there with that host's address, and keep only `vllm serve`.
set -euo pipefail

TOKEN=${TOKEN:-token}
NODE_1=${NODE_1:-127.0.0.1:7600}
NODE_2=${NODE_2:-127.0.0.1:7601}
KV_CACHE_GIB=${KV_CACHE_GIB:-4}

[[ -s $TOKEN ]] || (umask 077; openssl rand -hex 32 >"$TOKEN")

pids=()
stop() { # the engine, which comes first, must not see its nodes go
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" || true
    done
}
trap stop EXIT

for address in "$NODE_1" "$NODE_2"; do
    vllm-memory-node \
        --listen "$address" \
        --kv-cache-gib "$KV_CACHE_GIB" \
        --auth-token-file "$TOKEN" &
    pids+=($!)
done

# A node listens after half a second, long before an engine looks for it.
vllm serve "$@" \
    --attention-offload \
    --attention-offload-config.memory_nodes+ "$NODE_1" \
    --attention-offload-config.memory_nodes+ "$NODE_2" \
    --attention-offload-config.auth_token_file "$TOKEN" &
pids=($! "${pids[@]}")
wait "${pids[0]}"
