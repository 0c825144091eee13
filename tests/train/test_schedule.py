"""The learning rate of every step, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support import SilentReporter, make_job

from ctxext.pipeline.extend import extend
from ctxext.train.schedule import learning_rate_at


def test_the_inverse_square_root_schedule_is_the_original_transformers() -> None:
    # Vaswani et al. 2017, equation 3: d^-0.5 * min(n^-0.5, n * w^-1.5); its peak is (d * w)^-0.5.
    d, w = 512, 4000
    peak = (d * w) ** -0.5
    for n in (1, 2, 1000, 3999, 4000, 4001, 16_000, 100_000):
        expected = d**-0.5 * min(n**-0.5, n * w**-1.5)
        actual = learning_rate_at(n - 1, 100_000, peak, w / 100_000, "inverse-sqrt")
        assert actual == pytest.approx(expected, rel=1e-12), n


def test_golden_rates_of_a_short_run() -> None:
    rates = [learning_rate_at(step, 20, 1e-3, 0.2, "inverse-sqrt") for step in range(20)]
    assert rates[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 8.94427190999916e-4])
    assert rates[8] == pytest.approx(6.666666666666666e-4)  # sqrt(4 / 9)
    assert rates[15] == pytest.approx(5e-4)  # half of the peak after four times the warmup
    assert rates[19] == pytest.approx(4.47213595499958e-4)


def test_both_decays_have_the_same_warmup_and_begin_at_the_peak() -> None:
    for step in range(10):
        assert learning_rate_at(step, 100, 0.3, 0.1, "inverse-sqrt") == learning_rate_at(step, 100, 0.3, 0.1, "cosine")
    assert learning_rate_at(9, 100, 0.3, 0.1, "inverse-sqrt") == 0.3
    assert learning_rate_at(10, 100, 0.3, 0.1, "inverse-sqrt") == pytest.approx(0.3 * math.sqrt(10 / 11))


def test_a_longer_run_does_not_change_the_inverse_square_root_of_the_same_warmup() -> None:
    short = [learning_rate_at(step, 100, 1.0, 0.1, "inverse-sqrt") for step in range(100)]
    long = [learning_rate_at(step, 1000, 1.0, 0.01, "inverse-sqrt") for step in range(100)]
    assert short == long


def test_a_run_follows_the_decay_that_its_recipe_names(tmp_path: Path) -> None:
    rates: list[float] = []
    reporter = SilentReporter(on_step=lambda metrics: rates.append(metrics.learning_rate))
    extend(make_job(tmp_path).recipe("train.decay=inverse-sqrt"), reporter, last_stage="train")
    assert rates == pytest.approx([0.01 / math.sqrt(n) for n in (1, 2, 3, 4)])
