"""What was trained is what is stored, what stock peft opens, and what the merged checkpoint computes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rope.tiny_families import build, tiny_family_config
from safetensors.torch import load_file, save_file
from support import TARGET_LENGTH, byte_tokenizer
from torch import Tensor

from ctxext.errors import ArtefactError
from ctxext.export.merge import merge_adapter
from ctxext.export.proof import read_back
from ctxext.files import write_manifest
from ctxext.model.adaptation import adapt
from ctxext.model.load import load_config, load_model, quiet, resolve_source, weights_fingerprint
from ctxext.recipe.adaptation import LoraBlock
from ctxext.rope.patchers import extend_config
from ctxext.train.adapter import load_adapter, load_trained, save_trained
from ctxext.train.step import SummedLoss

CPU = torch.device("cpu")
IDS = (torch.arange(32)[None] * 37 + 5) % 256
POSITIONS = torch.cat([torch.arange(16), torch.arange(TARGET_LENGTH - 16, TARGET_LENGTH)])[None]
WHOLE = {"embeddings_and_norms": True}
FAMILIES = [
    ("llama", False, WHOLE),
    ("qwen2", True, WHOLE),
    ("gemma3_text", True, WHOLE),
    ("qwen3", False, WHOLE),
    ("gpt_neox", True, WHOLE),
    ("olmoe", False, WHOLE),
    ("mixtral", False, {**WHOLE, "experts": True, "routers": True}),
    ("qwen2_moe", False, {"routers": True}),
    ("llama", False, {**WHOLE, "weight_decomposed": True}),
    ("qwen3", True, {**WHOLE, "rank_stabilized": True, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}),
]


def save_base(folder: Path, family: str, tied: bool, dtype: torch.dtype) -> Path:
    base = build(tiny_family_config(family, vocab_size=260, tie_word_embeddings=tied)).to(dtype)  # type: ignore[arg-type]
    with quiet():
        base.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def opened(base: Path, dtype: torch.dtype) -> Any:
    """The extended base."""
    source = resolve_source(str(base))
    config = extend_config(load_config(source), method="yarn", target_length=TARGET_LENGTH)
    return load_model(source, config, dtype=dtype, device=CPU)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output = model(IDS, position_ids=POSITIONS, attention_mask=torch.ones_like(IDS), use_cache=False)
    result: Tensor = output.logits.float()
    return result


def train(base: Path, dtype: torch.dtype, adaptation: Any, lora: dict[str, Any], steps: int = 2) -> Any:
    """A few large steps of the real loss; every parameter that trains gets a gradient."""
    adapted = adapt(opened(base, dtype), adaptation, LoraBlock(**({"rank": 4, **lora} if lora else {})), seed=0)
    adapted.train()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
            loss = SummedLoss(adapted)(IDS, POSITIONS)
        loss.backward()
        assert not [name for name, p in trained.items() if p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def provenance(base: Path) -> dict[str, Any]:
    source = resolve_source(str(base))
    return {
        "base": {
            "source": str(base),
            "revision": None,
            "fingerprint": weights_fingerprint(source, load_config(source)),
        },
        "method": {"method": "yarn"},
        "original_length": 128,
        "target_length": TARGET_LENGTH,
    }


def save(folder: Path, base: Path, adapted: Any) -> Path:
    save_trained(folder, adapted, byte_tokenizer(), provenance(base))
    return folder


@pytest.mark.parametrize(("family", "tied", "lora"), FAMILIES)
def test_trained_stored_opened_by_peft_and_merged_are_one_model(
    tmp_path: Path, family: str, tied: bool, lora: dict[str, Any]
) -> None:
    base = save_base(tmp_path / "base", family, tied, torch.float32)
    adapted = train(base, torch.float32, "lora", lora)
    expected = logits(adapted)
    assert float((logits(opened(base, torch.float32)) - expected).abs().max()) > 0.3
    folder = save(tmp_path / "adapter", base, adapted)
    assert torch.equal(logits(load_adapter(folder, opened(base, torch.float32)).eval()), expected)
    stock = PeftModel.from_pretrained(opened(base, torch.float32), folder).eval()
    assert torch.equal(logits(stock), expected)
    shown = merge_adapter(folder, tmp_path / "merged", "auto")
    streamed = not ({"weight_decomposed", "experts", "routers"} & lora.keys())
    assert shown.way.startswith("merged file by file" if streamed else "merged in memory")
    merged: Any = read_back(tmp_path / "merged", torch.float32, CPU)
    assert float((logits(merged) - expected).abs().max()) < 2e-5
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma3_text", True)])
def test_a_bfloat16_base_computes_with_the_rounded_weights_while_it_trains(
    tmp_path: Path, family: str, tied: bool
) -> None:
    """Embeddings and norms are stored as trained, float32, and rounded once: nothing changes on the way."""
    base = save_base(tmp_path / "base", family, tied, torch.bfloat16)
    adapted = train(base, torch.bfloat16, "lora", WHOLE)
    expected = logits(adapted)
    folder = save(tmp_path / "adapter", base, adapted)
    stored = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert torch.equal(logits(load_adapter(folder, opened(base, torch.bfloat16)).eval()), expected)
    merge_adapter(folder, tmp_path / "merged", "bfloat16")
    merged: Any = read_back(tmp_path / "merged", torch.bfloat16, CPU)
    key = next(name for name in stored if "embed" in name)
    assert torch.equal(merged.get_input_embeddings().weight, stored[key].bfloat16())


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("gemma3_text", True), ("qwen2", True), ("olmoe", False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fully_trained_model_is_stored_and_merged_as_it_computes(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", family, tied, dtype)
    adapted = train(base, dtype, "full", {})
    expected = logits(adapted)
    folder = save(tmp_path / "trained", base, adapted)
    source = resolve_source(str(base))
    config = extend_config(load_config(source), method="yarn", target_length=TARGET_LENGTH)
    loaded = load_trained(folder, source, config, dtype=dtype, device=CPU)
    assert torch.equal(logits(loaded), expected)
    assert float((logits(opened(base, dtype)) - expected).abs().max()) > 0.3
    shown = merge_adapter(folder, tmp_path / "merged", str(dtype).removeprefix("torch."))
    assert "every weight was trained" in shown.way
    merged: Any = read_back(tmp_path / "merged", dtype, CPU)
    assert float((logits(merged) - expected).abs().max()) < 2e-5
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    other = extend_config(load_config(source), method="linear", target_length=TARGET_LENGTH)
    with pytest.raises(ArtefactError, match="RoPE is not the one"):
        load_trained(folder, source, other, dtype=dtype, device=CPU)


@pytest.mark.parametrize("spoiled", ["norm", "embed_tokens"])
@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_whole_weight_that_is_missing_or_misshapen_is_refused(tmp_path: Path, spoiled: str, fault: str) -> None:
    base = save_base(tmp_path / "base", "llama", False, torch.float32)
    folder = save(tmp_path / "adapter", base, train(base, torch.float32, "lora", WHOLE, steps=1))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith(f"{spoiled}.weight"))
    taken = tensors.pop(key)
    if fault == "misshapen":
        tensors[key] = taken[:-1].clone()
    save_file(tensors, path)
    write_manifest(folder)
    message = "1 weights missing" if fault == "missing" else "another shape"
    with pytest.raises(ArtefactError, match=message):
        load_adapter(folder, opened(base, torch.float32))
    with pytest.raises(ArtefactError, match=message):
        merge_adapter(folder, tmp_path / "merged")
