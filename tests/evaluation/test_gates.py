"""Gates: met, not met, not judgeable; and what short prompts cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
from known_answers import arm, blind, grid, limited, oracle, tail_blind
from pydantic import ValidationError

from ctxext.errors import GateError, exit_code_of
from ctxext.evaluation.conclusions import Arm
from ctxext.evaluation.gates import GateOutcome, check_gates, gate_error
from ctxext.evaluation.short_context import short_context_cost
from ctxext.recipe.gates import GatesBlock

ORIGINAL = 1024


def outcome(arms: list[Arm], **gates: Any) -> GateOutcome:
    (found,) = check_gates(GatesBlock(**gates), arms, original_length=ORIGINAL)
    return found


inside_only = limited(ORIGINAL)


def arms(extended: Any = oracle, base: Any = inside_only, loss: float = 2.0, **options: Any) -> list[Arm]:
    return [arm("base", grid(base, **options)), arm("extended", grid(extended, loss=loss, **options))]


@pytest.mark.parametrize(
    ("by", "asked", "met"),
    [("estimate", 0.0, True), ("bound", 0.0, False), ("bound", -0.3, True), ("bound", -0.2, False)],
)
def test_the_tail_is_judged_by_its_lower_end_unless_asked_otherwise(by: str, asked: float, met: bool) -> None:
    found = outcome(arms(shared=True, per_cell=10), tail=asked, by=by)
    assert found.met is met
    assert f"at least {asked:+.2f} was asked" in found.sentence


def test_a_tail_blind_model_fails_the_tail_gate() -> None:
    assert not outcome(arms(tail_blind, shared=True, per_cell=10), tail=-0.5, by="estimate").met


def test_the_effective_length_gate_names_what_was_not_tested() -> None:
    assert outcome(arms(), effective_length=4096).met
    untested = outcome(arms(), effective_length=8192)
    assert not untested.met
    assert "nothing longer was tested" in untested.detail
    limit = outcome(arms(limited(2048)), effective_length=4096)
    assert not limit.met
    assert "2,048 tokens (4,096 fails)" in limit.detail
    assert not outcome(arms(per_cell=4), effective_length=4096).met  # 20 samples a length: no lower bound
    assert outcome(arms(per_cell=4), effective_length=4096, by="estimate").met


def test_room_for_the_answer_belongs_to_the_length() -> None:
    samples = [arm("extended", grid(oracle, [4080]))]
    gates = GatesBlock(effective_length=4096)
    assert not check_gates(gates, samples, original_length=ORIGINAL)[0].met
    assert check_gates(gates, samples, original_length=ORIGINAL, answer_tokens=16)[0].met


def test_better_than_looks_beyond_the_original_length_only() -> None:
    assert outcome(arms(), better_than="base").met
    inside = [arm("base", grid(blind, [1024])), arm("extended", grid(oracle, [1024]))]
    assert "no common scored prompt beyond 1,024" in outcome(inside, better_than="base").detail
    assert not outcome(arms(base=oracle), better_than="base").met
    assert "not evaluated in this run" in outcome(arms(), better_than="control").detail
    # Two haystacks a length, however many prompts, decide nothing.
    assert not outcome(arms(base=blind, per_cell=2, shared=True), better_than="base").met


def test_recorded_arms_do_not_stand_in_for_this_run() -> None:
    recorded = [arm("base", grid(blind), recorded=True), arm("extended", grid(oracle))]
    assert not outcome(recorded, better_than="base").met
    assert not outcome([arm("extended", grid(oracle), recorded=True)], effective_length=1024).met


def test_the_short_context_cost_is_the_upper_bound_of_the_perplexity() -> None:
    base, extended = arms(loss=2.01)
    cost = short_context_cost(extended, base, original_length=ORIGINAL)
    assert cost is not None
    assert (cost.length_tokens, cost.difference.num_pairs) == (1024, 25)
    assert cost.perplexity_increase == pytest.approx(math.expm1(0.01))
    assert cost.loss_bound == pytest.approx(0.005)
    assert outcome([base, extended], short_context_cost=0.011).met
    assert not outcome([base, extended], short_context_cost=0.009).met


def test_noisy_or_single_prompts_have_a_worse_bound_than_their_mean() -> None:
    base = arm("base", grid(oracle, [512], depths=[0.5], per_cell=3))
    noisy = grid(oracle, [512], depths=[0.5], per_cell=3)
    for sample, loss in zip(noisy, (1.9, 2.0, 2.1), strict=True):
        sample.loss_blocks[:] = [loss] * 4
    cost = short_context_cost(arm("extended", noisy), base, original_length=ORIGINAL)
    assert cost is not None
    assert cost.difference.mean == pytest.approx(0.0)
    assert cost.perplexity_bound == pytest.approx(math.expm1(4.302653 * 0.1 / math.sqrt(3)), rel=1e-6)
    single = arms(per_cell=1, depths=[0.5], lengths=[512])
    assert "one prompt has no upper bound" in outcome(single, short_context_cost=0.5).detail
    assert outcome(single, short_context_cost=0.5, by="estimate").met


def test_prompts_of_one_haystack_are_one_observation_of_the_cost() -> None:
    base, extended = arms(loss=2.01, shared=True, per_cell=3)
    cost = short_context_cost(extended, base, original_length=ORIGINAL)
    assert cost is not None
    assert (cost.difference.num_pairs, cost.difference.num_clusters) == (15, 3)
    assert "15 prompts of 3 haystacks" in cost.text()


def test_nothing_to_judge_is_not_met() -> None:
    for gates in ({"tail": -1.0}, {"effective_length": 1}, {"short_context_cost": 9.0}, {"better_than": "base"}):
        assert not outcome([], **gates).met


def test_failed_gates_become_one_error_of_exit_code_6() -> None:
    gates = GatesBlock(tail=-1.0, effective_length=8192, better_than="base")
    outcomes = check_gates(gates, arms(), original_length=ORIGINAL)
    assert [found.met for found in outcomes] == [True, False, True]
    error = gate_error(outcomes)
    assert isinstance(error, GateError)
    assert exit_code_of(error) == 6
    assert "1 evaluation gate of 3 not met (effective_length: " in str(error)
    assert gate_error(outcomes[:1]) is None


def test_the_block_is_strict() -> None:
    for wrong in ({}, {"tail": 2.0}, {"tial": 0.0}, {"effective_length": 0}, {"tail": 0.0, "by": "luck"}):
        with pytest.raises(ValidationError):
            GatesBlock(**wrong)


def test_right_answers_without_a_needle_pass_no_gate() -> None:
    controls = grid(oracle, [4096], task="no_needle")
    base, extended = arm("base", grid(inside_only)), arm("extended", [*grid(inside_only), *controls])
    base.samples.extend(grid(blind, [4096], task="no_needle"))
    assert not outcome([base, extended], better_than="base").met
