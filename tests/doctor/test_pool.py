# SPDX-License-Identifier: Apache-2.0
"""What nodes are together, what a model asks of them, and how they are timed."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from doctor_findings import one
from doctor_nodes import MODEL, OPTIONS, StartNode, case
from node_process import NodeProcess

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.exchange_probe import probe_exchange
from vllm_attn_offload.doctor.host_memory import check_memory
from vllm_attn_offload.doctor.model_size import check_model
from vllm_attn_offload.doctor.node_examination import NodeExamination
from vllm_attn_offload.doctor.pool import check_pool
from vllm_attn_offload.planner.model.shape import ModelShape


def test_pool(shared_node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "9999")
    of = case(shared_node.address, MODEL)
    node = NodeExamination(shared_node.address, of)
    list(node.run())
    held = "1 memory node(s) together hold 2,048 tokens"
    assert one(list(check_pool(of, [node], lambda: 0)), "pool", "ok").found == held
    one(list(check_pool(of, [node], lambda: 2048)), "pool", "ok")
    finding = one(list(check_pool(of, [node], lambda: 8192)), "pool")
    assert finding.found == f"{held}, and a request may have 8,192"
    assert "--max-model-len 2048" in finding.do


def test_nodes_on_the_same_cpus(
    start: StartNode, shared_node: NodeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    addresses = (shared_node.address, start().address)
    config = AttentionOffloadConfig(memory_nodes=addresses)
    nodes = [NodeExamination(each, Case(config)) for each in addresses]
    for node in nodes:
        list(node.run())
    findings = list(check_pool(Case(config), nodes, lambda: 0))
    assert findings.pop(0).found.endswith("of one host")
    own_cpu = OPTIONS[-1]
    for finding in findings:
        assert f"has CPUs {own_cpu} of this host, which a worker" in finding.found
    assert len(findings) == 2
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "9999")
    assert len(list(check_pool(Case(config), nodes, lambda: 0))) == 1


def test_nodes_of_ray() -> None:
    config = AttentionOffloadConfig(memory_nodes=("ray:shared",))
    findings = list(check_pool(Case(config), [], lambda: 0))
    assert "not checked: Ray places" in one(findings, "pool", "ok").found


def test_probe(shared_node: NodeProcess) -> None:
    findings = list(probe_exchange(case(shared_node.address)))
    assert "GB/s of KV attended" in one(findings, "exchange", "ok").found
    findings = list(probe_exchange(case("127.0.0.1:1")))
    one(findings, "exchange")


def test_model(tmp_path: Path) -> None:
    of = case("127.0.0.1:1", MODEL)
    found = one(list(check_model(of)), "configuration", "ok").found
    assert "14.96 GiB of weights, 32 layers" in found
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    unknown = list(check_model(case("127.0.0.1:1", str(tmp_path))))
    warned = one(unknown, "configuration", "warn").found
    assert warned.startswith("room in tokens not checked: model_type 'unheard-of'")
    absent = list(check_model(case("127.0.0.1:1", "./no/such/model")))
    assert "No config.json" in one(absent, "configuration").found


def test_model_of_unknown_size(tmp_path: Path) -> None:
    """vLLM judges it; the planner's own option is not doctor's."""
    config = json.loads(Path(MODEL, "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    finding = one(
        list(check_model(case("127.0.0.1:1", str(tmp_path)))), "configuration", "warn"
    )
    assert "quantized by 'compressed-tensors'" in finding.found
    assert "--weight-bits" not in f"{finding}"
    alone = path.rename(tmp_path / "alone.json")  # vLLM would not take it
    finding = one(list(check_model(case("127.0.0.1:1", str(alone)))), "configuration")
    assert "--weight-bits" not in f"{finding}"


def test_slow_hub(shared_node: NodeProcess) -> None:
    """Other checks go on without the model."""
    config = AttentionOffloadConfig(memory_nodes=(shared_node.address,))
    never: Future[ModelShape] = Future()
    slow = Case(config, model="a/b", shape=never, shape_due=time.monotonic() + 0.2)
    start = time.monotonic()
    one(list(check_memory(slow)), "memory", "ok")
    node = NodeExamination(shared_node.address, slow)
    assert one(list(node.run()), "capacity", "ok").found.endswith("are free")
    assert time.monotonic() - start < 10


def test_no_probe(shared_node: NodeProcess) -> None:
    """It is said, wherever nothing was measured."""
    for config in ({}, {"memory_nodes": ("ray:shared",)}):
        nothing = Case(AttentionOffloadConfig(**config), is_probing=True)
        finding = one(list(probe_exchange(nothing)), "exchange", "warn")
        assert finding.found.startswith("not measured: no node")
    failed = list(probe_exchange(case(shared_node.address), has_failed=True))
    found = one(failed, "exchange", "warn").found
    assert found == "not measured: another check failed"
