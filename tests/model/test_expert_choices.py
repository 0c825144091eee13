"""A pass with another model's choices of experts is continuous in the weights; which choices were its own is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rope.tiny_families import build, tiny_family_config
from torch import Tensor

from ctxext.model.expert_choices import Choice, ChoiceRecorder, choices_recorded, compare_choices

IDS = (torch.arange(48) * 37 + 5)[None] % 250
# One of every way to choose: a softmax, logits, groups first, a bias, weights normalised or not.
FAMILIES = (
    "olmoe",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "granitemoe",
    "jetmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
)


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return build(tiny_family_config(family, vocab_size=260)).eval()


def answer(model: Any, repeated: list[Choice] | None = None) -> tuple[Tensor, list[Choice]]:
    with torch.inference_mode(), choices_recorded(model, repeated or ()) as choices:
        logits = model(input_ids=IDS, use_cache=False).logits
    return logits, choices


@pytest.mark.parametrize("family", [*FAMILIES, "phimoe"])
def test_a_models_own_choices_are_recorded_and_repeating_them_changes_no_bit(family: str) -> None:
    model = model_of(family)
    with torch.inference_mode():
        expected = model(input_ids=IDS, use_cache=False).logits
    recorded, choices = answer(model)
    again, same = answer(model, choices)
    assert torch.equal(recorded, expected)
    assert torch.equal(again, expected)
    found = compare_choices(same, choices)
    assert found is not None
    assert (found.num_others, found.largest_score) == (0, 0.0)
    assert found.num_choices % 48 == 0
    assert found.num_choices > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_of_another_take_effect_and_count_as_others(family: str) -> None:
    model = model_of(family)
    expected, choices = answer(model)
    # The last layer's first token goes to the experts with the lowest scores instead.
    last = choices[-1]
    lowest = last.indices.clone()
    lowest[0] = last.scores[0].topk(lowest.shape[-1], largest=False).indices
    logits, own = answer(model, [*choices[:-1], Choice(last.scores, lowest)])
    changed = (logits != expected)[0].any(dim=-1)
    assert changed.tolist() == [True] + [False] * 47
    found = compare_choices(own, choices)
    assert found is not None
    assert found.num_others == 0  # what it would have chosen itself is as before
    replaced = compare_choices(own, [*choices[:-1], Choice(last.scores, lowest)])
    assert replaced is not None
    assert replaced.num_others == 1


@pytest.mark.parametrize("dim", [-1, 0])
def test_repeated_choices_come_with_their_own_scores(dim: int) -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.0, 0.3], [0.6, 0.7, 0.9]])
    wanted = torch.tensor([[0, 1], [1, 2], [2, 0]]) if dim else torch.tensor([[0, 1, 2], [1, 2, 0]])
    with ChoiceRecorder([Choice(scores, wanted)]) as recorder:
        values, indices = scores.topk(2, dim=dim)
    assert torch.equal(indices, wanted)
    assert torch.equal(values, scores.gather(dim, wanted))
    assert torch.equal(recorder.choices[0].indices, scores.topk(2, dim=dim).indices)


def test_a_router_that_cuts_experts_off_at_a_threshold_is_repeated_whole() -> None:
    """PhiMoE: without that, weights rounded to bfloat16 give logits that are 0.26 of the largest apart."""
    torch.manual_seed(0)
    model = model_of("phimoe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0.0
    expected, choices = answer(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    free, _ = answer(model)
    logits, own = answer(model, choices)
    found = compare_choices(own, choices)
    assert found is not None
    assert found.num_choices == 2 * 48
    assert found.largest_score < 0.02
    limit = 0.02 * float(expected.abs().max())
    assert float((free - expected).abs().max()) > limit > float((logits - expected).abs().max())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_other_scores_are_seen_and_choices_from_other_things_never_pass() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.3, float("-inf"), 0.7]])
    mine = Choice(scores, torch.tensor([[1], [2]]))
    found = compare_choices([Choice(scores - 0.07, mine.indices)], [mine])
    assert found is not None
    assert found.largest_score == pytest.approx(0.1)
    for other in (
        [],
        [mine, mine],
        [Choice(scores[:, :2], mine.indices)],
        [Choice(scores, torch.tensor([[1, 2], [2, 0]]))],
        [Choice(scores.masked_fill(scores == 0.3, float("-inf")), mine.indices)],
        [Choice(scores.masked_fill(scores == 0.3, float("nan")), mine.indices)],
    ):
        found = compare_choices(other, [mine])
        assert found is not None
        assert found.largest_score == float("inf")
    assert compare_choices([], []) is None
