# SPDX-License-Identifier: Apache-2.0
"""Channels of every kind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests are imported by path (importlib mode); their helpers lie beside them.
sys.path.insert(0, str(Path(__file__).parent))

from channel_pairs import Channels, channel_pair  # noqa: E402


@pytest.fixture(
    params=["shared-memory", "shared-memory-spin", "unix", "tcp", "tcp-spin", "tls"]
)
def channels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Channels]:
    directory = tmp_path_factory.getbasetemp()
    ours, theirs = channel_pair(request.param, directory)
    yield ours, theirs
    ours.close()
    theirs.close()
