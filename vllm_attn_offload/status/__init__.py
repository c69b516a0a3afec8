# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload status`: memory nodes and their sessions, as they say it."""
