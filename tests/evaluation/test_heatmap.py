"""The heatmap: what is where, what stands between the columns, the same bytes every time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import matplotlib
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from ctxext.evaluation.arms import Arm, ArmName
from ctxext.evaluation.cells import NOT_ASKED, CellCount, cell_counts, length_label
from ctxext.evaluation.heatmap import COLOR_MAP, boundary_slot, draw_boundaries, heatmap, ink_on
from ctxext.evaluation.store import SampleResult

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def sample(length: int, depth: float, index: int = 0, score: float = 1.0, status: str = "ok") -> SampleResult:
    place = f"{length}/{depth}/{index}"
    return SampleResult(
        f"needle/{place}", "needle", length, depth, index, status, 1, f"h{place}", f"p{place}", "key", "1", score=score
    )


def arm(samples: list[SampleResult], name: ArmName = "base", recorded: bool = False, label: str = "an arm") -> Arm:
    return Arm(name, label, recorded, samples, {})


GRID = [sample(length, depth) for length in (2048, 4096, 12288) for depth in (0.1, 0.5, 0.9)]


def draw(*arms: Arm) -> tuple[bytes, bytes]:
    picture = heatmap(arms, original_length=8192, target_length=16384)
    return picture.png, picture.svg


def test_cells_count_right_scored_and_missing_samples() -> None:
    samples = [sample(64, 0.5, 0), sample(64, 0.5, 1, score=0.0), sample(64, 0.5, 2, status="out_of_memory")]
    counts = cell_counts(arm([*samples, sample(128, 0.5, 0, status="out_of_memory")]))
    numbers = {place: (c.num_right, c.num_scored, c.num_missing) for place, c in counts.items()}
    assert numbers == {(64, 0.5): (1, 2, 1), (128, 0.5): (0, 0, 1)}
    assert [counts[64, 0.5].text(), counts[128, 0.5].text()] == ["1/2\n+1 missing", "out of memory\n(1)"]
    assert "1 of 2 right" in counts[64, 0.5].facts()
    assert "1 missing (out of memory)" in counts[64, 0.5].facts()
    assert counts[128, 0.5].facts() == "no score: 1 out of memory"
    assert CellCount(3, 4, 0).text() == "3/4"
    assert (NOT_ASKED.text(), NOT_ASKED.facts()) == ("", "not asked")


def test_parts_of_an_answer_are_a_mean_and_degenerate_answers_a_mark() -> None:
    babble = replace(sample(64, 0.5, 0, score=0.0), degenerate="repeating")
    (cell,) = cell_counts(arm([babble, sample(64, 0.5, 1, score=0.5)])).values()
    assert cell.text() == "0.25\n†1"
    assert cell.value == 0.25
    assert "mean score 0.25" in cell.facts()
    assert "1 degenerate" in cell.facts()
    assert "†: answers empty, repeating or endless".encode() in draw(arm([babble]))[1]
    assert "†".encode() not in draw(arm(GRID))[1]


def test_tasks_are_rows_when_asked_for() -> None:
    arms = [arm([sample(2048, 0.5), replace(sample(2048, 0.5), task="no_needle"), replace(GRID[0], task="vt")])]
    drawn = heatmap(arms, original_length=2048, target_length=4096, over="task")
    assert (
        drawn.svg.index(b"<!-- needle -->") < drawn.svg.index(b"<!-- vt -->") < drawn.svg.index(b"<!-- no_needle -->")
    )


def test_repeated_noise_is_called_saliency() -> None:
    noise = replace(arm(GRID), run={"identity": {"haystack": "noise"}})
    assert b"repeated noise: saliency, not retrieval" in draw(noise)[1]
    assert b"9 samples in one text" in draw(noise)[1]
    mixed = {
        "identity": {"haystack": "python-docs", "tasks": {"needle": {"task": "needle"}, "n": {"haystack": "noise"}}}
    }
    some = replace(arm([*GRID, replace(GRID[0], task="n")]), run=mixed)
    assert b"saliency, not retrieval in 1 of 2 tasks" in draw(some)[1]
    assert b"saliency" not in draw(arm(GRID))[1]


@pytest.mark.parametrize(
    ("length", "slot"), [(100, -0.5), (2048, 0.5), (3000, 0.5), (4096, 1.5), (8192, 1.5), (12288, 2.5), (99999, 2.5)]
)
def test_a_boundary_stands_right_of_every_column_that_is_not_longer(length: int, slot: float) -> None:
    assert boundary_slot(length, [2048, 4096, 12288]) == slot


@pytest.mark.parametrize(
    ("tokens", "label"),
    [(128, "128"), (1000, "1,000"), (2048, "2K"), (12288, "12K"), (14848, "14.5K"), (131072, "128K"), (1 << 20, "1M")],
)
def test_lengths_are_labelled_for_people(tokens: int, label: str) -> None:
    assert length_label(tokens) == label


@pytest.mark.parametrize(
    ("original", "target"), [(8192, 16384), (4096, 12288), (2048, 4096), (65536, 131072), (64, 128)]
)
def test_boundary_labels_never_touch(original: int, target: int) -> None:
    figure = Figure(figsize=(3.5, 3.0))
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_xlim(-0.5, 2.5)
    draw_boundaries(axis, [2048, 4096, 12288], original, target)
    canvas.draw()
    boxes = [text.get_window_extent() for text in axis.texts if isinstance(text, Annotation)]
    assert len(boxes) == 2
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))
    assert min(box.y0 for box in boxes) >= axis.get_window_extent().y1


def test_two_drawings_are_identical_and_leave_global_settings_alone() -> None:
    first = draw(arm(GRID))
    before = matplotlib.rcParams["font.size"]
    try:
        matplotlib.rcParams["font.size"] = 23.0
        assert draw(arm(GRID)) == first
        assert matplotlib.rcParams["font.size"] == 23.0
    finally:
        matplotlib.rcParams["font.size"] = before
    assert first[0].startswith(PNG_MAGIC)
    assert first[1].startswith(b"<?xml")


def test_cells_without_a_score_are_hatched_and_others_are_not() -> None:
    assert b"<pattern" not in draw(arm(GRID))[1]
    missing = [*GRID[:-1], sample(12288, 0.9, status="out_of_memory")]
    assert b"<pattern" in draw(arm(missing))[1]
    assert b"<pattern" in draw(arm(GRID[:-1]))[1]


def test_a_recorded_arm_is_marked() -> None:
    # Glyphs are paths in the SVG; matplotlib repeats the text in a comment.
    assert b"recorded on another machine" not in draw(arm(GRID))[1]
    assert b"recorded on another machine" in draw(arm(GRID, recorded=True))[1]


def test_side_by_side_has_one_colour_bar_and_every_arm() -> None:
    arms = [arm(GRID, "base"), arm(GRID, "extended"), arm(GRID, "control", recorded=True)]
    svg = draw(*arms)[1]
    assert svg.count(b"<!-- share of right answers -->") == 1
    assert svg.count(b"9 samples, 9 haystacks") == 3


def test_labels_are_drawn_as_they_are() -> None:
    # Two dollar signs are a formula to matplotlib, and this one does not parse.
    assert b"$\\bad$" in draw(arm(GRID, label="$\\bad$"))[1]


def test_an_arm_without_samples_is_drawn_empty_and_no_arm_is_refused() -> None:
    assert draw(arm([]))[0].startswith(PNG_MAGIC)
    with pytest.raises(ValueError, match="no arms"):
        draw()


def test_text_stands_out_on_every_colour_of_the_scale() -> None:
    def luminance(color: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ratios = []
    for step in range(101):
        color = colormaps[COLOR_MAP](step / 100)
        ink = 1.0 if ink_on(color) == "white" else 0.0
        high, low = max(ink, luminance(color)), min(ink, luminance(color))
        ratios.append((high + 0.05) / (low + 0.05))
    assert min(ratios) >= 4.5, f"covered {len(ratios)} colours"
