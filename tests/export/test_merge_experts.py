"""Mixtures of experts: rounding that sends a token elsewhere is no wrong merge, and a wrong merge is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ORIGINAL_LENGTH, TARGET_LENGTH
from test_merge_streamed import CPU, make_adapter, save_base
from transformers import OlmoeConfig, OlmoeForCausalLM

from ctxext.errors import ArtefactError
from ctxext.export import merge, proof
from ctxext.export.merge import merge_adapter, merge_streamed, merged_in_memory
from ctxext.export.proof import COMPUTED, ROUNDED_WEIGHTS, check_logits, probe, probe_ids, read_back
from ctxext.model.load import load_model, load_tokenizer, resolve_source
from ctxext.train.adapter import adapter_config, load_adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ROUTERS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}


def save_mixture(folder: Path, **changes: Any) -> Path:
    """Two layers of eight experts in bfloat16, large enough weights to tell the experts apart."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=8,
        **{"num_experts_per_tok": 2, **changes},
        max_position_embeddings=ORIGINAL_LENGTH,
        initializer_range=0.2,
        pad_token_id=None,
        eos_token_id=None,
    )
    return save_base(folder, OlmoeForCausalLM(config).bfloat16(), "1GB")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_mixture(tmp_path / "base")


def trained(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = load_model(resolve_source(str(base)), adapter_config(adapter), dtype=dtype, device=CPU)
    return load_adapter(adapter, model).eval()


def test_a_token_that_rounding_sends_to_another_expert_is_compared_with_the_experts_it_had(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)
    shown = merge_adapter(adapter, tmp_path / "out")
    assert shown.way.startswith("merged file by file")
    assert shown.choices is not None
    assert shown.choices.num_choices == 2 * 48
    assert 0 < shown.choices.num_others < 5
    assert "every token sent to the same experts" in shown.summary()[2]
    assert f"({shown.choices.num_others} of 96 choices would have been others" in shown.summary()[2]
    ids = probe_ids(load_tokenizer(resolve_source(str(base))))
    expected = probe(trained(base, adapter), ids, TARGET_LENGTH)
    free = probe(read_back(tmp_path / "out", torch.float32, CPU), ids, TARGET_LENGTH)
    with pytest.raises(ArtefactError, match="does not give the logits"):
        check_logits(free, expected, ROUNDED_WEIGHTS[torch.bfloat16], tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("lora", [EXPERTS, ROUTERS], ids=["experts", "routers"])
def test_merges_in_memory_are_proven_in_the_dtype_they_are_computed_in(
    base: Path, tmp_path: Path, dtype: str, lora: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    shown = merge_adapter(adapter, tmp_path / "out", dtype)
    assert shown.way.startswith("merged in memory")
    assert shown.choices is not None
    assert shown.choices.num_choices == 2 * 48
    assert shown.choices.num_others < (5 if dtype == "bfloat16" else 1)


merge_edit = merge._edit


@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("factor", [0.0, 2.0], ids=["forgotten", "twice"])
def test_one_wrong_attention_tensor_is_refused_by_the_logits_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, factor: float
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)
    made: list[proof.MergeTarget] = []

    def one_wrong(target: Any) -> Any:
        made.append(target)
        return merge_edit(replace(target, scaling=target.scaling * factor) if len(made) == place + 1 else target)

    monkeypatch.setattr(merge, "_edit", one_wrong)
    monkeypatch.setattr(proof, "_check_rows", lambda *arguments: None)
    with pytest.raises(ArtefactError, match=r"not give the logits of base \+ adapter"):
        merge_streamed(adapter, base, tmp_path / "out", proof="logits")
    assert len(made) == 8


@pytest.mark.parametrize(
    ("lora", "name", "dtype"),
    [
        (EXPERTS, "experts.gate_up_proj", "float32"),
        (EXPERTS, "experts.gate_up_proj", "bfloat16"),
        (EXPERTS, "experts.down_proj", "float32"),
        (ROUTERS, "gate.weight", "float32"),
        (ROUTERS, "gate.weight", "bfloat16"),
    ],
)
def test_one_expert_or_router_that_was_not_merged_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any], name: str, dtype: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    before = dict(
        load_model(
            resolve_source(str(base)), adapter_config(adapter), dtype=torch.float32, device=CPU
        ).named_parameters()
    )

    def one_forgotten(model: Any) -> Any:
        merged = merged_in_memory(model)
        with torch.no_grad():
            for path, parameter in merged.named_parameters():
                if path.endswith(f"layers.1.mlp.{name}"):
                    rows = slice(2, 3) if "experts" in name else slice(None)
                    assert not torch.equal(parameter[rows], before[path][rows].to(parameter.dtype))
                    parameter[rows] = before[path][rows].to(parameter.dtype)
        return merged

    monkeypatch.setattr(merge, "merged_in_memory", one_forgotten)
    with pytest.raises(ArtefactError, match="the merged checkpoint does not"):
        merge_adapter(adapter, tmp_path / "out", dtype)


def test_another_router_is_refused_where_the_repeated_choice_hides_it_from_the_logits(tmp_path: Path) -> None:
    """One expert a token, weighted with 1 whatever its score is."""
    base = save_mixture(tmp_path / "base", num_experts_per_tok=1, norm_topk_prob=True)
    model = read_back(base, torch.float32, CPU)
    ids = probe_ids(load_tokenizer(resolve_source(str(base))))
    expected = probe(model, ids, ORIGINAL_LENGTH)
    with torch.no_grad():
        gate: Any = model.get_submodule("model.layers.1.mlp.gate")
        gate.weight.copy_(gate.weight.flip(0))
    actual = probe(model, ids, ORIGINAL_LENGTH, like=expected)
    assert float((actual.logits - expected.logits).abs().max()) < 1e-5
    with pytest.raises(ArtefactError, match="does not send tokens to the experts"):
        check_logits(actual, expected, COMPUTED[torch.bfloat16], tmp_path)
