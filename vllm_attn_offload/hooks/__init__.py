# SPDX-License-Identifier: Apache-2.0
"""What this package uses of vLLM, read from source and compared between versions.

``vllm-X.Y.txt`` are the tables of the versions that this release supports.
"""
