# SPDX-License-Identifier: Apache-2.0
"""Sessions in an answer to GetStats: one peer's choices blind and hide nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest
from node_process import NodeProcess, eventually
from raw_session import make_geometry, reservation, session_of

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.memory_node.session_list import list_sessions
from vllm_attn_offload.protocol.messages import MAX_CONTROL_BYTES
from vllm_attn_offload.protocol.session_counters import SessionCounters
from vllm_attn_offload.protocol.session_stats import SessionStats
from vllm_attn_offload.protocol.value_types import MAX_MODEL_CHARS

_MOST_SESSIONS = 256
_INDEX = (1 << 31) - 1


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    log = tmp_path_factory.mktemp("list") / "node.log"
    options = ("--kv-cache-gib", "0.05", "--attention-kernel", "torch")
    process = NodeProcess("127.0.0.1:0", log, *options)
    yield process
    process.kill()


def session(engine: str = "e", generation: int = 0, num_cpus: int = 0) -> SessionStats:
    """As long as its texts, and as large as its numbers, can be."""
    counters = SessionCounters()
    for field in msgspec.structs.fields(counters):
        is_count = isinstance(getattr(counters, field.name), int)
        setattr(counters, field.name, 1 << 62 if is_count else 1e9)
    return SessionStats(
        engine=engine,
        tp_rank=_INDEX,
        num_blocks=_INDEX,
        kv_bytes=1 << 50,
        worker_kv_bytes=1 << 62,
        worker_state_bytes=1 << 62,
        worker_cpu_ids=[_INDEX] * num_cpus,
        counters=counters,
        model="\U0001f600" * MAX_MODEL_CHARS,
        engine_index=_INDEX,
        transport="shared memory",
        generation=generation,
    )


@pytest.mark.parametrize("num_cpus", [256, 1 << 14])
def test_the_longest_sessions_fit(node: NodeProcess, num_cpus: int) -> None:
    longest = [("c", session("e" * 128, 0, num_cpus))] * _MOST_SESSIONS
    with closing(ControlClient(node.address, 5)) as client:
        stats = client.stats()
    told = msgspec.structs.replace(stats, sessions=list_sessions(longest))
    num_bytes = len(msgspec.msgpack.encode(told))
    assert num_bytes + (64 << 10) < MAX_CONTROL_BYTES
    assert len(told.sessions[0].worker_cpu_ids) == (256 if num_cpus == 256 else 0)
    (alone,) = list_sessions(longest[:1])
    assert len(alone.worker_cpu_ids) == num_cpus


@pytest.mark.parametrize(
    "model", ["x" * (MAX_MODEL_CHARS + 1), "a\nb", "\x1b[2J", "a\u2028b"]
)
def test_models_that_are_refused(node: NodeProcess, model: str) -> None:
    request = msgspec.structs.replace(
        reservation(make_geometry(), 1 << 20), model=model
    )
    with (
        closing(ControlClient(node.address, 5)) as client,
        pytest.raises(MemoryNodeError, match="the connection broke"),
    ):
        client.reserve(request)


def test_names_of_connections() -> None:
    """Whoever came first keeps a name; nobody is hidden by a higher generation."""
    given = [
        ("a", session("x", 0)),
        ("b", session("x", 9)),
        ("a", session("x", 1)),
        ("b", session("x#2", 3)),
        ("c", session("x#2", 4)),
        ("c", session("x", 5)),
    ]
    told = [(each.engine, each.generation) for each in list_sessions(given)]
    assert told == [
        *(("x", 0), ("x#2", 9), ("x", 1)),
        *(("x#2", 3), ("x#2#2", 4), ("x#3", 5)),
    ]


def test_two_connections_of_one_name(node: NodeProcess) -> None:
    """A second one is served, as after a loss of the first, which it does not hide."""
    request = msgspec.structs.replace(
        reservation(make_geometry(), 1 << 20), engine="victim"
    )

    def names(client: ControlClient) -> list[str]:
        return [each.engine for each in client.stats().sessions]

    with closing(ControlClient(node.address, 5)) as second:
        with closing(ControlClient(node.address, 5)) as first:
            for client in (first, second):
                reserved = client.reserve(request)
                client.open_session(session_of(reserved.reservation, 4))
            assert names(second) == ["victim", "victim#2"]
        assert eventually(lambda: names(second) == ["victim"])
