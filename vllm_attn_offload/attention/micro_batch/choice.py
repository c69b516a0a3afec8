# SPDX-License-Identifier: Apache-2.0
"""Chooses one or two micro-batches for a decode step, by the times of earlier steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Literal

from vllm_attn_offload.attention.micro_batch.split import StepCosts
from vllm_attn_offload.logger import get_logger

logger = get_logger(__name__)

NumMicroBatches = Literal[1, 2, "auto"]
#: Returns the numbers of the first rank, which all ranks ask for at the same step.
Agree = Callable[[list[float]], list[float]]

#: Steps that are timed each way before a decision.
NUM_SAMPLES = 5
#: Steps after which a new decision is tested again: five samples may err where a host
#: takes CPUs away. Each time it is confirmed it holds twice as long.
NUM_STEPS_NEW = 64
#: Most steps that a decision holds.
NUM_STEPS_DECIDED = 512
#: Share of a step that must be saved for a decision to change.
MIN_GAIN = 0.05
#: Where less of a step waits for attention, nothing that hides it can gain enough:
#: cutting costs more compute (smaller matrix products) and two hand-overs a layer.
MIN_WAIT_SHARE = 0.08


@dataclass(slots=True)
class _DecodeTimes:
    """Sums over decode steps, and the decision that is in force."""

    num_decode_steps: int = 0
    num_cut_steps: int = 0
    decode_s: float = 0.0
    decode_wait_s: float = 0.0
    num_micro_batch_changes: int = 0
    is_cut: bool = False
    whole_step_s: float = 0.0
    cut_step_s: float = 0.0
    wait_share: float = 0.0


@dataclass(slots=True)
class _Regime:
    """Steps of about one size: samples, then a decision that holds for a while.

    Attributes:
        num_held: Steps that the last decision holds; 0: there was none.
        is_tried: Whether steps are worth cutting to see; None: not known yet.
        whole_step_s: Median of the first rank's whole steps, at the decision.
        cut_step_s: Of cut ones; 0: none was tried.
        wait_share: Share of a whole step that was spent waiting.
    """

    is_cut: bool
    is_decided: bool = False
    is_tried: bool | None = None
    num_steps: int = 0
    num_held: int = 0
    whole_s: list[float] = field(default_factory=list)
    cut_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    whole_step_s: float = 0.0
    cut_step_s: float = 0.0
    wait_share: float = 0.0

    def wants_cut(self) -> bool:
        """True if the next step should be split: every other one while that is tried.

        In turns, because what else a host does changes from second to second.
        """
        if self.is_decided or not self.is_tried:
            return self.is_decided and self.is_cut
        return len(self.cut_s) <= len(self.whole_s) - NUM_SAMPLES

    def add(self, is_cut: bool, step_s: float, wait_s: float, agree: Agree) -> bool:
        """Take a sample; True when it led to a decision.

        Args:
            is_cut: How the step ran.
            step_s: Its time.
            wait_s: Of it, waiting for attention.
            agree: Asked at the same steps on all ranks.
        """
        if self.is_decided:
            self.num_steps += 1
            if self.num_steps >= self.num_held:
                self.is_decided, self.is_tried, self.num_steps = False, None, 0
                self.whole_s, self.cut_s, self.wait_s = [], [], []
            return False
        if is_cut:
            self.cut_s.append(step_s)
        else:
            self.whole_s.append(step_s)
            self.wait_s.append(wait_s)
        return self._decide(agree)

    def _decide(self, agree: Agree) -> bool:
        if len(self.whole_s) < NUM_SAMPLES:
            return False
        if self.is_tried is None:
            samples = zip(self.wait_s, self.whole_s, strict=True)
            share = median(wait / whole for wait, whole in samples)
            self.whole_step_s, self.wait_share = agree([median(self.whole_s), share])
            self.is_tried, self.cut_step_s = self.wait_share >= MIN_WAIT_SHARE, 0.0
        was_cut = self.is_cut
        if not self.is_tried:
            self.is_cut = False
        elif len(self.cut_s) < NUM_SAMPLES:
            return False
        else:
            latest = self.whole_s[-NUM_SAMPLES:]
            whole, cut = agree([median(latest), median(self.cut_s)])
            self.whole_step_s, self.cut_step_s = whole, cut
            # The present state stays unless the other is clearly better.
            self.is_cut = cut <= whole * (
                1 / (1 - MIN_GAIN) if self.is_cut else 1 - MIN_GAIN
            )
        is_confirmed = self.num_held > 0 and self.is_cut == was_cut
        self.num_held = (
            min(2 * self.num_held, NUM_STEPS_DECIDED) if is_confirmed else NUM_STEPS_NEW
        )
        self.is_decided = True
        return True


class MicroBatchChoice:
    """Decides for every decode step, and keeps the inputs of the decision.

    Steps are told apart by their size, in half powers of two of rows and of cached
    tokens. In each size a few steps are timed whole; where they wait for attention, a
    few are timed cut, and the faster way is kept until it is tested again.

    Args:
        option: 1 and 2 decide beforehand. auto measures.
        agree: Makes all ranks, which must do the same, decide by one rank's times.
    """

    def __init__(self, option: NumMicroBatches, agree: Agree = list) -> None:
        self.costs = StepCosts()
        self._option = option
        self._agree = agree
        self._regimes: dict[tuple[int, int], _Regime] = {}
        self._size = (0, 0, 0)
        self._regime = _Regime(False)
        self._times = _DecodeTimes(is_cut=option == 2)

    @property
    def may_cut(self) -> bool:
        """True if any step may be split."""
        return self._option != 1

    def wants_cut(self, num_reqs: int, num_rows: int, num_tokens: int) -> bool:
        """Return True if a decode step should be split.

        Args:
            num_reqs: Requests of the step.
            num_rows: Rows of all its requests, which verify drafts by several.
            num_tokens: Cached tokens of all its requests.
        """
        self._size = (num_reqs, num_rows, num_tokens)
        if self._option != "auto":
            return self._option == 2
        if num_reqs < 2:
            return False
        key = (int(2 * math.log2(num_rows)), int(2 * math.log2(num_tokens)))
        if key not in self._regimes:
            last = self._regime
            self._regimes[key] = _Regime(last.is_cut, num_held=last.num_held)
        self._regime = self._regimes[key]
        return self._regime.wants_cut()

    def record(self, is_cut: bool, step_s: float, wait_s: float) -> None:
        """Take the times of the step that was asked about last.

        Args:
            is_cut: How it ran.
            step_s: All of the model's forward.
            wait_s: Of it, waiting for attention with nothing to compute.
        """
        times = self._times
        times.num_decode_steps += 1
        times.num_cut_steps += is_cut
        times.decode_s += step_s
        times.decode_wait_s += wait_s
        if (
            self._option == "auto"
            and self._size[0] >= 2
            and self._regime.add(is_cut, step_s, wait_s, self._agree)
        ):
            self._adopt(self._regime)

    def times(self) -> dict[str, float]:
        """Sums of decode steps since the start, and what was decided last and why."""
        return {name: float(value) for name, value in asdict(self._times).items()}

    def _adopt(self, regime: _Regime) -> None:
        times, (_, num_rows, num_tokens) = self._times, self._size
        times.whole_step_s, times.cut_step_s = regime.whole_step_s, regime.cut_step_s
        times.wait_share = regime.wait_share
        wait_s = times.wait_share * times.whole_step_s
        self.costs = StepCosts(
            (times.whole_step_s - wait_s) / num_rows, wait_s / num_tokens
        )
        if regime.is_cut == times.is_cut:
            return
        times.is_cut = regime.is_cut
        times.num_micro_batch_changes += 1
        logger.info(
            "Decode steps of about %d rows and %s cached tokens now run as %s: "
            "whole %.1f ms, of which %.0f %% wait for attention; in two micro-batches "
            "%.1f ms.",
            num_rows,
            f"{num_tokens:,}",
            "two micro-batches" if regime.is_cut else "one batch",
            1e3 * times.whole_step_s,
            100 * times.wait_share,
            1e3 * times.cut_step_s,
        )
