# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` on two hosts: a leader that serves, and a follower with one rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
from harness import faults, tiny_llama
from harness.network_hosts import DEVICE
from harness.network_namespace import RemoteHost
from harness.processes import ManagedProcess, free_port
from harness.serve_process import VLLM, ServeProcess
from node_process import eventually

#: One token to five blocks.
PROMPTS = [[(7 * i + 3 * j) % 1000 + 5 for j in range(1 + 8 * i)] for i in range(20)]
NUM_TOKENS = 48
DEADLINE_S = 120.0
_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "20"),
    *("--max-model-len", str(tiny_llama.MAX_MODEL_LEN)),
    *("--block-size", str(tiny_llama.BLOCK_SIZE)),
    *("--tensor-parallel-size", "2", "--nnodes", "2"),
)


@dataclass(frozen=True)
class End:
    """How an engine ended that lost its follower while it answered.

    Attributes:
        num_silent: Streams that ended early, or did not end, without an error.
        exit_status: Of the leader; None: it still runs.
        left: Processes of the leader, and files, that are still there.
    """

    num_silent: int
    exit_status: int | None
    left: list[str]


@dataclass(frozen=True)
class Stock:
    """What stock vLLM does on two hosts: its tokens, and its end without a follower."""

    tokens: list[list[int]]
    end: End


class EngineOnHosts:
    """A tensor-parallel engine with one rank on each of two hosts; ready when made.

    Args:
        hosts: The leader's, then the follower's.
        model: Model to serve.
        directory: For both logs.
        *options: More of both command lines.

    Raises:
        ProcessError: It did not become ready.
    """

    def __init__(
        self, hosts: list[RemoteHost], model: str, directory: Path, *options: str
    ) -> None:
        leader, follower = hosts
        master = ("--master-addr", leader.address, "--master-port", str(free_port()))
        options = (*_OPTIONS, *master, *options)
        self.follower = ManagedProcess(
            "the follower",
            [
                *(*follower.command, VLLM, "serve", model, *options),
                *("--node-rank", "1", "--headless"),
            ],
            directory / "follower.log",
            variables=_variables(follower, max(os.sched_getaffinity(0))),
            own_session=True,
        )
        try:
            self.leader = ServeProcess(
                model,
                directory / "leader.log",
                *(*options, "--node-rank", "0", "--host", leader.address),
                command=(*leader.command, VLLM),
                host=leader.address,
                **_variables(leader, min(os.sched_getaffinity(0))),
            )
        except BaseException as error:
            error.add_note(self.follower.log_tail())
            self.kill_follower()
            raise

    def stream(self) -> faults.Streams:
        """Greedy answers to all prompts at once."""
        return faults.Streams(self.leader.url, self.leader.model, PROMPTS, NUM_TOKENS)

    def half_way(self) -> faults.Streams:
        """Answers of which half has come."""
        streams = self.stream()
        assert streams.wait_for(len(PROMPTS) * NUM_TOKENS // 2, DEADLINE_S)
        return streams

    def follower_worker(self) -> psutil.Process:
        """The process of the second rank."""
        server = psutil.Process(self.follower.process.pid)
        (worker,) = (
            each
            for each in server.children(recursive=True)
            if each.name().startswith("VLLM::Worker")
        )
        return worker

    def num_recoveries(self) -> int:
        """How often lost nodes came back."""
        return self.leader.log.read_text("utf-8", "replace").count(faults.IS_BACK)

    def lose_follower(self) -> End:
        """Kill the follower while answers are on their way; wait for the end."""
        streams = self.half_way()
        self.kill_follower()
        leader = self.leader.process
        eventually(lambda: leader.poll() is not None, self.leader.stop_timeout_s)
        eventually(lambda: not self.leader.leftovers(), self.leader.stop_timeout_s)
        # Threads read what the leader's end gives them.
        eventually(lambda: not _num_silent(streams), timeout_s=5.0)
        assert streams.errors, "all answers came before the follower's end"
        return End(_num_silent(streams), leader.poll(), self.leader.leftovers())

    def kill_follower(self) -> None:
        """Kill all of it at once, as a host that fails."""
        if self.follower.process.poll() is None:
            server = psutil.Process(self.follower.process.pid)
            for each in (server, *server.children(recursive=True)):
                each.kill()
        self.follower.kill()

    def kill(self) -> None:
        """End whatever still runs."""
        self.kill_follower()
        self.leader.kill_all()


def _num_silent(streams: faults.Streams) -> int:
    """Streams short of tokens, less those with an error; some may have ended before."""
    num_short = sum(len(each) < NUM_TOKENS for each in streams.tokens)
    return max(0, num_short - len(streams.errors))


def _variables(host: RemoteHost, cpu: int) -> dict[str, str]:
    """A CPU, and the address: of a host without a default route nobody can tell it."""
    return {
        "VLLM_HOST_IP": host.address,
        "GLOO_SOCKET_IFNAME": DEVICE,
        "VLLM_CPU_OMP_THREADS_BIND": str(cpu),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
