# SPDX-License-Identifier: Apache-2.0
"""The memory node: a process that owns paged KV blocks and attends over them.

Nothing in this package imports vLLM.
"""
