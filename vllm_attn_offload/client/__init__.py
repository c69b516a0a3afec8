# SPDX-License-Identifier: Apache-2.0
"""The compute node's side of the wire. Nothing in this package imports vLLM."""
