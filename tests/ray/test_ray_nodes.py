# SPDX-License-Identifier: Apache-2.0
"""Memory nodes that Ray places: where, for whom, and when they end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from node_process import eventually
from ray_cluster import RayCluster
from ray_pools import (
    GONE_WITHIN_S,
    KV_GIB,
    TOKEN,
    has_ended,
    order,
    owned,
    process_of,
    shared,
)

from vllm_attn_offload.client.control_client import ControlClient
from vllm_attn_offload.commands import main
from vllm_attn_offload.errors import MemoryNodeError
from vllm_attn_offload.ray_nodes.actor_calls import (
    create_actor,
    end_actor,
    wait_until_placed,
)
from vllm_attn_offload.ray_nodes.bundles import choose_bundles
from vllm_attn_offload.ray_nodes.cluster import NAMESPACE, connect
from vllm_attn_offload.ray_nodes.owned_nodes import OwnedNodes
from vllm_attn_offload.ray_nodes.shared_pool import SharedPool

READY_WITHIN_S = 8.0
LIST = [str(Path(sys.executable).with_name("vllm-attn-offload")), "ray", "list"]

pytestmark = pytest.mark.long


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a private one, nor a minute of waiting."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ended = subprocess.run(LIST, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "RAY_ADDRESS=127.0.0.1:1 was given, and no cluster answers" in ended.stderr
    assert "Start one with 'ray start --head'" in ended.stderr


def test_cluster_that_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of this host names its head. Other clusters of this machine are hidden."""
    alone = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [*alone, *LIST]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    # Ray writes the host's own address.
    assert re.search(r"cluster was at \S+:1, and no cluster answers", ended.stderr)


