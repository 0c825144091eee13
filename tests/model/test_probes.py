"""Every probe passes healthy models and notices the one fault that it is there for, planted in a real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rope.tiny_families import build, tiny_family_config
from support import tiny_model

from ctxext.model.probes import Probe, probe_model
from ctxext.rope.live import patch_model

ORIGINAL, TARGET = 128, 1024
IDS = [(7 * number + 3) % 90 for number in range(40)]
INFLUENCE, RELATIVE, CACHED, PADDED = "influence the last one", "only distances matter", "KV cache", "left-padded"
ALL = (INFLUENCE, RELATIVE, CACHED, PADDED)


def probe(model: Any, *, target: int = TARGET, fixed: bool = True) -> list[Probe]:
    return list(probe_model(model, IDS, ORIGINAL, target, fixed=fixed))


def failing(probes: list[Probe]) -> list[str]:
    """Which kinds of probe do not hold."""
    return [kind for kind in ALL if any(kind in found.name and not found.holds for found in probes)]


def with_forward(model: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A model that computes something else from its arguments."""
    plain = model.forward
    model.forward = lambda **arguments: plain(**change(arguments))
    return model


def with_rotation(model: Any, change: Callable[..., Any]) -> Any:
    """A model whose rotary module is called through `change(plain, hidden, position_ids)`."""
    rotary = model.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda hidden, position_ids: change(plain, hidden, position_ids)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "mixtral", "deepseek_v3", "phi3"])
@pytest.mark.parametrize("method", ["yarn", "linear"])
def test_healthy_models_pass_all_probes(family: str, method: str) -> None:
    model = build(tiny_family_config(family))
    patch_model(model, method=method, target_length=TARGET, on_existing="replace")
    probes = probe(model)
    assert len(probes) == 4
    assert failing(probes) == []
    assert all(found.line().count("expected") == 0 for found in probes)


@pytest.mark.parametrize("target", [129, 4096, 131072, 1048576])
def test_healthy_models_pass_at_any_target_length(target: int) -> None:
    model = tiny_model()
    patch_model(model, target_length=target)
    assert failing(probe(model, target=target)) == []


def test_frequencies_that_follow_the_length_are_probed_only_for_what_they_keep() -> None:
    model = tiny_model()
    patch_model(model, method="dynamic", target_length=TARGET)
    probes = probe(model, fixed=False)
    assert len(probes) == 2
    assert failing(probes) == []
    # Taken for a fixed table, they are noticed: a token's angle depends on the length of the sequence it came in.
    assert set(failing(probe(model))) & {RELATIVE, CACHED}


def test_a_window_that_far_tokens_lie_outside_of_is_noticed() -> None:
    model = build(tiny_family_config("mistral", sliding_window=8))
    assert failing(probe(model)) == [INFLUENCE]


def test_a_jump_in_positions_taken_for_a_document_boundary_is_noticed() -> None:
    model = with_forward(tiny_model(), lambda arguments: {**arguments, "attention_mask": None})
    assert INFLUENCE in failing(probe(model))


def test_absolute_positions_that_leak_into_the_model_are_noticed() -> None:
    # Attention that grows with the position itself, as some context extension tricks have it.
    def leak(plain: Any, hidden: Any, positions: Any) -> Any:
        cos, sin = plain(hidden, positions)
        growing = 1.0 + 0.2 * torch.log1p(positions.float())[..., None]
        return cos * growing, sin * growing

    assert RELATIVE in failing(probe(with_rotation(tiny_model(), leak)))


def test_learned_absolute_positions_are_noticed() -> None:
    model = build(tiny_family_config("gpt2"))  # 128 positions
    assert failing(list(probe_model(model, IDS, 96, 127, fixed=True))) == [RELATIVE]


def test_a_cache_whose_tokens_all_count_from_zero_is_noticed() -> None:
    def restart(plain: Any, hidden: Any, positions: Any) -> Any:
        return plain(hidden, positions - positions.min())

    assert failing(probe(with_rotation(tiny_model(), restart))) == [CACHED]


def test_a_cache_that_is_dropped_is_noticed() -> None:
    def without_past(arguments: dict[str, Any]) -> dict[str, Any]:
        kept = {**arguments, "past_key_values": None}
        if arguments.get("past_key_values") is not None:
            kept["attention_mask"] = torch.ones_like(arguments["input_ids"])
        return kept

    assert failing(probe(with_forward(tiny_model(), without_past))) == [CACHED]


def test_padding_that_is_attended_to_is_noticed() -> None:
    model = with_forward(
        tiny_model(), lambda arguments: {**arguments, "attention_mask": torch.ones_like(arguments["attention_mask"])}
    )
    assert failing(probe(model)) == [PADDED]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_every_probe(broken: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = broken
    probes = probe(model)
    assert failing(probes) == list(ALL)
    assert all("(expected" in found.line() for found in probes)
