# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of offloaded attention: backend, per-step metadata, per-layer call."""
