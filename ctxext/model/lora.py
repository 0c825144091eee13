"""LoRA (Hu et al. 2021, arXiv:2106.09685) by peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ctxext.model.load import quiet
from ctxext.recipe.schema import LoraBlock


def add_lora(model: PreTrainedModel, lora: LoraBlock, seed: int) -> PeftModel:
    """Wrap `model` with freshly initialised LoRA on every linear layer but the output embedding.

    LoRA weights are float32 whatever the base's dtype; the base is frozen.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, any number is right
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )
    with quiet():
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def num_trainable(model: torch.nn.Module) -> int:
    """Parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
