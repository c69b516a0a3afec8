# SPDX-License-Identifier: Apache-2.0
"""A server with attention offloading, asked through its ``/metrics``."""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from urllib.parse import urlsplit

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from vllm_attn_offload.status.engine_answer import EngineAnswer
from vllm_attn_offload.status.engine_row import EngineRow
from vllm_attn_offload.transport.address import Address

_PREFIX = "attn_offload:"
_MAX_BYTES = 64 << 20
#: Sample, field of `EngineRow`, in the order of the fields.
_FIELDS = {
    "engine_generation": "generation",
    "engine_recovering": "recovering",
    "engine_recoveries_total": "recoveries",
    "engine_recovery_seconds_total": "recovery_s",
    "engine_last_recovery_seconds": "last_recovery_s",
    "engine_recomputed_tokens_total": "recomputed_tokens",
    "engine_pool_blocks": "pool_blocks",
}


class EngineServer:
    """The server at a URL.

    Args:
        url: Of the server, with or without ``http://`` and ``/metrics``.
        timeout_s: Longest silence on its connection.

    Raises:
        ValueError: ``url`` is none of a server.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        with_scheme = url if "://" in url else f"http://{url}"
        base = with_scheme.rstrip("/").removesuffix("/metrics")
        if not _is_server(base):
            raise ValueError(
                f"--engine {url!r} was given, which is no URL of a server. Allowed: "
                "http://HOST:PORT and https://HOST:PORT. Write for example "
                "--engine http://localhost:8000."
            )
        self.url = base
        self._timeout_s = timeout_s
        # A proxy of the environment is for other hosts than those of a cluster.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._asked: Future[EngineAnswer] | None = None

    def ask(self) -> None:
        """Begin to ask for the metrics, for a `read` that follows."""
        # One that is still being asked is not asked twice.
        if self._asked is None or self._asked.done():
            asked: Future[EngineAnswer] = Future()
            self._asked = asked
            # Not an executor, whose threads the end of the command would wait for.
            threading.Thread(target=self._ask, args=(asked,), daemon=True).start()

    def read(self, until_s: float) -> EngineAnswer:
        """Take from the metrics what is ours.

        Args:
            until_s: Without an answer at this time of the monotonic clock it is said to
                have none, however much of it has come.
        """
        assert self._asked is not None
        left_s = max(until_s - time.monotonic(), 0.0)
        wait([self._asked], left_s)
        if self._asked.done():
            return self._asked.result()
        return self._failed(
            f"it did not answer within {left_s:.2g} s. Check that it is not "
            "overloaded, or raise --timeout-s."
        )

    def _ask(self, asked: Future[EngineAnswer]) -> None:
        try:
            asked.set_result(self._answer())
        except Exception as error:
            asked.set_exception(error)

    def _answer(self) -> EngineAnswer:
        try:
            with self._opener.open(f"{self.url}/metrics", timeout=self._timeout_s) as r:
                text = r.read(_MAX_BYTES).decode(errors="replace")
            families = list(text_string_to_metric_families(text))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            return self._failed(
                f"it does not answer ({reason}). Check that it runs and that this host "
                "reaches it."
            )
        except ValueError as error:
            return self._failed(
                f"what its /metrics says is no text of Prometheus ({error}). Check "
                "that the URL is that of a vLLM server."
            )
        samples = list(_samples(families))
        addresses = list(dict.fromkeys(_addresses(samples)))
        if not addresses:
            return self._failed(
                "its /metrics names no memory nodes. Check that it was started with "
                "--attention-offload."
            )
        return EngineAnswer(addresses, _engines(samples))

    def _failed(self, problem: str) -> EngineAnswer:
        return EngineAnswer(problem=f"{self.url}: {problem}")


def _is_server(base: str) -> bool:
    try:
        parts = urlsplit(base)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _samples(families: Iterable[Metric]) -> Iterator[tuple[str, Sample]]:
    for family in families:
        for sample in family.samples:
            if sample.name.startswith(_PREFIX):
                yield sample.name.removeprefix(_PREFIX), sample


def _addresses(samples: Iterable[tuple[str, Sample]]) -> Iterator[str]:
    """Addresses of nodes that answered, and those of others where they are labels."""
    samples = list(samples)
    info = [sample for name, sample in samples if name == "memory_node_info"]
    named = {sample.labels.get("node") for sample in info}
    found = [sample.labels.get("address", "") for sample in info]
    found += [
        sample.labels.get("node", "")
        for name, sample in samples
        if name == "memory_node_up" and sample.labels.get("node") not in named
    ]
    for address in found:
        try:
            Address.parse(address)
        except ValueError:
            continue
        yield address


def _engines(samples: Iterable[tuple[str, Sample]]) -> list[EngineRow]:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name, sample in samples:
        if attribute := _FIELDS.get(name):
            labels = sample.labels
            key = labels.get("model_name", ""), labels.get("engine_index", "")
            rows.setdefault(key, {})[attribute] = sample.value
    return [
        EngineRow(model, index, *map(rows[model, index].get, _FIELDS.values()))
        for model, index in sorted(rows)
    ]
