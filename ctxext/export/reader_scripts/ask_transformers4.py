"""Log-probabilities of a prompt's last tokens from transformers 4. Runs in that reader's environment."""

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def log_probs(model_path: str, ids: list[int], num_scored: int) -> list[float]:
    """Natural logarithms of what the model gives the last `num_scored` ids, each after all ids before it."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, torch_dtype=torch.float32, trust_remote_code=False)
    model.eval()
    # Without this, a long prompt's logits alone can take many GB.
    keep = {"logits_to_keep": num_scored} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False, **keep).logits[0, -num_scored:]
    table = torch.log_softmax(logits.double(), dim=-1)
    values: list[float] = table.gather(1, torch.tensor(ids[-num_scored:])[:, None])[:, 0].tolist()
    return values
