"""The curves: which prompts count, what a point is, the same bytes every time."""

from __future__ import annotations

import pytest
from known_answers import arm as known_arm
from known_answers import grid, hole, oracle

from ctxext.evaluation.arms import Arm, ArmName
from ctxext.evaluation.cells import cell_counts, position_rows
from ctxext.evaluation.curves import (
    _line_style,
    accuracy_by_depth,
    accuracy_by_length,
    common_prompts,
    comparable_panels,
    loss_by_position,
    loss_curve,
    perplexity_by_position,
)
from ctxext.evaluation.heatmap import heatmap
from ctxext.evaluation.store import SampleResult

LENGTHS = {"original_length": 8, "target_length": 16}


def sample(length: int, index: int, losses: list[float], status: str = "ok", prompt: str = "") -> SampleResult:
    return SampleResult(
        sample_id=f"needle/{length}/0.5000/{index}",
        task="needle",
        length_tokens=length,
        depth=0.5,
        index=index,
        status=status,
        needle_position=1,
        haystack_sha256=f"h{length}-{index}",
        prompt_sha256=f"{prompt}{length}-{index}",
        key="key",
        expected="1",
        score=float(index == 0),
        loss_blocks=losses,
        loss_block_tokens=4,
    )


def arm(name: ArmName, recorded: bool = False, prompt: str = "") -> Arm:
    samples = [
        sample(8, 0, [3.0, 2.0], prompt=prompt),
        sample(8, 1, [3.0, 2.0], prompt=prompt),
        sample(12, 0, [3, 2, 1], prompt=prompt),
    ]
    return Arm(name, f"label of {name}", recorded, samples, {})


def test_a_point_averages_the_samples_that_reach_its_block() -> None:
    assert loss_curve([sample(8, 0, [1.0, 2.0]), sample(12, 0, [3.0, 4.0, 5.0])]) == [
        (2.0, 2.0),
        (6.0, 3.0),
        (10.0, 5.0),
    ]


def test_a_part_of_a_block_weighs_less() -> None:
    # The last block of 9 positions holds one prediction, that of 12 positions four.
    points = loss_curve([sample(9, 0, [1.0, 1.0, 6.0]), sample(12, 0, [1.0, 1.0, 1.0])])
    assert points[-1] == (10.0, pytest.approx((6.0 + 4 * 1.0) / 5))


def test_only_prompts_scored_in_every_arm_are_compared() -> None:
    first, second = arm("base"), arm("extended")
    second.samples[2] = sample(12, 0, [], status="out_of_memory")
    assert common_prompts([first, second]) == {"8-0", "8-1"}
    assert common_prompts([]) == set()


def test_live_and_recorded_arms_share_a_panel_only_when_one_has_nothing_of_its_own_to_compare() -> None:
    live = [arm("base"), arm("extended")]
    control = arm("control", recorded=True)
    assert comparable_panels([*live, control]) == [[*live, control]]
    assert comparable_panels([*live, arm("control", True, prompt="other")])[0] == live
    recorded = [control, arm("extended", recorded=True)]
    assert comparable_panels([*live, *recorded]) == [live, recorded]


@pytest.mark.parametrize("draw", [loss_by_position, accuracy_by_length])
def test_two_drawings_are_identical_and_name_every_arm(draw: object) -> None:
    assert callable(draw)
    arms = [arm("base"), arm("untrained"), arm("extended"), arm("control", recorded=True)]
    first, second = draw(arms, **LENGTHS), draw(arms, **LENGTHS)
    assert first == second
    assert first.png.startswith(b"\x89PNG")
    assert first.svg.startswith(b"<?xml")
    for name in ("base: label of base", "extended: label of extended", "control: label of control (recorded)"):
        assert name.encode() in first.svg
    assert b"original 8" in first.svg
    assert b"target 16" in first.svg


def test_the_number_of_common_prompts_is_drawn() -> None:
    assert b"3 common prompts" in loss_by_position([arm("base"), arm("extended")], **LENGTHS).svg
    apart = [arm("base"), arm("extended", prompt="other")]
    assert b"no prompt with losses in common" in loss_by_position(apart, **LENGTHS).svg


def test_a_far_target_does_not_squash_the_curve() -> None:
    assert "target 1K →".encode() in loss_by_position([arm("base")], original_length=8, target_length=1024).svg


