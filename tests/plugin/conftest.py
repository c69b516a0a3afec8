# SPDX-License-Identifier: Apache-2.0
"""vLLM with our patches, for tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm_attn_offload.patches import apply_patches, revert_patches


@pytest.fixture
def patched() -> Iterator[None]:
    apply_patches()
    yield
    revert_patches()
