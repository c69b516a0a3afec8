# SPDX-License-Identifier: Apache-2.0
"""When ``auto`` cuts: given what steps take whole and cut."""

from __future__ import annotations

import pytest

from vllm_attn_offload.attention.micro_batch.choice import (
    NUM_SAMPLES,
    NUM_STEPS_DECIDED,
    NUM_STEPS_NEW,
    MicroBatchChoice,
)

#: Whole steps, then cut ones and whole ones in turns.
TRIAL = 3 * NUM_SAMPLES - 1
#: Three decisions that are confirmed, after each of which the next holds twice as long.
SETTLING = 7 * NUM_STEPS_NEW + 3 * TRIAL


def run(
    choice: MicroBatchChoice,
    num_steps: int,
    *,
    whole_s: float,
    cut_s: float,
    wait_s: float,
    size: tuple[int, int, int] = (16, 16, 16384),
) -> list[bool]:
    """Which of the steps were cut."""
    decisions = []
    for _ in range(num_steps):
        is_cut = choice.wants_cut(*size)
        choice.record(is_cut, cut_s if is_cut else whole_s, 0.0 if is_cut else wait_s)
        decisions.append(is_cut)
    return decisions


@pytest.mark.parametrize(
    ("whole_s", "cut_s", "wait_s", "gains"),
    [
        pytest.param(0.130, 0.075, 0.080, True, id="attention-bound"),
        pytest.param(0.040, 0.048, 0.010, False, id="split-compute-costs-more"),
        pytest.param(0.100, 0.099, 0.050, False, id="gain-within-hysteresis"),
    ],
)
def test_auto_keeps_the_faster(
    whole_s: float, cut_s: float, wait_s: float, gains: bool
) -> None:
    """After a trial all steps run the faster way; other trials are rare."""
    choice = MicroBatchChoice("auto")
    times = {"whole_s": whole_s, "cut_s": cut_s, "wait_s": wait_s}
    trial = run(choice, TRIAL, **times)
    assert sum(trial) == NUM_SAMPLES
    settling = run(choice, SETTLING, **times)
    assert sum(step != gains for step in settling) <= 3 * TRIAL
    later = run(choice, 2 * NUM_STEPS_DECIDED, **times)
    assert 0 < sum(step != gains for step in later) <= TRIAL
    reported = choice.times()
    assert reported["is_cut"] == gains
    assert reported["num_micro_batch_changes"] == gains
    assert reported["num_cut_steps"] == sum(trial + settling + later)


def test_auto_tries_nothing_without_waiting() -> None:
    choice = MicroBatchChoice("auto")
    assert not any(run(choice, 50, whole_s=0.1, cut_s=0.01, wait_s=0.005))


def test_auto_follows_a_change_and_not_noise() -> None:
    """A decision falls when its reason is gone, and not for a hair's breadth."""
    choice = MicroBatchChoice("auto")
    run(choice, TRIAL, whole_s=0.13, cut_s=0.08, wait_s=0.08)
    near = {"whole_s": 0.100, "cut_s": 0.102, "wait_s": 0.05}
    assert all(run(choice, NUM_STEPS_NEW, **near))
    run(choice, TRIAL, **near)
    assert all(run(choice, 2 * NUM_STEPS_NEW, **near))
    run(choice, TRIAL, whole_s=0.100, cut_s=0.120, wait_s=0.05)
    far = {"whole_s": 0.100, "cut_s": 0.120, "wait_s": 0.05}
    assert not any(run(choice, NUM_STEPS_NEW, **far))
    assert choice.times()["num_micro_batch_changes"] == 2
    assert sum(run(choice, TRIAL, **far)) == NUM_SAMPLES


def test_auto_soon_corrects_a_noisy_trial() -> None:
    """What five samples got wrong does not stand for hundreds of steps."""
    choice = MicroBatchChoice("auto")
    run(choice, TRIAL, whole_s=0.13, cut_s=0.20, wait_s=0.08)
    assert not any(run(choice, NUM_STEPS_NEW, whole_s=0.13, cut_s=0.08, wait_s=0.08))
    run(choice, TRIAL, whole_s=0.13, cut_s=0.08, wait_s=0.08)
    assert all(run(choice, NUM_STEPS_NEW, whole_s=0.13, cut_s=0.08, wait_s=0.08))


def test_a_growing_batch_is_tested_less_and_less() -> None:
    """Its decision was confirmed at other sizes."""
    choice, num_cut = MicroBatchChoice("auto"), 0
    for step in range(4):
        size, times = (16, 16, 1024 << step), {"whole_s": 0.13, "cut_s": 0.08}
        run(choice, TRIAL, **times, wait_s=0.08, size=size)
        steps = run(choice, NUM_STEPS_NEW << step, **times, wait_s=0.08, size=size)
        num_cut += sum(steps)
    assert num_cut == 15 * NUM_STEPS_NEW


def test_auto_decides_by_size() -> None:
    """A small batch stays whole beside a large one that is cut."""
    choice = MicroBatchChoice("auto")
    small, large = (2, 2, 256), (32, 32, 65536)
    for _ in range(2):
        run(choice, 10, whole_s=0.02, cut_s=0.03, wait_s=0.01, size=small)
        run(choice, 10, whole_s=0.30, cut_s=0.16, wait_s=0.15, size=large)
    assert not choice.wants_cut(*small)
    assert choice.wants_cut(*large)
    assert not choice.wants_cut(1, 4, 65536)


def test_ranks_do_what_the_first_one_measured() -> None:
    """Also where their own times say the contrary: cuts are the same, row by row."""
    told: list[list[float]] = []

    def tell(values: list[float]) -> list[float]:
        told.append(values)
        return values

    first = MicroBatchChoice("auto", agree=tell)
    other = MicroBatchChoice("auto", agree=lambda values: told.pop())
    cuts = []
    for _ in range(2 * NUM_STEPS_DECIDED):
        is_cut = first.wants_cut(16, 16, 16384)
        assert other.wants_cut(16, 16, 16384) == is_cut
        first.record(is_cut, 0.075 if is_cut else 0.130, 0.0 if is_cut else 0.080)
        other.record(is_cut, 0.900 if is_cut else 0.130, 0.001)
        assert not told
        assert other.costs == first.costs
        cuts.append(is_cut)
    assert sum(cuts) > NUM_STEPS_DECIDED


def test_one_slow_step_is_not_the_rule() -> None:
    """A node that hung for a step makes no regime one that waits."""
    choice = MicroBatchChoice("auto")
    run(choice, 1, whole_s=30.0, cut_s=1.0, wait_s=29.9)
    assert not any(run(choice, 50, whole_s=0.1, cut_s=0.01, wait_s=0.005))


def test_options_decide_beforehand() -> None:
    for option, expected in ((1, False), (2, True)):
        choice = MicroBatchChoice(option)
        steps = run(choice, 10, whole_s=1.0, cut_s=1.0, wait_s=0.5)
        assert steps == [expected] * 10