def test_depths_are_drawn_beyond_the_original_length_unless_asked_otherwise() -> None:
    arms = [known_arm("base", grid(hole)), known_arm("extended", grid(oracle))]
    drawn = accuracy_by_depth(arms, original_length=1024)
    assert drawn == accuracy_by_depth(arms, original_length=1024)
    assert b"at 2K to 4K tokens; 95% intervals" in drawn.svg
    assert b"depth of the needle" in drawn.svg
    assert b"at 1K tokens" in accuracy_by_depth(arms, original_length=1024, lengths=[1024]).svg
    assert b"at 1K to 4K tokens" in accuracy_by_depth(arms, original_length=8192).svg
    assert b"no samples" in accuracy_by_depth([Arm("base", "nothing", False, [], {})], original_length=8).svg
    with pytest.raises(ValueError, match="no arms"):
        accuracy_by_depth([], original_length=8)


def test_arms_of_one_name_get_lines_of_their_own() -> None:
    first, second = known_arm("base", grid(hole)), known_arm("base", grid(oracle))
    styles = [_line_style(arm, [first, second]) for arm in (first, second)]
    assert styles[0] != styles[1]
    assert _line_style(first, [first]) == _line_style(first, [first, known_arm("extended", [])])


def test_an_arm_of_a_new_name_takes_a_line_that_no_other_has() -> None:
    arms = [known_arm(name, []) for name in ("base", "control", "text-alone", "linear", "extended")]
    styles = [_line_style(arm, arms) for arm in arms]
    assert len(set(styles)) == len(arms)
    assert styles[0] == _line_style(arms[0], arms[:1])


def test_perplexity_is_drawn_with_the_border_of_its_window() -> None:
    blocks = [{"start": start, "end": start + 512, "loss": 2.0, "num_tokens": 512} for start in (0, 512, 1024)]
    results = {"base": {"kind": "sliding-window", "window_tokens": 512, "stride_tokens": 256, "blocks": blocks}}
    arms = [known_arm("base", []), known_arm("extended", [])]
    drawn = perplexity_by_position(arms, results, original_length=1024, target_length=2048)
    assert b"window 512" in drawn.svg
    assert b"original 1K" in drawn.svg
    assert b"label of base" in drawn.svg
    assert b"label of extended" not in drawn.svg  # nothing was measured of it
    with pytest.raises(ValueError, match="no arms"):
        perplexity_by_position(arms, {}, original_length=1024, target_length=2048)


def test_how_far_was_tested_stands_below_every_curve() -> None:
    arms = [known_arm("base", grid(hole))]
    note = "Tested up to 4,096 tokens; nothing is claimed"
    for drawn in (
        loss_by_position(arms, original_length=1024, target_length=8192, footnote=note),
        accuracy_by_length(arms, original_length=1024, target_length=8192, footnote=note),
        accuracy_by_depth(arms, original_length=1024, footnote=note),
        heatmap(arms, original_length=1024, target_length=8192, footnote=note),
    ):
        assert note.encode() in drawn.svg


def test_positions_are_rows_of_equal_height_and_needles_fall_into_theirs() -> None:
    assert position_rows(4096) == [256.0 * number for number in range(16)]
    assert position_rows(12288)[1] == 1024.0
    assert position_rows(0) == [0.0]
    counts = cell_counts(known_arm("base", grid(hole, [4096])), "position", 256)
    assert (counts[4096, 2048.0].num_right, counts[4096, 2048.0].num_scored) == (0, 5)
    assert (counts[4096, 1024.0].num_right, counts[4096, 1024.0].num_scored) == (5, 5)
    assert sum(count.num_scored for count in counts.values()) == 25
    drawn = heatmap([known_arm("base", grid(hole))], original_length=1024, target_length=4096, over="position")
    assert b"position of the needle (token index)" in drawn.svg
    assert b"from 3,840" in drawn.svg


@pytest.mark.parametrize("draw", [loss_by_position, accuracy_by_length])
def test_an_empty_arm_is_drawn_and_no_arm_is_refused(draw: object) -> None:
    assert callable(draw)
    assert draw([Arm("base", "nothing", False, [], {})], **LENGTHS).png.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no arms"):
        draw([], **LENGTHS)
