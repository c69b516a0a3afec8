# SPDX-License-Identifier: Apache-2.0
"""Timeline of a decode step, recorded on both sides, as Chrome trace and picture.

``python benchmarks/engines/timeline.py EVENTS NODE_OPTIONS...`` runs a memory node that
writes its events when it ends. Both sides use the host's monotonic clock.
"""

from __future__ import annotations

import atexit
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What happened, micro-batch, layer, begin and end in seconds of the monotonic clock.
Event = list[Any]

LANES = (
    ("compute", 0),
    ("compute", 1),
    ("wait", 0),
    ("wait", 1),
    ("attend", 0),
    ("attend", 1),
)
TITLES = {
    "compute": "compute, micro-batch {}",
    "wait": "waits for attention, micro-batch {}",
    "attend": "memory node, micro-batch {}",
}


def start_recording(worker: Any) -> None:
    """Runs in the worker: note when layers are posted and collected."""
    nodes = worker._nodes
    nodes.recorded = []
    nodes.post_layer = _noting(nodes.recorded, "post", nodes.post_layer)
    nodes.collect = _noting(nodes.recorded, "wait", nodes.collect)

    def both(step: Any, layer: int, *tensors: Any) -> None:
        *rows, output = tensors
        nodes.post_layer(step, layer, *rows)
        nodes.collect(step, layer, output)

    # One call for both has no end of the first.
    nodes.exchange = both


def stop_recording(worker: Any) -> list[Event]:
    """Runs in the worker: undo `start_recording`; returns what was noted."""
    nodes = worker._nodes
    events: list[Event] = nodes.recorded
    del nodes.post_layer, nodes.collect, nodes.exchange, nodes.recorded
    return events


def _noting(
    events: list[Event], name: str, method: Callable[..., None]
) -> Callable[..., None]:
    @functools.wraps(method)
    def call(step: Any, layer: int, *arguments: Any, **options: Any) -> None:
        begin = time.monotonic()
        method(step, layer, *arguments, **options)
        events.append([name, step.micro_batch, layer, begin, time.monotonic()])

    return call


def one_step(worker: list[Event], node: list[Event]) -> list[Event]:
    """The middle one of the recorded steps, with what the worker computed in it."""
    begins = sorted(e[3] for e in worker if e[:3] == ["post", 0, 0])
    middle = len(begins) // 2
    begin, end = begins[middle], begins[middle + 1]
    events = [e for e in (*worker, *node) if begin <= e[3] < end]
    computed = []
    for micro_batch in (0, 1):
        own = sorted(
            (e for e in events if e[1] == micro_batch and e[0] in ("post", "wait")),
            key=lambda e: e[3],
        )
        # Between the output of a layer and the q, k, v of the next.
        computed += [
            ["compute", micro_batch, after[2], before[4], after[4]]
            for before, after in zip(own, own[1:], strict=False)
            if before[0] == "wait" and after[0] == "post"
        ]
    return [*computed, *(e for e in events if e[0] != "post")]


def write_chrome_trace(events: list[Event], path: Path) -> None:
    """Write what Perfetto and chrome://tracing open."""
    start = min(event[3] for event in events)
    lanes = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": 0,
            "tid": tid,
            "args": {"name": TITLES[name].format(micro_batch)},
        }
        for tid, (name, micro_batch) in enumerate(LANES)
    ]
    slices = [
        {
            "ph": "X",
            "name": f"{name} {layer}",
            "pid": 0,
            "tid": LANES.index((name, micro_batch)),
            "ts": 1e6 * (begin - start),
            "dur": 1e6 * (end - begin),
            "args": {"layer": layer, "micro_batch": micro_batch},
        }
        for name, micro_batch, layer, begin, end in events
    ]
    path.write_text(json.dumps({"traceEvents": [*lanes, *slices]}), "utf-8")


def draw(events: list[Event], title: str, path: Path) -> None:
    """Draw the lanes of a step as a PNG."""
    from vllm_attn_offload.planner.plot import new_figure

    figure, axis = new_figure(1, title)
    figure.set_size_inches(14, 4)
    start = min(event[3] for event in events)
    used = [lane for lane in LANES if any((e[0], e[1]) == lane for e in events)]
    for row, lane in enumerate(used):
        spans = [
            (1e3 * (begin - start), 1e3 * (end - begin))
            for name, micro_batch, _, begin, end in events
            if (name, micro_batch) == lane
        ]
        axis.broken_barh(spans, (row - 0.4, 0.8), facecolors=f"C{lane[1]}")
    labels = [TITLES[name].format(micro_batch) for name, micro_batch in used]
    axis.set_yticks(range(len(used)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    figure.savefig(path, dpi=120)


def run_node(events_path: Path, options: list[str]) -> int:
    """A memory node that notes when it serves layers."""
    from vllm_attn_offload.memory_node import main
    from vllm_attn_offload.memory_node.session import Session
    from vllm_attn_offload.memory_node.session_pool import SessionPool

    events: list[Event] = []
    serve = Session._serve_layer

    def noting(session: Session, transport: Any, header: Any, *rest: Any) -> None:
        place = [header.micro_batch, header.layer]
        begin = time.monotonic()
        serve(session, transport, header, *rest)
        events.append(["attend", *place, begin, time.monotonic()])

    setattr(Session, serve.__name__, noting)
    # C code notes nothing.
    setattr(SessionPool, SessionPool._layer_loop.__name__, lambda *_: None)
    atexit.register(lambda: events_path.write_text(json.dumps(events), "utf-8"))
    return main.main(options)


if __name__ == "__main__":
    sys.exit(run_node(Path(sys.argv[1]), sys.argv[2:]))
