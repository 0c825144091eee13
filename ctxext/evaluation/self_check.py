"""The engine's own check: one prompt of the run answered once more, by transformers' plain `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from ctxext.evaluation.backend import Answer, SelfCheck, is_out_of_memory
from ctxext.evaluation.prompt import Prompt
from ctxext.evaluation.trunk import common_prefix
from ctxext.model.load import quiet
from ctxext.model.placement import input_device

if TYPE_CHECKING:
    from ctxext.evaluation.answerer import Answerer

__all__ = ["SelfCheck", "self_check"]

# Logits this close, relative to the largest, are a tie: another order of sums decides which is first.
_TIE_EPS = 4
_TIE_FLOAT32 = 1e-4


def self_check(answerer: Answerer, prompt: Prompt, answer: Answer | None = None) -> SelfCheck:
    """Compare the engine's answer (made here when not given) with plain `generate`'s."""
    sample_id = prompt.sample.sample_id
    if not hasattr(answerer.model, "generate"):
        return SelfCheck(sample_id, "not run", "the model has no generate")
    try:
        found = answer or answerer.answer(prompt.input_ids, prompt.max_new_tokens, measure_loss=False)
        plain, logits = _generated(answerer, prompt.input_ids, prompt.max_new_tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return SelfCheck(sample_id, "not run", "plain generate needs more memory than there is")
    if found.ids == plain:
        return SelfCheck(sample_id, "identical", num_tokens=len(plain))
    place = common_prefix(found.ids, plain)
    if place in (len(found.ids), len(plain)):  # they disagree about where to stop, which is no tie
        return SelfCheck(sample_id, "different", "", len(plain), place, float("nan"))
    scores = logits[place].float()
    margin = float(scores[plain[place]] - scores[found.ids[place]])
    noise = max(_TIE_FLOAT32, _TIE_EPS * torch.finfo(logits[place].dtype).eps * float(scores.abs().max()))
    return SelfCheck(sample_id, "tie" if margin <= noise else "different", "", len(plain), place, margin)


@torch.inference_mode()
def _generated(answerer: Answerer, ids: list[int], max_new_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
    """Answer tokens of plain greedy `generate`, and the logits [V] of each."""
    answerer.forget_lengths()
    prompt = torch.tensor([ids], device=input_device(answerer.model))
    # What is left out here would be taken from the model's generation config.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(answerer.stop_ids) or None,
        pad_token_id=min(answerer.stop_ids, default=0),
        return_dict_in_generate=True,
        output_logits=True,
    )
    with quiet():  # transformers warns of prompts beyond the config's maximum length, which are the point here
        output = answerer.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return output.sequences[0, len(ids) :].tolist(), [step[0] for step in output.logits]
