"""What may be concluded from arms, on hand-made outcomes with known counts and p values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from known_answers import arm as known_arm
from known_answers import grid, limited, oracle, tail_blind

from ctxext.evaluation.conclusions import (
    LOSS_MARGIN_NATS,
    Arm,
    ArmName,
    Statement,
    block_spans,
    coverage_sentence,
    draw_conclusions,
    mean_loss,
    table_rows,
)
from ctxext.evaluation.effective_length import RULER_TASKS
from ctxext.evaluation.store import SampleResult

ORIGINAL, TARGET = 1024, 4096


def sample(
    length: int,
    index: int,
    right: bool = True,
    *,
    status: str = "ok",
    loss: float = 2.0,
    haystack: str | None = None,
    degenerate: str | None = None,
) -> SampleResult:
    return SampleResult(
        sample_id=f"needle/{length}/0.5000/{index}",
        task="needle",
        length_tokens=length,
        depth=0.5,
        index=index,
        status=status,
        needle_position=length // 2,
        haystack_sha256=haystack or f"haystack-{length}-{index}",
        prompt_sha256=f"prompt-{length}-{index}",
        key="amber-fox",
        expected="1234567",
        score=float(right),
        degenerate=degenerate,
        loss_blocks=[loss] * (length // 256),
        loss_block_tokens=256,
    )


def arm(name: ArmName, outcomes: dict[int, str], *, recorded: bool = False, losses: tuple[float, ...] = ()) -> Arm:
    """An arm from strings: '1' right, '0' wrong, 'x' out of memory; `losses` of the shortest length's prompts."""
    samples = []
    for length, marks in outcomes.items():
        for index, mark in enumerate(marks):
            loss = losses[index] if losses and length == min(outcomes) else 2.0
            samples.append(
                sample(length, index, mark == "1", status="ok" if mark != "x" else "out_of_memory", loss=loss)
            )
    return Arm(name, f"label of {name}", recorded, samples, {})


def statements(arms: list[Arm], topic: str) -> list[Statement]:
    drawn = draw_conclusions(arms, original_length=ORIGINAL, target_length=TARGET)
    return [statement for statement in drawn if statement.topic == topic]


def test_six_one_sided_pairs_beyond_the_original_length_show_extension() -> None:
    extended, control = arm("extended", {4096: "111111111000"}), arm("control", {4096: "111000000000"})
    (claim,) = statements([control, extended], "extension")
    assert (claim.verdict, claim.headline) == ("shown", True)
    assert claim.numbers["mcnemar_p"] == pytest.approx(2 * 0.5**6)
    assert claim.numbers["num_pairs"] == claim.numbers["num_haystacks"] == 12
    for part in (
        "Context extension is shown",
        "9 of 12 (0.47-0.91)",
        "3 of 12 (0.09-0.53)",
        "6 only extended, 0 only control",
    ):
        assert part in claim.sentence
    assert "p = 0.0312" in claim.sentence
    assert "12 haystacks" in claim.sentence


def test_five_one_sided_pairs_do_not() -> None:
    (claim,) = statements([arm("control", {4096: "00000"}), arm("extended", {4096: "11111"})], "extension")
    assert claim.verdict == "not shown"
    assert "is not shown" in claim.sentence
    assert "p = 0.0625" in claim.sentence


def test_a_better_control_arm_is_named() -> None:
    (claim,) = statements([arm("control", {4096: "111111"}), arm("extended", {4096: "000000"})], "extension")
    assert claim.verdict == "worse"
    assert "the control arm is better" in claim.sentence


def test_a_prompt_of_exactly_the_original_length_is_inside() -> None:
    arms = [arm("control", {ORIGINAL: "0" * 9}), arm("extended", {ORIGINAL: "1" * 9})]
    (claim,) = statements(arms, "extension")
    assert claim.verdict == "no claim"
    (inside,) = statements(arms, "inside")
    assert inside.verdict == "shown"
    assert "not extension" in inside.sentence


