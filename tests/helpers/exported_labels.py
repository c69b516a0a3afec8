# SPDX-License-Identifier: Apache-2.0
"""Metrics that a scrape of engines and nodes can show, with their labels."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector
from queries import Query

from vllm_attn_offload.metrics.catalogue import ALL_METRICS

#: What Prometheus adds.
_TARGET = {"job", "instance"}


def exported_labels() -> dict[str, set[str]]:
    """Return labels by the name that a query has for the metric."""
    ours = {each.sample: {*each.labels, *_TARGET} for each in ALL_METRICS}
    return ours | _of_processes() | _of_vllm()


def assert_exported(query: Query) -> None:
    """Its metrics exist, with the labels that it chooses, groups and joins by."""
    exported = exported_labels()
    selectors = query.selectors()
    assert selectors
    for name, labels in selectors:
        assert name in exported
        assert set(labels) <= exported[name], name
    assert query.grouped() <= set().union(*(exported[name] for name, _ in selectors))


def _of_processes() -> dict[str, set[str]]:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    families = registry.collect()
    return {sample.name: _TARGET for family in families for sample in family.samples}


def _of_vllm() -> dict[str, set[str]]:
    """Those with vLLM's usual labels, from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("v1") / "metrics" / "loggers.py"
    declared = re.findall(
        r'_(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"', source.read_text()
    )
    suffixes = {
        "gauge": ("",),
        "counter": ("_total",),
        "histogram": ("_sum", "_count", "_bucket"),
    }
    return {
        f"{name}{suffix}": {"model_name", "engine", *_TARGET}
        for kind, name in declared
        for suffix in suffixes[kind]
    }
