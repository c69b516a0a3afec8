#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serves two models whose KV caches share one memory node, on ports 8000 and 8001:
#
#   examples/two_engines_one_pool.sh MODEL OTHER_MODEL [options of vllm serve for both]
#
# Each engine gets half of the node. Without kv_cache_gib the first would take all of it.
set -euo pipefail

NODE=${NODE:-unix:${XDG_RUNTIME_DIR:-/tmp}/attn-offload-pool.sock}
KV_CACHE_GIB=${KV_CACHE_GIB:-8}
HALF=$(awk -v gib="$KV_CACHE_GIB" 'BEGIN { print gib / 2 }')
models=("$1" "$2")
shift 2

pids=()
stop() { # the engines, which come first, must not see their node go
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" || true
    done
}
trap stop EXIT

vllm-memory-node --listen "$NODE" --kv-cache-gib "$KV_CACHE_GIB" &
pids=($!)

# A node listens after half a second, long before an engine looks for it.
for index in 0 1; do
    vllm serve "${models[index]}" "$@" \
        --port $((8000 + index)) \
        --attention-offload \
        --attention-offload-config.memory_nodes+ "$NODE" \
        --attention-offload-config.kv_cache_gib "$HALF" &
    pids=($! "${pids[@]}")
done
wait "${pids[0]}" "${pids[1]}"
