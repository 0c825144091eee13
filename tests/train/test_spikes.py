"""Spikes are found against a baseline that nothing poisons, followed to their end, and told with a likely cause."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from ctxext.data.packing import PackedWindow
from ctxext.train.metrics import StepMetrics
from ctxext.train.monitors import StepEvent
from ctxext.train.spikes import SpikeMonitor
from ctxext.train.token_counts import TokenCounts

PEAK, WARMUP, VOCABULARY = 1e-3, 5, 100
LATE_RATE = 5e-4


def usual_losses(count: int, seed: int = 0) -> list[float]:
    """A noisy level of 2 that falls slowly."""
    source = random.Random(seed)
    return [2.0 - 0.001 * number + source.gauss(0.0, 0.05) for number in range(count)]


def monitor() -> SpikeMonitor:
    return SpikeMonitor(PEAK, WARMUP, TokenCounts(VOCABULARY))


def event(
    step: int, loss: float, grad_norm: float = 1.0, rate: float = LATE_RATE, ids: Sequence[int] | None = None
) -> StepEvent:
    tokens = list(ids) if ids is not None else list(range(50))
    window = PackedWindow(tokens, list(range(len(tokens))), [0], 0)
    return StepEvent(StepMetrics(step, 1000, loss, grad_norm, rate, len(tokens), 1.0, 1.0), [window], nn.Identity())


def lines_of(watching: SpikeMonitor, losses: Sequence[float], first: int = 1) -> list[tuple[int, dict[str, Any]]]:
    """Every line with its step."""
    return [
        (step, line) for step, loss in enumerate(losses, start=first) for line in watching.after_step(event(step, loss))
    ]


def test_a_spike_is_found_with_its_height_and_its_end() -> None:
    losses = usual_losses(200)
    losses[100:110] = [4.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.9, 2.8, 2.7, 2.6]
    (begin, spike), (end, recovered) = lines_of(monitor(), losses)
    assert (begin, spike["event"]) == (101, "spike")
    assert spike["height"] == pytest.approx(2.1, abs=0.1)
    assert spike["baseline"] == pytest.approx(1.93, abs=0.05)
    assert "loss spike of 2." in spike["warning"]
    assert (end, recovered["event"], recovered["spike_step"]) == (113, "recovered", 101)
    assert recovered["height"] == pytest.approx(3.1, abs=0.1), "its highest point, not its first"
    assert (recovered["after_steps"], recovered["soon"]) == (10, True)


def test_noise_trend_and_a_nearly_constant_loss_are_no_spikes() -> None:
    for seed in range(5):
        assert lines_of(monitor(), usual_losses(300, seed)) == []
    assert lines_of(monitor(), [2.0] * 50 + [2.001] * 50 + [2.05] * 5) == []
    assert [line["event"] for _, line in lines_of(monitor(), [2.0] * 50 + [2.2])] == ["spike"]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_move_neither_baseline_nor_width(poison: float) -> None:
    clean, poisoned = usual_losses(60), usual_losses(60)
    watching, other = monitor(), monitor()
    lines_of(watching, clean)
    for step, loss in enumerate(poisoned, start=1):
        assert other.after_step(event(step, loss)) == []
        assert other.after_step(event(step, poison)) == []
        assert other.after_step(event(step, 1.9, grad_norm=poison)) == [], "a skipped step whose loss looks sound"
    spike, same = (one.after_step(event(61, 4.0))[0] for one in (watching, other))
    assert (spike["baseline"], spike["height"]) == (same["baseline"], same["height"])


def test_a_few_easy_batches_do_not_move_the_baseline() -> None:
    plain, easy = monitor(), monitor()
    losses = usual_losses(60)
    lines_of(plain, losses)
    lines_of(easy, [0.1 if step % 12 == 0 else loss for step, loss in enumerate(losses, start=1)])
    (_, spike), (_, other) = (lines_of(one, [4.0], first=61)[0] for one in (plain, easy))
    assert other["baseline"] == pytest.approx(spike["baseline"], abs=0.03)


def test_a_spike_does_not_raise_its_own_baseline() -> None:
    watching = monitor()
    lines_of(watching, usual_losses(60))
    (_, spike), *rest = lines_of(watching, [6.0] * 80, first=61)
    assert rest == [], "one spike that lasts, not many"
    (_, recovered), *rest = lines_of(watching, usual_losses(3), first=141)
    assert recovered["after_steps"] == 80
    assert recovered["soon"] is False
    (_, again), *_ = lines_of(watching, [6.0], first=144)
    assert again["baseline"] == pytest.approx(spike["baseline"], abs=0.05)


def test_a_loss_that_stays_up_is_told_after_200_steps_and_becomes_the_new_level() -> None:
    watching = monitor()
    lines_of(watching, usual_losses(60))
    lines = lines_of(watching, [5.0 + loss / 100 for loss in usual_losses(300)], first=61)
    assert [(step, line["event"]) for step, line in lines] == [(61, "spike"), (261, "not-recovered")]
    assert "200 steps" in lines[1][1]["warning"]


def test_an_exploded_gradient_before_the_spike_is_named_as_the_cause() -> None:
    watching = monitor()
    for step, loss in enumerate(usual_losses(40), start=1):
        assert watching.after_step(event(step, loss, grad_norm=30.0 if step == 39 else 1.0)) == []
    resumed = monitor()
    resumed.restore(json.loads(json.dumps(watching.state())))
    spike, again = (one.after_step(event(41, 4.0))[0] for one in (watching, resumed))
    assert spike["cause"] == "gradient"
    assert again == spike
    assert "30.0 times its median in step 39" in spike["detail"]


def test_a_large_gradient_of_the_spike_itself_is_not_its_cause() -> None:
    watching = monitor()
    lines_of(watching, usual_losses(40))
    assert watching.after_step(event(41, 4.0, grad_norm=50.0))[0]["cause"] == "unknown"


def test_tokens_that_crowd_a_batch_are_named_by_their_ids() -> None:
    watching = monitor()
    lines_of(watching, usual_losses(40))
    spike = watching.after_step(event(41, 4.0, ids=[*range(50), *[77] * 50]))[0]
    assert (spike["cause"], spike["token_ids"]) == ("tokens", [77])
    assert "id 77 (50.0% of the batch, never seen before)" in spike["detail"]


def test_many_rare_tokens_never_seen_before_are_anomalous_together() -> None:
    watching = SpikeMonitor(PEAK, WARMUP, TokenCounts(1000))
    lines_of(watching, usual_losses(40))
    ids = [*list(range(50)) * 16, *range(800, 1000)]  # each of them 0.1% of the batch
    spike = watching.after_step(event(41, 4.0, ids=ids))[0]
    assert spike["cause"] == "tokens"
    assert set(spike["token_ids"]) <= set(range(800, 1000))


def test_common_tokens_are_no_anomaly() -> None:
    watching = monitor()
    lines_of(watching, usual_losses(40))
    assert watching.after_step(event(41, 4.0, ids=[7] * 5 + list(range(50))))[0]["cause"] == "unknown"


def test_a_spike_at_the_peak_of_the_rate_right_after_warmup_is_the_schedules() -> None:
    watching = monitor()
    for step, loss in enumerate(usual_losses(9), start=1):
        watching.after_step(event(step, loss, rate=PEAK))
    spike = watching.after_step(event(10, 4.0, rate=PEAK))[0]
    assert spike["cause"] == "schedule"
    assert "longer warmup" in spike["detail"]


def test_the_update_comes_before_the_data_and_the_data_before_the_schedule() -> None:
    watching = monitor()
    for step, loss in enumerate(usual_losses(9), start=1):
        watching.after_step(event(step, loss, rate=PEAK, grad_norm=20.0 if step == 9 else 1.0))
    spike = watching.after_step(event(10, 4.0, rate=PEAK, ids=[99] * 50))[0]
    assert [cause["cause"] for cause in spike["causes"]] == ["gradient", "tokens", "schedule"]
    assert spike["cause"] == "gradient"


def test_a_resumed_monitor_says_what_the_uninterrupted_one_says() -> None:
    losses = usual_losses(160)
    losses[70:90] = [4.0] * 20
    whole = lines_of(monitor(), losses)
    assert len(whole) == 2
    for cut in (30, 69, 75, 91, 140):
        before, after = monitor(), monitor()
        lines = lines_of(before, losses[:cut])
        after.restore(json.loads(json.dumps(before.state())))
        lines += lines_of(after, losses[cut:], first=cut + 1)
        assert lines == whole, cut
        assert after.state() == restored_state(losses)


def restored_state(losses: Sequence[float]) -> dict[str, Any]:
    watching = monitor()
    lines_of(watching, losses)
    return watching.state()
