# SPDX-License-Identifier: Apache-2.0
"""One metric: what it is called, and where its values are found."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

#: "info" is a gauge that is always 1, for its labels; a timestamp is a Unix time in
#: seconds.
Kind = Literal["gauge", "counter", "info"]
Unit = Literal["bytes", "seconds", "timestamp", "bool", "count", "info"]
#: Labels, and what their values are read from.
Source = tuple[Sequence[str], Any]


@dataclass(frozen=True, slots=True)
class OffloadMetric:
    """A metric of ours.

    ``name`` is without the ``_total`` that Prometheus adds to counters. ``field`` is
    the dotted path of its value; "": code says what it is. A field that is a mapping
    has its keys in the last label.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    unit: Unit
    field: str = ""

    @property
    def sample(self) -> str:
        """Name in queries."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def of_samples(self, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
        """Return the family of these labels and values."""
        family: CounterMetricFamily | GaugeMetricFamily
        if self.kind == "counter":
            family = CounterMetricFamily(self.name, self.help, labels=self.labels)
        else:
            family = GaugeMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in samples:
            family.add_metric(labels, value)
        return family

    def of_sources(self, sources: Iterable[Source]) -> Metric:
        """Return the family of what ``field`` is in each source."""
        read = operator.attrgetter(self.field)
        samples: list[tuple[Sequence[str], float]] = []
        for labels, source in sources:
            value = read(source)
            if isinstance(value, Mapping):
                samples += (((*labels, key), each) for key, each in value.items())
            else:
                samples.append((labels, value))
        return self.of_samples(samples)
