"""Adapter + its extended config -> a plain Hugging Face checkpoint, proven by reading it back.

The merged folder needs neither ctxext nor peft: stock `from_pretrained` gives the logits of base + adapter. That is
checked here on positions up to the target length, because a merge that lost its RoPE looks right at short ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ctxext.data import words
from ctxext.data.boundaries import encode_plain
from ctxext.errors import ArtefactError
from ctxext.export.checkpoint import write_both_forms
from ctxext.files import directory_atomic, require_free_space, write_json_atomic, write_manifest
from ctxext.model.load import choose_device, choose_dtype, load_model, load_tokenizer, quiet
from ctxext.rope.families import text_config
from ctxext.rope.verify import RopeVerification, verify_positions
from ctxext.train.adapter import (
    PROVENANCE_NAME,
    adapter_config,
    base_of,
    load_adapter,
    read_provenance,
    tensor_write_errors,
)

# Largest logit difference allowed between base + adapter and the checkpoint read back, relative to the largest logit.
# Measured on SmolLM2-135M, float32, logits up to 31: 4e-5 to 9e-5 on text. Lost or doubled RoPE scaling shows 0.2 to 4.
# In bfloat16 the merge rounds every weight once more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_PROBE_TOKENS = 48
# Text, not arbitrary ids: on noise the trained model amplifies float32 rounding to 4e-3, which would hide real faults.
_PROBE_TEXT = (
    "A ship that leaves the harbour at dawn carries more than its cargo: it carries the names of all who loaded it. "
    "The clerk writes them down twice, once for the owner and once for the sea, and nobody has ever asked him why."
)


@dataclass(frozen=True)
class MergeProof:
    """What reading the merged checkpoint back showed."""

    folder: Path
    largest_logit_difference: float
    verification: RopeVerification


def probe_ids(tokenizer: Any) -> list[int]:
    """Token ids of a fixed text that the tokenizer knows."""
    ids = encode_plain(tokenizer, _PROBE_TEXT)
    if tokenizer.unk_token_id in ids:
        ids = encode_plain(tokenizer, words.document("probe"))
    return ids[:_PROBE_TOKENS]


def probe_logits(model: Any, ids: list[int], target_length: int) -> Tensor:
    """Logits [1, S, V] of `ids`, the second half of which sits at the end of the target range."""
    half = len(ids) // 2
    positions = torch.cat([torch.arange(half), torch.arange(target_length - len(ids) + half, target_length)])
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        output = model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=positions[None].to(device),
            # All ones: without a mask transformers would take the jump for a document boundary.
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
            use_cache=False,
        )
    logits: Tensor = output.logits.float().cpu()
    return logits


def write_merged(
    folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, provenance: dict[str, Any]
) -> tuple[PreTrainedModel, MergeProof]:
    """Merge, write atomically, read back and compare; returns the model that was read back.

    The adapter is merged into `model`'s own weights: it is spent afterwards.

    Raises:
        ArtefactError: the folder exists, or the checkpoint read back gives other logits or positions.
        ResourceError: not enough disk.
    """
    model.eval()
    base: Any = model.get_base_model()
    target_length = int(provenance["target_length"])
    dtype, device = base.dtype, base.device
    require_free_space(
        folder, int(sum(p.numel() * p.element_size() for p in base.parameters()) * 1.05), "the merged checkpoint"
    )
    probe = probe_ids(tokenizer)
    expected = probe_logits(model, probe, target_length)
    merged: Any = model.merge_and_unload()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tensor_write_errors(folder), directory_atomic(folder) as partial:
        with quiet():
            merged.save_pretrained(partial)
        write_both_forms(partial)
        tokenizer.model_max_length = target_length
        tokenizer.save_pretrained(partial)
        write_json_atomic(partial / PROVENANCE_NAME, provenance)
        config = merged.config
        del merged
        reloaded = read_back(partial, dtype, device)
        difference = float((probe_logits(reloaded, probe, target_length) - expected).abs().max())
        allowed = TOLERANCE[dtype] * float(expected.abs().max())
        if not difference <= allowed:
            raise ArtefactError(
                "the merged checkpoint does not give the logits of base + adapter",
                where=str(folder),
                got=difference,
                expected=f"a largest difference of {allowed:.2g}",
                hint="Please report this.",
            )
        verification = verify_positions(reloaded, config)
        write_manifest(partial, kind="merged")
    return reloaded, MergeProof(folder, difference, verification)


def read_back(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a checkpoint as any stock program would: by folder name alone."""
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    model.to(device)
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def merge_adapter(adapter: Path, destination: Path, dtype: str = "auto") -> MergeProof:
    """Merge a stored adapter into its base.

    Raises:
        ArtefactError: the folder is no adapter of ctxext, is damaged, does not fit its base, or the destination exists.
    """
    if destination.exists():
        raise ArtefactError("the destination exists already", where=str(destination), hint="Choose another folder.")
    provenance = read_provenance(adapter)
    config = adapter_config(adapter)
    source = base_of(provenance)
    device = choose_device()
    model = load_model(source, config, dtype=choose_dtype(dtype, device), device=device)
    verify_positions(model, config)
    wrapped = load_adapter(adapter, model)
    _, proof = write_merged(destination, wrapped, load_tokenizer(source), provenance)
    return proof


def describe_positions(config: Any) -> str:
    """One line: RoPE type, factor and reach of a config."""
    text = text_config(config)
    parameters = text.rope_parameters
    factor = f" factor {parameters['factor']:g}" if "factor" in parameters else ""
    reach = f"{text.max_position_embeddings} positions"
    return f"{parameters['rope_type']}{factor}, theta {parameters['rope_theta']:g}, {reach}"
