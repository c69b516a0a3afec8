# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload doctor`: what keeps an engine or a node from serving."""