def test_without_a_control_arm_no_claim_is_made_however_large_the_gain() -> None:
    arms = [arm("base", {4096: "0" * 20}), arm("extended", {4096: "1" * 20})]
    (claim,) = statements(arms, "extension")
    assert claim.verdict == "no claim"
    assert claim.sentence.startswith("No claim of context extension is made: no control arm")
    (change,) = statements(arms, "before_after")
    assert change.verdict == "shown"
    assert "no claim of extension" in change.sentence


def test_live_and_recorded_arms_are_never_paired_even_on_equal_prompts() -> None:
    live = [arm("base", {4096: "0000"}), arm("extended", {4096: "1111"})]
    recorded = [
        arm("base", {4096: "0" * 8}, recorded=True),
        arm("control", {4096: "0" * 8}, recorded=True),
        arm("extended", {4096: "11111100"}, recorded=True),
    ]
    (claim,) = statements(live + recorded, "extension")
    assert claim.recorded
    assert claim.sentence.startswith("Recorded on another machine: Context extension is shown")
    assert claim.numbers["extended"]["count"] == 6
    assert claim.numbers["num_pairs"] == 8
    yours, theirs = statements(live + recorded, "before_after")
    assert "Your run" in yours.sentence
    assert "p = 0.125" in yours.sentence
    assert "no claim of extension" in yours.sentence
    assert yours.headline
    assert not theirs.headline
    assert theirs.recorded


def test_a_recorded_control_arm_alone_supports_no_claim() -> None:
    arms = [arm("extended", {4096: "1" * 8}), arm("control", {4096: "0" * 8}, recorded=True)]
    (claim,) = statements(arms, "extension")
    assert claim.verdict == "no claim"
    assert "same origin" in claim.sentence


def test_prompts_without_a_score_in_both_arms_are_left_out_and_counted() -> None:
    (claim,) = statements([arm("control", {4096: "00x0"}), arm("extended", {4096: "1x11"})], "extension")
    assert claim.numbers["num_pairs"] == 2
    assert "2 prompts without a score in both left out" in claim.sentence


def test_shared_haystacks_are_called_dependent() -> None:
    pairs = [
        Arm(name, name, False, [sample(4096, i, right, haystack="one") for i in range(6)], {})
        for name, right in (("control", False), ("extended", True))
    ]
    (claim,) = statements(pairs, "extension")  # type: ignore[arg-type]
    assert "1 haystack for 6 prompts, which are therefore not independent" in claim.sentence
    assert (claim.verdict, claim.numbers["test"], claim.numbers["p_value"]) == ("not shown", "sign flip", 1.0)
    assert claim.numbers["mcnemar_p"] is None
    assert "a verdict needs 6" in claim.sentence


def test_six_haystacks_on_one_side_show_extension_although_their_prompts_are_dependent() -> None:
    pairs = [
        Arm(name, name, False, [sample(4096, i, right, haystack=f"hay {i % 6}") for i in range(12)], {})
        for name, right in (("control", False), ("extended", True))
    ]
    (claim,) = statements(pairs, "extension")  # type: ignore[arg-type]
    assert (claim.verdict, claim.numbers["p_value"]) == ("shown", pytest.approx(2 * 0.5**6))
    assert "12 of 12 in 6 clusters" in claim.sentence
    assert claim.numbers["extended"]["num_effective"] == 6.0


def test_inside_the_original_length_each_effect_is_reported_by_itself() -> None:
    arms = [arm("base", {512: "0" * 8}), arm("control", {512: "1" * 8}), arm("extended", {512: "1" * 8})]
    together, rewrite, retrieval = statements(arms, "inside")
    assert [s.verdict for s in (together, rewrite, retrieval)] == ["shown", "not shown", "shown"]
    assert "retrieval training alone (control better; not extension)" in retrieval.sentence
    assert "RoPE rewrite alone (no difference shown; not extension)" in rewrite.sentence
    assert "8 of 8 (0.68-1.00)" in retrieval.sentence
    assert "0 of 8 (0.00-0.32)" in retrieval.sentence


