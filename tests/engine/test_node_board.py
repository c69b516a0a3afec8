# SPDX-License-Identifier: Apache-2.0
"""What engines show API servers of their nodes: all of it, or an error."""

from __future__ import annotations

import pytest

from vllm_attn_offload.engine.node_board import (
    NODE_BOARD_VARIABLE,
    FoundNode,
    NodeBoard,
)

#: A name of DNS has 253 characters at most.
LONGEST_HOST = "h" * 253


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> NodeBoard:
    monkeypatch.setenv(NODE_BOARD_VARIABLE, "")  # restored with what is set now
    return NodeBoard.create()


def pool_of(num: int, token: bytes) -> list[FoundNode]:
    return [FoundNode(f"{LONGEST_HOST}:{10000 + each}", token) for each in range(num)]


@pytest.mark.parametrize("num", [1, 3, 64])
@pytest.mark.parametrize("token", [b"", b"t" * 32, bytes(range(256)) * 16])
def test_reads_what_was_written(board: NodeBoard, num: int, token: bytes) -> None:
    """In processes that find it, of all engines; the newest nodes of each."""
    first, second = pool_of(num, token), pool_of(num, token)[::-1]
    board.write(0, first)
    board.write(2, first)
    board.write(2, second)
    found = NodeBoard.find()
    assert found is not None
    assert found.read() == first + second
    board.write(0, [])
    assert found.read() == second


def test_nodes_with_tokens_of_their_own(board: NodeBoard) -> None:
    nodes = [FoundNode(f"10.0.0.{each}:1", bytes([each]) * 32) for each in range(64)]
    board.write(0, nodes)
    assert board.read() == nodes


def test_more_than_fit_are_refused(board: NodeBoard) -> None:
    """What was shown before stays."""
    before = pool_of(2, b"t" * 32)
    board.write(0, before)
    nodes = [node for each in range(8) for node in pool_of(1, bytes([each]) * 4096)]
    with pytest.raises(ValueError, match=r"8 memory nodes with 8 tokens .* Allowed: "):
        board.write(0, nodes)
    assert board.read() == before


def test_no_token_in_logs() -> None:
    assert "secret" not in repr(FoundNode("10.0.0.1:1", b"secret"))
