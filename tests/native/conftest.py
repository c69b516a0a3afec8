# SPDX-License-Identifier: Apache-2.0
"""The compiled library, which every test here needs."""

from __future__ import annotations

import pytest

from vllm_attn_offload.native.attention import CpuKernelLibrary, load_cpu_library


@pytest.fixture(scope="module")
def library() -> CpuKernelLibrary:
    library = load_cpu_library()
    if library is None:
        pytest.skip("the CPU kernel library is not built: no C++ compiler at install")
    return library