@pytest.mark.parametrize(
    ("differences", "verdict", "words"),
    [
        ((0.1, 0.2, 0.3), "not decided", "+0.200 nats (95% interval -0.048 to +0.448; +22.1% perplexity)"),
        ((0.010, 0.0, -0.010), "not worse", "not worse, within the margin of 0.05 nats"),
        ((0.20, 0.21, 0.22), "worse", "is not kept"),
        ((0.020, 0.021, 0.022), "worse", "worse, by less than the margin of 0.05 nats"),
        ((0.0,), "not decided", "unbounded to unbounded"),
    ],
)
def test_short_context_loss_is_judged_against_the_margin(
    differences: tuple[float, ...], verdict: str, words: str
) -> None:
    marks = "1" * len(differences)
    base = arm("base", {512: marks, 1024: "1"})
    extended = arm("extended", {512: marks, 1024: "1"}, losses=tuple(2.0 + d for d in differences))
    (loss,) = statements([base, extended], "short_loss")
    assert loss.verdict == verdict
    assert words in loss.sentence
    assert loss.numbers["margin_nats"] == LOSS_MARGIN_NATS
    assert loss.numbers["num_pairs"] == len(differences)


def test_degenerate_answers_are_counted_beyond_the_original_length_only() -> None:
    samples = [
        sample(512, 0, False, degenerate="empty"),
        sample(4096, 0, False, degenerate="repeating"),
        sample(4096, 1),
    ]
    (degenerate,) = statements([Arm("base", "base", False, samples, {})], "degenerate")
    assert "base 1 of 2" in degenerate.sentence


def test_an_unmeasured_stretch_up_to_the_target_is_admitted() -> None:
    assert "the longest scored prompt has 2,048" in statements([arm("base", {2048: "1"})], "coverage")[0].sentence
    assert not statements([arm("base", {4096: "1"})], "coverage")


def test_room_for_the_answer_belongs_to_the_measured_length() -> None:
    almost = [arm("base", {4080: "1"})]
    assert "nothing is claimed beyond it" in statements(almost, "coverage")[0].sentence
    drawn = draw_conclusions(almost, original_length=ORIGINAL, target_length=TARGET, answer_tokens=16)
    assert not [statement for statement in drawn if statement.topic == "coverage"]
    assert coverage_sentence(4080, TARGET, 16) is None
    assert coverage_sentence(2048, TARGET) == (
        "The longest prompt has 2,048 of the 4,096 tokens of the target length, so nothing is claimed beyond 2,048 "
        "tokens."
    )


def test_effective_length_and_tail_are_stated_for_every_arm() -> None:
    arms = [known_arm("base", grid(limited(1024))), known_arm("extended", grid(tail_blind, shared=True))]
    absolute, relative = statements(arms, "effective_length")
    assert "base 1,024 tokens (2,048 fails), by the lower 95% bound 1,024 tokens (2,048 fails)" in absolute.sentence
    assert "extended below 1,024 tokens (shortest tested)" in absolute.sentence
    assert absolute.numbers["arms"][0]["estimate_tokens"] == 1024
    assert "extended >= 4,096 tokens (longest tested)" in relative.sentence
    (tail,) = statements(arms, "tail")
    assert "extended -1.00" in tail.sentence
    assert [entry["num_pairs"] for entry in tail.numbers["arms"]] == [0, 5]


def test_prompts_of_several_tasks_are_said_to_be_pooled() -> None:
    arms = [
        known_arm(name, [*grid(answers, [4096]), *grid(answers, [4096], task="qa")])
        for name, answers in (("control", limited(1024)), ("extended", oracle))
    ]
    (claim,) = statements(arms, "extension")  # type: ignore[arg-type]
    assert "all tasks together (needle, qa)" in claim.sentence