def test_bad_resources(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("{bad", "[]", '{"CPU": 0}'):
        command = ["ray", "up", "pool", "--kv-cache-gib", "1", "--resources", given]
        with pytest.raises(SystemExit):
            main(command)
        text = " ".join(capsys.readouterr().err.split())
        assert f"'{given}' was given (" in text
        assert "Allowed: a JSON object of amounts above 0 by resource. Write" in text


def test_bundles() -> None:
    """Workers keep theirs, whatever a node asks for; empty ones go first."""
    bundles = [{"GPU": 1.0}, {"GPU": 1.0}, {"GPU": 2.0}, {"CPU": 1.0}, {"GPU": 1.0}]
    wanted = order(resources={"GPU": 1})
    assert choose_bundles(bundles, {0, 1}, 3, wanted) == [2, 4, 2]
    assert choose_bundles(bundles, {0, 1, 2, 4}, 1, wanted) == []
    assert choose_bundles(bundles, (), 1, order()) == []
    assert choose_bundles([{"a": 0.3}], (), 3, order(resources={"a": 0.1})) == [0] * 3
    with pytest.raises(ValueError, match=r"room for 1.*needs GPU 1 in.*up to 1 nodes"):
        choose_bundles(bundles, {0, 1, 2}, 2, wanted)


def test_without_ray(tmp_path: Path) -> None:
    """A site directory with all that is installed but Ray."""
    ray = pytest.importorskip("ray")
    site = Path(ray.__file__).parents[1]
    for path in site.iterdir():
        if path.name != "ray" and not path.name.startswith("ray-"):
            (tmp_path / path.name).symlink_to(path)
    script = (
        "import site, sys; site.addsitedir(sys.argv[1])\n"
        "from vllm_attn_offload.commands import main\n"
        "sys.exit(main(['ray', 'list']))"
    )
    ended = subprocess.run(
        [sys.executable, "-S", "-P", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2, ended.stderr
    assert "Run: pip install 'vllm-attn-offload[ray]'" in ended.stderr


def test_placed_nodes(ray_cluster: RayCluster) -> None:
    """One on each host, trusted, ready in time; they end with their actors."""
    handler = signal.getsignal(signal.SIGTERM)
    ray = connect()
    assert signal.getsignal(signal.SIGTERM) is handler
    started = time.monotonic()
    with owned(2, order()) as nodes:
        ready_s = time.monotonic() - started
        first, second = (process_of(node) for node in nodes)
        sys.stdout.write(
            f"two nodes placed in {ready_s:.2f} s; RSS of a node "
            f"{first.memory_info().rss >> 20} MiB, of its actor "
            f"{psutil.Process(first.ppid()).memory_info().rss >> 20} MiB"
        )
        assert ready_s < READY_WITHIN_S
        assert len({node.host_id for node in nodes}) == 2
        assert "OMP_NUM_THREADS" not in first.environ()
        assert "_raylet" not in Path(f"/proc/{first.pid}/maps").read_text()
        assert TOKEN.decode() not in repr((order(), vars(nodes[0])["_actor"]))
        with pytest.raises(MemoryNodeError, match="asks for a token"):
            ControlClient(nodes[0].address, 10)
        psutil.Process(first.ppid()).kill()
        assert eventually(lambda: has_ended(first), GONE_WITHIN_S)
        assert not has_ended(second)
    assert eventually(lambda: has_ended(second), GONE_WITHIN_S)
    assert len(ray.nodes()) == 3


def test_lost_raylet(ray_cluster: RayCluster) -> None:
    """Its node ends, and another one is placed before Ray notices."""
    connect()
    launches = OwnedNodes(1, order(), None, (), lambda nodes: None).launches()
    node = launches[0](None)
    process = process_of(node)
    ray_cluster.kill_raylet(node.host_id)
    assert eventually(lambda: has_ended(process), GONE_WITHIN_S)
    started = time.monotonic()
    again = launches[0](KV_GIB)
    sys.stdout.write(f"placed elsewhere in {time.monotonic() - started:.2f} s\n")
    assert time.monotonic() - started < READY_WITHIN_S
    assert again.host_id != node.host_id
    again.stop()
    ray_cluster.replace_host(node.host_id)


def test_no_place(ray_cluster: RayCluster) -> None:
    """The error says what was asked for, and what there is."""
    connect()
    wanted = order(resources={"memory_node": 1, "CPU": 64}, startup_timeout_s=1.0)
    launches = OwnedNodes(1, wanted, None, (), lambda nodes: None).launches()
    with pytest.raises(MemoryNodeError) as error:
        launches[0](None)
    text = str(error.value)
    assert "needs CPU 64, memory_node 1 on one host" in text
    assert "free are, by host: " in text
    assert text.count("CPU 1, memory_node 1") == 2
    assert "Allowed: hosts with that; give them some with ray start" in text


class OfAnotherVersion:
    """Not importable where the actor starts."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return __import__, ("vllm_attn_offload.of_another_version",)


def test_other_version(ray_cluster: RayCluster) -> None:
    """The error names what the host lacks, not only that the actor has ended."""
    connect()
    actor = create_actor(order(auth_token=OfAnotherVersion()), "SPREAD")
    with pytest.raises(MemoryNodeError) as error:
        wait_until_placed(actor, order(), "1", 60.0)
    end_actor(actor)
    text = str(error.value)
    assert "\x1b" not in text
    assert "No module named 'vllm_attn_offload.of_another_version'" in text
    assert "Allowed: hosts with this version of vllm-attn-offload[ray]" in text


def test_token_of_the_cluster(
    ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    ended = subprocess.run(LIST, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "needs the same RAY_AUTH_MODE and token file on every host" in ended.stderr


def test_placement_group(ray_cluster: RayCluster) -> None:
    """Bundles with the resource that no worker takes are used."""
    ray = connect()
    group = ray.util.placement_group([{"CPU": 1}, {"memory_node": 1}] * 2)
    try:
        ray.get(group.ready(), timeout=30)
        host_ids = ray.util.placement_group_table(group)["bundles_to_node_id"]
        with owned(1, order(), group, {0, 1}) as (node,):
            assert node.host_id == host_ids[3]
            late = order(startup_timeout_s=1.0)
            again = OwnedNodes(1, late, group, {0, 1}, lambda nodes: None).launches()
            with pytest.raises(MemoryNodeError, match="in bundle 3 of the engine's"):
                again[0](None)
        with pytest.raises(ValueError, match="which bundles 1, 3 have. Allowed: up to"):
            OwnedNodes(3, order(), group, (), lambda nodes: None)
    finally:
        ray.util.remove_placement_group(group)


def test_shared_pool(
    ray_cluster: RayCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by name, also after its process or its actor was killed."""
    up = ["ray", "up", "pool", "--num", "2", "--kv-cache-gib", str(KV_GIB)]
    assert main(up) == 0
    assert "memory_nodes ray:pool" in capsys.readouterr().out
    try:
        assert main(up) == 2
        assert "ray down pool" in capsys.readouterr().err
        with pytest.raises(ValueError, match="called other. Allowed: pool. Make it"):
            SharedPool("other").size()
        nodes = shared("pool")
        for node in nodes:  # An engine that leaves.
            node.kill()
            node.stop()
        killed = process_of(nodes[0])
        killed.kill()
        # Its first thread has ended before the others, and before it can be waited for.
        assert eventually(lambda: main(["ray", "list"]) == 1, GONE_WITHIN_S)
        assert "it has ended" in capsys.readouterr().out
        assert process_of(shared("pool")[0]) != killed
        psutil.Process(process_of(nodes[1]).ppid()).kill()

        def is_back() -> bool:
            with suppress(MemoryNodeError):
                return shared("pool")[1].address != nodes[1].address
            return False

        assert eventually(is_back, 30)
        assert main(["ray", "list"]) == 0
        assert capsys.readouterr().out.count("pool  ") == 2
        left = [process_of(node) for node in shared("pool")]
        last = connect().get_actor("attn-offload/pool/2-of-2", namespace=NAMESPACE)
        end_actor(last)
        assert eventually(lambda: main(["ray", "list"]) == 1, 10)
        assert SharedPool.sizes() == {"pool": 2}
        assert "Ray has no such actor" in capsys.readouterr().out
    finally:
        assert main(["ray", "down", "pool"]) == 0
    assert eventually(lambda: all(map(has_ended, left)), GONE_WITHIN_S)
    assert eventually(lambda: SharedPool.sizes() == {}, 10)
