"""How far a merged checkpoint is from what was trained, where the base was quantised for training (QLoRA).

The adapter was trained against rounded weights and is merged into the unrounded ones, so the two models differ by the
rounding. That is meant: the unrounded weights are the better ones. How much it is, is measured and said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ctxext.errors import ResourceError
from ctxext.export.proof import probe_ids, probe_logits
from ctxext.model.load import ModelSource, load_tokenizer
from ctxext.model.quantised import load_quantised
from ctxext.rope.families import text_config
from ctxext.rope.verify import verify_positions
from ctxext.train.adapter import load_adapter

TRAINED_IN_4_BITS = "the adapter was trained against a base in 4 bits and is merged into the weights as they came"


def compare_with_quantised(merged: Any, adapter: Path, source: ModelSource, config: PreTrainedConfig) -> str:
    """One sentence: logits of the merged model against those of the quantised base with its adapter.

    Args:
        merged: the merged checkpoint, read back.
        adapter: the adapter, trained on the base in 4 bits.
        source, config: of the base, extended.
    """
    device: torch.device = merged.device
    try:
        model = load_quantised(source, config, dtype=merged.dtype, device=device)
    except ResourceError as error:
        return f"{TRAINED_IN_4_BITS}; how much that changes was not measured ({error.what})"
    verify_positions(model, config)
    probe = probe_ids(load_tokenizer(source))
    target_length = int(text_config(config).max_position_embeddings)
    expected = probe_logits(load_adapter(adapter, model).eval(), probe, target_length)
    actual = probe_logits(merged, probe, target_length)
    difference, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    agreeing = int((actual.argmax(-1) == expected.argmax(-1)).sum())
    return (
        f"{TRAINED_IN_4_BITS}: largest logit difference between the two {difference:.2g} (of {largest:.2g} at most), "
        f"the same next token at {agreeing} of {len(probe)} positions"
    )