def test_mean_loss_weighs_blocks_by_predicted_tokens() -> None:
    result = SampleResult(
        "s", "needle", 10, 0.5, 0, "ok", 5, "h", "p", "k", "v", loss_blocks=[1.0, 2.0, 3.0], loss_block_tokens=4
    )
    assert block_spans(result) == [(1, 4), (4, 8), (8, 10)]
    assert mean_loss(result) == pytest.approx((3 * 1 + 4 * 2 + 2 * 3) / 9)


def test_the_table_takes_the_loss_at_the_longest_length_that_all_arms_have() -> None:
    rows = table_rows(
        [arm("base", {512: "10", 2048: "0x"}), arm("extended", {2048: "1", 4096: "1"})], original_length=ORIGINAL
    )
    assert [row.loss_length_tokens for row in rows] == [2048, 2048]
    assert [row.num_missing for row in rows] == [1, 0]
    assert (rows[0].by_length[512].num_successes, rows[0].by_length[512].num_trials) == (1, 2)
    assert rows[1].mean_loss == pytest.approx(2.0)


def test_the_same_arm_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="given twice"):
        draw_conclusions([arm("base", {512: "1"})] * 2, original_length=ORIGINAL, target_length=TARGET)


def test_nothing_is_concluded_from_nothing() -> None:
    assert statements([], "extension") == []
    assert table_rows([], original_length=ORIGINAL) == []


def test_arms_of_any_name_are_judged_against_the_control_arm_and_adjusted_for_their_number() -> None:
    arms = [
        arm("base", {4096: "0" * 12}),
        arm("control", {4096: "000000000000"}),
        arm("extended", {4096: "111111000000"}),
        arm("text-alone", {4096: "100000000000"}),
        arm("linear", {4096: "000000000000"}),
    ]
    (claim,) = statements(arms, "extension")
    # Six one-sided pairs give p = 0.031, which is no longer enough among three comparisons.
    assert (claim.numbers["p_value"], claim.numbers["num_tests"]) == (pytest.approx(2 * 0.5**6), 3)
    assert claim.numbers["p_adjusted"] == pytest.approx(3 * 2 * 0.5**6)
    assert claim.verdict == "not shown"
    assert "p = 0.0312 (p = 0.0938 adjusted for 3 comparisons)" in claim.sentence
    gains = statements(arms, "gain")
    assert [g.numbers["first"] for g in gains] == ["text-alone", "linear"]
    assert "Beyond the original length, text-alone against the control arm (no difference shown)" in gains[0].sentence
    assert not any(g.headline for g in gains)
    assert not [g for g in gains if "Context extension" in g.sentence]
    # Beside a control arm only the extended arm has a before and after, which is adjusted for nothing.
    (change,) = statements(arms, "before_after")
    assert change.numbers["num_tests"] == 1


def test_without_a_control_arm_every_arm_has_a_before_and_after_and_no_claim() -> None:
    arms = [arm("base", {4096: "0" * 12}), arm("yarn", {4096: "1" * 12}), arm("linear", {4096: "0" * 11 + "1"})]
    (claim,) = statements(arms, "extension")
    assert claim.verdict == "no claim"
    assert "no control arm was run" in claim.sentence
    yarn, linear = statements(arms, "before_after")
    assert (yarn.verdict, linear.verdict) == ("shown", "not shown")
    assert yarn.numbers["num_tests"] == 2
    assert "Before and after (label of yarn)" in yarn.sentence
    assert all("no claim of extension" in s.sentence for s in (yarn, linear))
    assert statements([arm("base", {4096: "0"})], "extension") == []


