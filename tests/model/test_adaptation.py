"""What a recipe's adaptation trains of every kind of model: by structure, never by the name of a layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import PeftModel
from rope.tiny_families import build, run, tiny_family_config
from support import tiny_config, tiny_model

from ctxext.errors import UsageError
from ctxext.model.adaptation import adapt, frozen_notes, trained_parts
from ctxext.model.lora import lora_targets
from ctxext.model.parts import parameter_kinds, plain_name
from ctxext.model.whole import compute_dtype, embeddings_and_norms, whole_parameters
from ctxext.recipe.adaptation import LoraBlock
from ctxext.train.step import SummedLoss

WHOLE = LoraBlock(rank=4, embeddings_and_norms=True)
IDS = (torch.arange(24)[None] * 37 + 5) % 90
# Per family: tied?, LoRA by kind, whole by kind (numbers of tensors).
TRAINED: dict[str, tuple[bool, dict[str, int], dict[str, int]]] = {
    "llama": (False, {"attention": 16, "MLP": 12}, {"input embedding": 1, "output embedding": 1, "norms": 5}),
    "qwen2": (True, {"attention": 16, "MLP": 12}, {"tied embeddings": 1, "norms": 5}),
    "gemma3_text": (True, {"attention": 16, "MLP": 12}, {"tied embeddings": 1, "norms": 13}),
    "qwen3": (False, {"attention": 16, "MLP": 12}, {"input embedding": 1, "output embedding": 1, "norms": 9}),
    "gpt_neox": (False, {"attention": 8, "MLP": 8}, {"input embedding": 1, "output embedding": 1, "norms": 10}),
    "phi": (False, {"attention": 16, "MLP": 8}, {"input embedding": 1, "output embedding": 2, "norms": 6}),
    "mixtral": (False, {"attention": 16}, {"input embedding": 1, "output embedding": 1, "norms": 5}),
    "olmoe": (False, {"attention": 16}, {"input embedding": 1, "output embedding": 1, "norms": 9}),
    "qwen2_moe": (False, {"attention": 16, "MLP": 12}, {"input embedding": 1, "output embedding": 1, "norms": 5}),
}


def family(name: str, **changes: Any) -> Any:
    return build(tiny_family_config(name, tie_word_embeddings=TRAINED[name][0], **changes))


@pytest.mark.parametrize("name", TRAINED)
def test_lora_with_embeddings_and_norms_trains_these_and_nothing_else(name: str) -> None:
    base = family(name)
    before = {key: value.clone() for key, value in base.named_parameters()}
    adapted = adapt(base, "lora", WHOLE, seed=0)
    parts = trained_parts(adapted)
    assert {part.kind: part.num_tensors for part in parts if part.by_lora} == TRAINED[name][1]
    assert {part.kind: part.num_tensors for part in parts if not part.by_lora} == TRAINED[name][2]
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sum(part.num_parameters for part in parts) == trainable
    assert sum(part.num_bytes for part in parts) == trainable * 16
    SummedLoss(adapted.train())(IDS, torch.arange(24)[None]).backward()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad.sign()
    whole = whole_parameters(adapted)
    assert whole.keys() == set(embeddings_and_norms(base))
    for key, value in base.named_parameters():
        plain = plain_name(key)
        if plain in before:
            assert torch.equal(value, before[plain]) == (plain not in whole), plain


@pytest.mark.parametrize("name", [name for name in TRAINED if TRAINED[name][0]])
def test_tied_embeddings_stay_one_parameter_that_learns_from_both_its_uses(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        adapted: Any = adapt(family(name).to(dtype), "lora", WHOLE, seed=0)
        base = adapted.get_base_model()
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        (tied,) = [p for n, p in whole_parameters(adapted).items() if "embed" in n]
        assert tied.dtype == torch.float32
        assert torch.equal(embedding.weight, head.weight)
        with torch.no_grad():
            tied += 1
        assert torch.equal(embedding.weight, tied.to(dtype))
        assert torch.equal(head.weight, tied.to(dtype))
        head(torch.ones(1, tied.shape[1], dtype=dtype)).sum().backward()
        assert tied.grad is not None
        once = tied.grad.clone()
        embedding(torch.tensor([[3]])).sum().backward()
        assert not torch.equal(tied.grad, once)


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_weights_train_in_float32_and_compute_in_the_dtype_that_the_base_was_loaded_in(adaptation: Any) -> None:
    """A bfloat16 weight of 1 cannot become 1.00002; trained in float32 it does, and activations stay bfloat16."""
    base = family("qwen3").bfloat16()
    expected = run(base)
    adapted: Any = adapt(base, adaptation, WHOLE if adaptation == "lora" else LoraBlock(), seed=0)
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    assert any(p.dtype == torch.bfloat16 for p in adapted.parameters()) == (adaptation == "lora")
    assert compute_dtype(adapted) == torch.bfloat16
    if adaptation == "full":
        assert torch.equal(run(adapted), expected)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = (adapted.get_base_model() if adaptation == "lora" else adapted).get_decoder()(IDS).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    norm = next(p for n, p in whole_parameters(adapted).items() if n.endswith("norm.weight"))
    optimizer = torch.optim.AdamW([norm], lr=2e-5, weight_decay=0.0)
    norm.grad = torch.ones_like(norm)
    before = norm.detach().clone()
    optimizer.step()
    assert float((before - norm).detach().abs().min()) == pytest.approx(2e-5, rel=0.01)


def test_full_fine_tuning_trains_every_parameter_once() -> None:
    for name in ("llama", "qwen2", "mixtral", "gemma3_text"):
        base = family(name)
        names = [key for key, _ in base.named_parameters()]
        adapted = adapt(base, "full", LoraBlock(), seed=0)
        assert adapted is base
        assert list(whole_parameters(adapted)) == names
        assert sum(part.num_parameters for part in trained_parts(adapted)) == sum(p.numel() for p in base.parameters())
        assert not any(part.by_lora for part in trained_parts(adapted))


def test_a_mixture_of_experts_gets_adapters_on_routers_and_experts_only_when_asked() -> None:
    base = family("olmoe")
    assert len(frozen_notes(base, "lora", LoraBlock())) == 2
    counted = {}
    for routers in (False, True):
        for experts in (False, True):
            lora = LoraBlock(rank=2, routers=routers, experts=experts)
            parts = trained_parts(adapt(family("olmoe"), "lora", lora, seed=0))
            counted[routers, experts] = {part.kind: part.num_tensors for part in parts}
    assert counted[False, False] == {"attention": 16}
    assert counted[True, False] == {"attention": 16, "routers": 4}
    assert counted[False, True] == {"attention": 16, "experts": 8}
    assert counted[True, True] == {"attention": 16, "routers": 4, "experts": 8}
    named = adapt(family("olmoe"), "lora", LoraBlock(targets=["q_proj", "gate_up_proj"]), seed=0)
    assert {part.kind: part.num_tensors for part in trained_parts(named)} == {"attention": 4, "experts": 4}


def test_what_peft_would_take_for_experts_is_left_out_and_said() -> None:
    """DeepSeek's first layer is dense; peft would put the adapters of its MLP onto the experts of the others."""
    base = build(tiny_family_config("deepseek_v3"))
    notes = frozen_notes(base, "lora", LoraBlock())
    assert any("6 linear layers (down_proj, gate_proj, up_proj, outside the experts)" in note for note in notes)
    adapted = adapt(base, "lora", LoraBlock(rank=2), seed=0)
    assert [part.kind for part in trained_parts(adapted)] == ["attention"]
    with pytest.raises(UsageError, match=r"lora\.targets: peft takes this name .* got 'down_proj'"):
        lora_targets(build(tiny_family_config("deepseek_v3")), LoraBlock(targets=["q_b_proj", "down_proj"]))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["q_prj"]}, "no linear layer of this name; got 'q_prj'.*q_proj.*Did you mean 'q_proj'"),
        ({"targets": ["input_layernorm"]}, "no linear layer of this name"),
        ({"targets": ["lm_head"]}, "output embedding is tied"),
        ({"routers": True}, "lora.routers: the model has none"),
        ({"experts": True}, "lora.experts: the model has none"),
    ],
)
def test_targets_that_the_model_lacks_are_refused_without_weights(lora: dict[str, Any], message: str) -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    with pytest.raises(UsageError, match=message):
        lora_targets(base, LoraBlock(**lora))


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"weight_decomposed": True}])
def test_dropout_and_dora_are_refused_where_peft_cannot_compute_them(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"lora.{next(iter(changes))}: peft computes adapters of weights"):
        lora_targets(family("mixtral"), LoraBlock(experts=True, **changes))


