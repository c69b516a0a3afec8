# SPDX-License-Identifier: Apache-2.0
"""Channels of every kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from channel_pairs import Channels, channel_pair


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
