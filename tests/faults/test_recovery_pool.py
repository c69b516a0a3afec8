# SPDX-License-Identifier: Apache-2.0
"""An engine's memory nodes, lost in every way and brought back, without an engine."""

from __future__ import annotations

import functools
import os
import pickle
import queue
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from node_process import NodeProcess, eventually
from raw_session import make_geometry

from vllm_attn_offload.client.attachment import Attachment, NodeFailure
from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.client.node_client import NodeClient
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.engine_identity import EngineIdentity
from vllm_attn_offload.engine.engine_report import EngineReport
from vllm_attn_offload.engine.node_pool import NodePool
from vllm_attn_offload.engine.outage_notice import Outage, OutageNotice
from vllm_attn_offload.engine.recovery import Recovery
from vllm_attn_offload.engine.session_limits import SessionLimits
from vllm_attn_offload.errors import (
    MemoryNodeError,
    NodeDefectError,
    NodeFailedError,
)
from vllm_attn_offload.memory_node.launcher import MemoryNodeProcess
from vllm_attn_offload.metrics.engine_state import EngineState
from vllm_attn_offload.protocol.messages import GIB, AttachSession
from vllm_attn_offload.worker.lost_step import LostStep

StartNode = Callable[..., NodeProcess]
GEOMETRY = make_geometry()
LIMITS = SessionLimits(2048, 64, 64)
BLOCK_BYTES = 2 * 2 * 16 * 3 * 64 * 4
KV_GIB = 100 * BLOCK_BYTES / GIB
CPUS = str(max(os.sched_getaffinity(0)))


class Losses(queue.SimpleQueue[MemoryNodeError]):
    """What a pool reported."""


@contextmanager
def opened_pool(
    config: AttentionOffloadConfig,
    directory: Path,
    num_blocks: int = 100,
    num_opened: int | None = None,
    start: Callable[..., MemoryNodeProcess] | None = None,
    limits: SessionLimits = LIMITS,
) -> Iterator[tuple[NodePool, Losses, list[Attachment]]]:
    """A pool with one worker's sessions, watched."""
    launches = [
        functools.partial(start or _start, directory / f"local-{index}", config)
        for index in range(config.num_local_nodes)
    ]
    pool = NodePool(config, EngineIdentity("engine"), launches, ControlClient)
    losses = Losses()
    try:
        pool.join()
        assert pool.reserve([GEOMETRY], 1) == [num_blocks]
        (attachments,) = pool.open_sessions([num_opened or num_blocks], limits)
        pool.watch(losses.put)
        yield pool, losses, attachments
    finally:
        pool.close()


def _start(
    directory: Path, config: AttentionOffloadConfig, kv_cache_gib: float | None
) -> MemoryNodeProcess:
    return MemoryNodeProcess(
        directory,
        kv_cache_gib=kv_cache_gib or config.kv_cache_gib,
        cpus=CPUS,
        startup_timeout_s=config.startup_timeout_s,
    )


def quiet(timeout_s: float) -> OutageNotice:
    """Tells nobody that nodes are away."""
    return OutageNotice(lambda outage: None, timeout_s, grace_s=10.0)


def is_final(shown: list[Outage | None]) -> bool:
    """Whether the last that was shown is that the engine stops."""
    return shown[-1] is not None and shown[-1].is_final


def unseen() -> EngineReport:
    """Shows nobody how an engine is."""
    return EngineReport(EngineState("model", 0), lambda state: None)


def options(**given: Any) -> AttentionOffloadConfig:
    return AttentionOffloadConfig(**{"kv_cache_gib": KV_GIB, **given})


def test_local_nodes_die_and_hang(tmp_path: Path) -> None:
    """Killed, it is noticed at once; stopped, after the timeout. Both are replaced."""
    config = options(num_local_nodes=2, partition="blocks", request_timeout_s=2.0)
    with opened_pool(config, tmp_path, 200) as (pool, losses, before):
        for generation, number in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
            victim = ControlClient(before[1].address, 5)
            os.kill(victim.info.pid, number)
            error = losses.get(timeout=10)
            assert error.node == before[1].address
            assert victim.wait_until_lost(5)
            victim.close()
            (after,) = pool.reopen(use_standby=False)
            assert [a.num_blocks for a in after] == [100, 100]
            assert {a.generation for a in after} == {generation}
            assert not {a.session for a in after} & {a.session for a in before}
            before = after
        assert losses.empty()