@pytest.mark.parametrize(
    ("lora", "scaling", "num_tensors"),
    [({}, 2.0, 28), ({"rank_stabilized": True}, 4.0, 28), ({"weight_decomposed": True}, 2.0, 42)],
)
def test_variants_scale_and_train_as_their_papers_say(lora: dict[str, Any], scaling: float, num_tensors: int) -> None:
    adapted: Any = adapt(tiny_model(), "lora", LoraBlock(rank=4, alpha=8.0, **lora), seed=0)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scaling
    assert sum(part.num_tensors for part in trained_parts(adapted)) == num_tensors
    if "weight_decomposed" in lora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert torch.allclose(magnitude, layer.base_layer.weight.norm(dim=1))


FAMILIES = (
    "afmoe apertus arcee cohere cohere2_moe deepseek_v3 ernie4_5_moe exaone4 falcon gemma2 gemma3n_text glm4 gpt_oss "
    "granitemoe hunyuan_v1_moe llama4_text lfm2 mimo_v2_flash minimax nemotron olmo2 phimoe persimmon qwen3_next "
    "smollm3 stablelm starcoder2"
).split()


def test_norms_and_routers_are_found_by_structure_in_families_of_all_kinds() -> None:
    """Whose class is called a norm is one, and nobody else; mixtures of experts have routers and experts."""
    seen = Counter[str]()
    for model_type in FAMILIES:
        with torch.device("meta"):
            base = build(tiny_family_config(model_type))
        kinds = parameter_kinds(base)
        assert set(kinds) == {name for name, _ in base.named_parameters()}
        for name, kind in kinds.items():
            module = base.get_submodule(name.rpartition(".")[0])
            assert ("norm" in type(module).__name__.lower()) == (kind == "norms"), (model_type, name)
            seen[kind] += 1
        has_experts = any(parameter.ndim == 3 for parameter in base.parameters()) and model_type != "lfm2"
        assert has_experts == ("routers" in kinds.values()) == ("experts" in kinds.values()), model_type
    assert (seen["norms"] > 200, seen["routers"] > 15, seen["experts"] > 20) == (True, True, True)


def test_lora_is_drawn_alike_whatever_else_trains() -> None:
    one: Any = adapt(tiny_model(), "lora", LoraBlock(rank=4), seed=3)
    other: Any = adapt(tiny_model(), "lora", WHOLE, seed=3)
    assert isinstance(one, PeftModel)
    drawn = {name: p for name, p in one.named_parameters() if "lora_A" in name}
    assert len(drawn) == 14
    assert all(torch.equal(p, dict(other.named_parameters())[name]) for name, p in drawn.items())
