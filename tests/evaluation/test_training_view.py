"""What a report says about a training follows from its lines alone, says how spikes ended, and leaves nothing out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import ARMS, FACTS

from ctxext.evaluation.report import write_report
from ctxext.evaluation.training_view import TrainingRecord, TrainingView, training_view


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": number,
        "steps": 10,
        "loss": 3.0 - 0.1 * number,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "num_tokens": 100,
        "tokens_per_second": 50.0 + number,
        "seconds": 2.0,
        **changes,
    }


def look(number: int, bits: float, far: float | None) -> dict[str, Any]:
    return {
        "step": number,
        "layers": [0, 1],
        "entropy_bits": [[bits, bits + 1], [bits, bits + 2]],
        "mean_entropy_bits": bits + 0.75,
        "num_collapsed": number,
        "num_uniform": 0,
        "beyond_original_tokens": 64,
        "beyond_original_by_layer": [far, None],
        **({} if far is None else {"beyond_original_share": far}),
    }


SPIKES = [
    {"step": 3, "event": "spike", "height": 1.5, "detail": "cause one"},
    {"step": 5, "event": "recovered", "spike_step": 3, "height": 1.75, "after_steps": 2},
    {"step": 6, "event": "spike", "height": 1.0, "detail": "cause two"},
    {"step": 7, "event": "not-recovered", "spike_step": 6, "height": 1.25, "warning": "told as a spike"},
    {"step": 9, "event": "spike", "height": 0.5, "detail": "cause <three>"},
]
RECORD = TrainingRecord(
    steps=[step(number) for number in range(1, 11)],
    monitors={
        "spikes": SPIKES,
        "throughput": [
            {"step": n, "utilization": 0.1 * n, "peak_bytes": n * 2**30, "speed_source": "data sheet"}
            for n in (1, 2, 3)
        ],
        "attention": [look(1, 3.0, 0.25), look(10, 2.0, 0.5) | {"warning": "heads collapse"}],
        "evaluation": [
            {"step": 5, "beyond_original": 0.5, "num_beyond": 6, "short_loss": 2.5, "best_step": 5},
            {"step": 10, "beyond_original": 0.25, "num_beyond": 6, "short_loss": None, "best_step": 5},
        ],
        "router_load": [{"step": 1, "largest_share": 0.25}, {"step": 10, "largest_share": 0.5}],
    },
    checkpoint={"step": 5, "last_step": 10, "reason": "needles <0.50>"},
)


def view_of(record: TrainingRecord = RECORD) -> TrainingView:
    found = training_view(record)
    assert found is not None
    return found


def test_the_facts_are_those_of_the_lines() -> None:
    facts = dict(view_of().facts)
    assert facts == {
        "steps": "10",
        "target tokens": "1,000",
        "loss, first and last tenth": "2.900 → 2.000",
        "tokens a second, median": "56",
        "weights kept": "those of step 5 of 10: needles <0.50>",
        "model FLOPs utilisation, median": "20.0% of the data sheet",
        "memory peak": "3.00 GiB",
        "mean attention entropy, first and last look": "3.75 → 2.75 bits (healthy models: 2 to 4)",
        "heads of 4 near 0 bits, near log2(n)": "1 → 10, 0 → 0",
        "attention beyond 64 tokens": "25.0% → 50.0%",
    }


def test_every_spike_says_its_highest_point_and_what_became_of_it() -> None:
    rows = [(row.step, row.height, row.cause, row.outcome) for row in view_of().spikes]
    assert rows == [
        (3, 1.75, "cause one", "back after 2 steps"),
        (6, 1.25, "cause two", "not back within 200 steps"),
        (9, 0.5, "cause <three>", "not yet back at the end"),
    ]


def test_warnings_and_monitors_without_a_place_of_their_own_are_shown() -> None:
    view = view_of()
    assert view.warnings == ["Step 10: heads collapse."]
    assert view.others == [("router_load", "largest share", "0.25", "0.5")]


def test_skipped_steps_are_named_and_their_missing_losses_count_nowhere() -> None:
    steps = [*RECORD.steps[:4], step(5, loss=None, grad_norm=None, skipped="loss"), *RECORD.steps[5:]]
    facts = dict(view_of(replace(RECORD, steps=steps)).facts)
    assert facts["skipped steps (not finite)"] == "5"
    assert facts["loss, first and last tenth"] == "2.900 → 2.000"


def test_the_same_lines_give_the_same_pictures() -> None:
    first, second = view_of().pictures, view_of().pictures
    assert list(first) == ["training_curves", "attention_entropy", "long_range_share"]
    assert first == second
    near = replace(RECORD, monitors={**RECORD.monitors, "attention": [look(1, 3.0, None)]})
    assert list(view_of(near).pictures) == ["training_curves", "attention_entropy"]
    assert list(view_of(replace(RECORD, monitors={})).pictures) == ["training_curves"]


def test_without_a_step_there_is_nothing_to_say() -> None:
    assert training_view(TrainingRecord([], {})) is None


@pytest.mark.parametrize("trained", [True, False])
def test_the_page_has_the_section_where_there_was_a_training(trained: bool, tmp_path: Path) -> None:
    (tmp_path / "long_range_share.png").write_bytes(b"of an earlier report")
    page = write_report(tmp_path, FACTS, ARMS, training=RECORD if trained else None).read_text()
    assert ('<h2 id="training">' in page) is trained
    for text in ("cause &lt;three&gt;", "needles &lt;0.50&gt;", "Step 10: heads collapse.", "largest share"):
        assert (text in page) is trained, text
    for name in ("training_curves", "attention_entropy", "long_range_share"):
        assert (tmp_path / f"{name}.svg").is_file() is trained
        assert (tmp_path / f"{name}.png").is_file() is trained