def test_local_node_is_started_again_with_all_its_room(tmp_path: Path) -> None:
    """Also with what the pool does not use, but a neighbour may."""
    with opened_pool(options(), tmp_path, num_opened=60) as (pool, losses, before):
        first = ControlClient(before[0].address, 5)
        first.close()
        os.kill(first.info.pid, signal.SIGKILL)
        losses.get(timeout=10)
        ((after,),) = pool.reopen(use_standby=False)
        second = ControlClient(after.address, 5)
        second.close()
        assert second.info.pid != first.info.pid
        assert second.info.kv_bytes_total == first.info.kv_bytes_total
        assert second.info.kv_bytes_free == 40 * BLOCK_BYTES


def test_heads_hold_no_more_than_the_least_node(
    start_node: StartNode, tmp_path: Path
) -> None:
    """The rest stays free for other engines, and all of it when the engine leaves."""
    small = start_node("127.0.0.1:0", "--kv-cache-gib", "0.05")
    large = start_node("127.0.0.1:0")
    config = AttentionOffloadConfig(memory_nodes=(large.address, small.address))
    geometry = make_geometry(num_query_heads=8, num_kv_heads=2)
    pool = NodePool(config, EngineIdentity("engine"), [], ControlClient)
    pool.join()
    (num_blocks,) = pool.reserve([geometry], 1)
    half_block_bytes = 2 * 2 * 16 * 1 * 64 * 4
    assert pool.partition == "heads"
    assert num_blocks == int(0.05 * GIB) // half_block_bytes
    pool.open_sessions([num_blocks], LIMITS)
    watcher = ControlClient(large.address, 5)
    free = GIB // 4 - num_blocks * half_block_bytes
    assert watcher.info.kv_bytes_free == free
    pool.close()
    assert eventually(lambda: watcher.refresh_info().kv_bytes_free == GIB // 4)
    watcher.close()


def test_standby_takes_over(start_node: StartNode, tmp_path: Path) -> None:
    """Where the lost node stays away, and only from a standby that is large enough."""
    lost, small, spare = (start_node("127.0.0.1:0") for _ in range(3))
    greedy = NodePool(
        AttentionOffloadConfig(memory_nodes=(small.address,)),
        EngineIdentity("x"),
        [],
        ControlClient,
    )
    greedy.join()
    greedy.reserve([GEOMETRY], 1)
    config = options(
        memory_nodes=(lost.address,), standby_nodes=(small.address, spare.address)
    )
    with opened_pool(config, tmp_path) as (pool, losses, _):
        lost.kill()
        losses.get(timeout=10)
        with pytest.raises(MemoryNodeError, match="cannot connect"):
            pool.reopen(use_standby=False)
        ((attachment,),) = pool.reopen(use_standby=True)
        assert (attachment.address, attachment.num_blocks) == (spare.address, 100)
        assert attachment.generation == 2
    greedy.close()


def test_recovery_gives_new_sessions_to_the_workers(tmp_path: Path) -> None:
    """Two losses, of which one comes while the workers are being attached."""
    given: list[list[Attachment]] = []

    def attach(attachments: list[list[Attachment]]) -> list[tuple[str, str] | None]:
        given.append(attachments[0])
        return [("node", "gone again")] if len(given) == 1 else [None]

    with opened_pool(options(), tmp_path) as (pool, losses, before):
        recovery = Recovery(pool, attach, 60.0, losses.put, quiet(60.0), unseen())
        assert not recovery.is_pending
        os.kill(ControlClient(before[0].address, 5).info.pid, signal.SIGKILL)
        recovery.report_loss(losses.get(timeout=10))
        assert recovery.is_pending
        recovery.finish()
        assert not recovery.is_pending
        assert [a.generation for (a,) in given] == [1, 2]
        recovery.report_loss(MemoryNodeError("node", "of an old step"), 1)
        assert not recovery.is_pending
        recovery.close()
        assert losses.empty()


def test_recovery_gives_up(start_node: StartNode, tmp_path: Path) -> None:
    node = start_node("127.0.0.1:0")
    with opened_pool(options(memory_nodes=(node.address,)), tmp_path) as (pool, got, _):
        recovery = Recovery(pool, lambda _: [None], 1.0, got.put, quiet(1.0), unseen())
        node.kill()
        recovery.report_loss(got.get(timeout=10))
        with pytest.raises(MemoryNodeError, match=r"Within 1 s \(recovery_timeout_s\)"):
            recovery.finish()
        assert "must be back or a standby take over" in str(got.get(timeout=10))


def test_recovery_of_work_that_kills_its_nodes(tmp_path: Path) -> None:
    """It ends, unless a token is decoded in between."""
    with opened_pool(options(), tmp_path) as (pool, losses, _):
        shown: list[Outage | None] = []
        notice = OutageNotice(shown.append, 60.0, grace_s=60.0)
        recovery = Recovery(pool, lambda _: [None], 60.0, losses.put, notice, unseen())

        def lose_and_recover() -> None:
            recovery.report_loss(MemoryNodeError("node", "poison"))
            recovery.finish()

        for _ in range(7):
            lose_and_recover()
            recovery.note_progress()
        for _ in range(5):
            lose_and_recover()
        with pytest.raises(MemoryNodeError, match="lost 6 times in a row without"):
            lose_and_recover()
        assert is_final(shown)


def test_recovery_outlives_a_shortage_of_descriptors(tmp_path: Path) -> None:
    """Nothing can be started, and the loss stays visible; then all is well."""
    shown: list[Outage | None] = []
    with opened_pool(options(), tmp_path) as (pool, losses, before):
        notice = OutageNotice(shown.append, 60.0, grace_s=10.0)
        recovery = Recovery(pool, lambda _: [None], 60.0, losses.put, notice, unseen())
        with closing(ControlClient(before[0].address, 5)) as victim:
            os.kill(victim.info.pid, signal.SIGKILL)
        error = losses.get(timeout=10)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            recovery.report_loss(error)
            time.sleep(1.0)
            assert [outage and outage.node for outage in shown] == [error.node]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        recovery.finish()
        assert shown[-1] is None
        recovery.close()
        assert losses.empty()


def test_giving_up_while_a_node_is_started_again(tmp_path: Path) -> None:
    """The engine's own thread is first to see that the time is over, and says so."""
    shown: list[Outage | None] = []
    left = threading.Event()
    pids: list[int] = []

    def start(*arguments: Any) -> MemoryNodeProcess:
        assert not pids or left.wait(30)
        process = _start(*arguments)
        pids.append(process.pid)
        return process

    with opened_pool(options(), tmp_path, start=start) as (pool, losses, _):
        notice = OutageNotice(shown.append, 1.0, grace_s=10.0)
        recovery = Recovery(pool, lambda _: [None], 1.0, losses.put, notice, unseen())
        os.kill(pids[0], signal.SIGKILL)
        recovery.report_loss(losses.get(timeout=10))
        try:
            with pytest.raises(MemoryNodeError, match="it was not back in time"):
                recovery.finish()
            assert is_final(shown)
            assert "not back in time" in str(losses.get(timeout=10))
        finally:
            left.set()
        recovery.close()


def test_leaving_while_a_node_is_started_again(tmp_path: Path) -> None:
    """What comes up too late is stopped."""
    reached, left = threading.Event(), threading.Event()
    pids: list[int] = []

    def start(*arguments: Any) -> MemoryNodeProcess:
        process = _start(*arguments)
        pids.append(process.pid)
        if len(pids) > 1:
            reached.set()
            assert left.wait(30)
        return process

    with opened_pool(options(), tmp_path, start=start) as (pool, losses, _):
        recovery = Recovery(
            pool, lambda _: [None], 60.0, losses.put, quiet(60.0), unseen()
        )
        os.kill(pids[0], signal.SIGKILL)
        recovery.report_loss(losses.get(timeout=10))
        assert reached.wait(30)
        recovery.close()
        pool.request_stop()
        pool.close()
        left.set()
        assert eventually(lambda: not psutil.pid_exists(pids[1]), 20)
        assert eventually(lambda: not (tmp_path / "local-0").exists())


def test_a_node_that_refuses_its_work_ends_the_engine(tmp_path: Path) -> None:
    """With its own sentence and at once: asked again, it would refuse again."""
    with opened_pool(options(), tmp_path) as (pool, losses, (attachment,)):
        recovery = Recovery(
            pool, lambda _: [None], 60.0, losses.put, quiet(60.0), unseen()
        )
        with closing(_data_channel(attachment)) as client:
            client.post_layer(7, 0, 0, 0, memoryview(bytes(64)), has_queries=True)
            with pytest.raises(NodeDefectError) as refusal:
                client.receive_out(0, memoryview(bytearray(64)))
        reported = pickle.loads(pickle.dumps(LostStep(None, 0, refusal.value)))
        recovery.report_loss(reported.error, reported.generation)
        with pytest.raises(NodeDefectError, match=re.escape(refusal.value.cause)):
            recovery.finish()
        assert losses.get(timeout=10).cause == refusal.value.cause
        assert pool.generation == 0
        recovery.close()


def test_a_node_that_fails_the_same_way_twice_ends_the_engine(tmp_path: Path) -> None:
    """Memory may be short for a moment; without a token in between it is a defect."""
    given: list[list[Attachment]] = []
    limits = SessionLimits(2048, 64, 1 << 19)
    with opened_pool(options(), tmp_path, limits=limits) as (pool, losses, before):

        def attach(attachments: list[list[Attachment]]) -> list[NodeFailure | None]:
            given.append(attachments[0])
            return [None]

        recovery = Recovery(pool, attach, 60.0, losses.put, quiet(60.0), unseen())
        failure = _out_of_memory(before[0])
        recovery.report_loss(failure)
        recovery.finish()
        recovery.note_progress()
        recovery.report_loss(_out_of_memory(given[-1][0]))
        recovery.finish()
        assert losses.empty()
        recovery.report_loss(_out_of_memory(given[-1][0]))
        with pytest.raises(NodeFailedError, match="could not compute"):
            recovery.finish()
        assert losses.get(timeout=10).cause == failure.cause
        recovery.close()


def test_failures_hours_apart_are_no_row(tmp_path: Path) -> None:
    """Nothing was decoded in between, where requests ask for one token only."""
    with opened_pool(options(), tmp_path) as (pool, losses, _):
        recovery = Recovery(
            pool, lambda _: [None], 0.5, losses.put, quiet(0.5), unseen()
        )
        for _ in range(3):
            recovery.report_loss(NodeFailedError("node", "no memory for 7 bytes"))
            recovery.finish()
            time.sleep(0.7)
        assert losses.empty()
        recovery.close()


def test_the_same_failure_of_another_node_is_a_defect(tmp_path: Path) -> None:
    with opened_pool(options(), tmp_path) as (pool, losses, _):
        recovery = Recovery(
            pool, lambda _: [None], 60.0, losses.put, quiet(60.0), unseen()
        )
        recovery.report_loss(NodeFailedError("node-a", "no memory for 7 bytes"))
        recovery.finish()
        recovery.report_loss(NodeFailedError("node-b", "no memory for 8 bytes"))
        assert losses.get(timeout=10).node == "node-b"
        recovery.close()


def _data_channel(attachment: Attachment) -> NodeClient:
    request = AttachSession(
        attachment.session,
        attachment.attach_token,
        attachment.generation,
        GEOMETRY.digest(),
        worker_kv_bytes=0,
    )
    return NodeClient(attachment.address, request, 5.0)


def _out_of_memory(attachment: Attachment) -> NodeFailedError:
    """Let a session's node run out of memory for a STEP, and return what it says."""
    with (
        closing(ControlClient(attachment.address, 5)) as control,
        closing(_data_channel(attachment)) as client,
    ):
        pid = control.info.pid
        limits = resource.prlimit(pid, resource.RLIMIT_AS)
        used = psutil.Process(pid).memory_info().vms
        resource.prlimit(pid, resource.RLIMIT_AS, (used, limits[1]))
        try:
            # Larger than what an allocator keeps at hand.
            client.post_step(1, 0, 0, memoryview(bytearray(100 << 20)))
            with pytest.raises(NodeFailedError) as failure:
                client.receive_out(0, memoryview(bytearray(64)))
        finally:
            resource.prlimit(pid, resource.RLIMIT_AS, limits)
    reported = pickle.loads(pickle.dumps(LostStep(None, 0, failure.value))).error
    assert isinstance(reported, NodeFailedError)
    return reported


def test_heartbeats_while_the_model_loads(start_node: StartNode) -> None:
    """From the join on, with nothing reserved: the node keeps such a connection."""
    answered = threading.Semaphore(0)

    class Heartbeats(ControlClient):
        def ping(self, timeout_s: float) -> None:
            super().ping(timeout_s)
            answered.release()

    config = options(
        memory_nodes=(start_node("127.0.0.1:0").address,), request_timeout_s=1.0
    )
    pool = NodePool(config, EngineIdentity("engine"), [], Heartbeats)
    pool.join()
    for _ in range(3):
        assert answered.acquire(timeout=30)
    pool.close()


def test_workers_that_cannot_attach_for_a_while(tmp_path: Path) -> None:
    """More failures than losses are allowed: sessions nobody used are no losses."""
    failures = [NodeFailure("node", "no descriptor is free")] * 6

    def attach(attachments: list[list[Attachment]]) -> list[NodeFailure | None]:
        return [failures.pop() if failures else None]

    with opened_pool(options(), tmp_path) as (pool, losses, _):
        recovery = Recovery(pool, attach, 120.0, losses.put, quiet(120.0), unseen())
        recovery.report_loss(MemoryNodeError("node", "gone"))
        recovery.finish()
        assert not recovery.is_pending
        recovery.close()
        assert losses.empty()