def test_arms_that_were_asked_different_prompts_say_how_many_they_share() -> None:
    arms = [arm("control", {4096: "0000"}), arm("extended", {4096: "111111"})]
    (claim,) = statements(arms, "extension")
    assert "the two arms share 4 of 6 prompts" in claim.sentence
    assert (claim.numbers["num_shared"], claim.numbers["num_asked"], claim.numbers["num_left_out"]) == (4, 6, 0)
    (shared,) = statements(arms, "prompts")
    assert "4 of 6 are shared by all arms (control 4, extended 6)" in shared.sentence
    assert not statements([arm("control", {4096: "0x"}), arm("extended", {4096: "11"})], "prompts")
    apart = [arm("control", {2048: "00"}), arm("extended", {4096: "11"})]
    assert statements(apart, "extension")[0].verdict == "no claim"
    assert statements(apart, "prompts")[0].headline


def test_what_holds_no_needle_says_nothing_but_the_chance_level() -> None:
    """Right answers without a needle would lift the extended arm if they counted."""
    run = {"identity": {"tasks": {"chance": {"task": "no_needle"}}}}
    arms = []
    for name, mark in (("control", "0"), ("extended", "1")):
        controls = [replace(sample(4096, 20 + i, mark == "1"), task="chance") for i in range(9)]
        arms.append(replace(arm(name, {4096: "000000"}), run=run))
        arms[-1].samples.extend(controls)
    (claim,) = statements(arms, "extension")
    assert (claim.verdict, claim.numbers["num_pairs"]) == ("not shown", 6)
    (chance,) = statements(arms, "chance")
    assert "control 0 of 9" in chance.sentence
    assert "extended 9 of 9" in chance.sentence
    assert "right by chance, or the scoring is wrong" in chance.sentence
    assert table_rows(arms, original_length=ORIGINAL)[1].by_length[4096].num_trials == 6


def test_kinds_of_degenerate_answers_are_told_apart() -> None:
    kinds = ["empty", "endless", "endless", None]
    samples = [sample(4096, i, degenerate=kind) for i, kind in enumerate(kinds)]
    (degenerate,) = statements([Arm("base", "base", False, samples, {})], "degenerate")
    assert "base 3 of 4 (0.30-0.95): 2 endless, 1 empty" in degenerate.sentence


def test_a_base_model_that_fails_on_the_shortest_prompts_is_pointed_out() -> None:
    (found,) = statements([arm("base", {512: "1000", 4096: "0000"})], "shortest")
    assert "at 512 tokens the base model scores 0.25" in found.sentence
    assert not statements([arm("base", {512: "1111", 4096: "0000"})], "shortest")


def test_prompts_of_repeated_noise_count_one_by_one_and_are_called_saliency() -> None:
    """All have the one text: as clusters of a haystack they would be a single one, which could show nothing."""
    pairs = []
    for name, right in (("control", False), ("extended", True)):
        members = [sample(4096, i, right, haystack="the grass is green") for i in range(6)]
        noise = [replace(s, key=f"key {s.index}", facts={"haystack": "noise"}) for s in members]
        pairs.append(Arm(name, name, False, noise, {}))
    (claim,) = statements(pairs, "extension")
    assert (claim.verdict, claim.numbers["test"]) == ("shown", "McNemar")
    assert "the text is repeated noise, one for all prompts: saliency rather than retrieval" in claim.sentence
    one_needle = [replace(p, samples=[replace(s, key="key") for s in p.samples]) for p in pairs]
    assert statements(one_needle, "extension")[0].numbers["num_haystacks"] == 1


def test_thirteen_tasks_have_an_effective_length_and_twelve_have_none() -> None:
    samples = [s for task in RULER_TASKS for s in grid(limited(2048), [1024, 2048, 4096], task=task)]
    drawn = statements([known_arm("base", samples)], "effective_length")
    assert len(drawn) == 1
    assert "ctxext's prompts, not RULER's files" in drawn[0].sentence
    assert "base 2,048 tokens (4,096 fails)" in drawn[0].sentence
    fewer = [s for s in samples if s.task != RULER_TASKS[0]]
    assert not statements([known_arm("base", fewer)], "effective_length")
