"""Makes `recipes/tiny/`: a Llama of 0.8 million parameters that finds pass keys within its window of 128 tokens.

Run from the repository's root; about ten minutes of one core:

    OMP_NUM_THREADS=1 python tests/assets/make_tiny.py recipes/tiny

Everything follows from one seed: generated text, pass keys, initial weights and the order of the windows. Equal
versions of PyTorch on equal processors give equal weights; elsewhere the last digits differ.

The windows are those of ctxext's own training (`WindowBuilder`), so statements stand behind sentence ends at every
depth, both ends included. Words are drawn at random, so most of the loss cannot be learnt; the answers are weighted up,
because finding them is what the model is for.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctxext.data.boundaries import encode_plain
from ctxext.data.facts import PASSKEY_DIGITS, PASSKEY_FACT, PASSKEY_QUESTION
from ctxext.data.order import Cursor, windows_after
from ctxext.data.packing import WindowBuilder
from ctxext.data.tokenize import collect_tokens
from ctxext.data.words import WORDS
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.haystack import HaystackReader, load_haystack
from ctxext.evaluation.prompt import PromptBuilder
from ctxext.evaluation.scoring import number_match
from ctxext.evaluation.suite import Cell, Sample
from ctxext.recipe.data import DataBlock, FactsBlock, SourceBlock

WINDOW = 128
UNKNOWN, END, PADDING = "<unk>", "<eos>", "<pad>"
PUNCTUATION = " \n.,?!:;'-"
# A word takes the space before it along; everything else is one character a token.
PIECES = r" ?[a-z]+|[\s\S]"
# What the answer takes of a window's end: a space, the digits, a full stop.
ANSWER_TOKENS = PASSKEY_DIGITS + 2


@dataclass(frozen=True)
class Training:
    """The optimisation from scratch.

    Copying is learnt at short distances first, in windows of `short_window` tokens: a third of the cost, and sooner.

    Attributes:
        short_steps: of `steps`, how many have short windows.
        num_windows: different stretches of text; pass keys and places are new in every epoch.
        answer_weight: share of the answers' mean loss in the objective, the rest is the text's.
    """

    steps: int = 900
    short_steps: int = 450
    short_window: int = 48
    windows_per_step: int = 32
    num_windows: int = 8192
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    answer_weight: float = 0.9
    seed: int = 20


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer that decodes to exactly what it encoded."""
    prose = f"{PASSKEY_FACT} {PASSKEY_QUESTION}".replace("{value}", "")
    words = sorted({*WORDS, *"".join(c if c.isalpha() else " " for c in prose).split()})
    tokens = [UNKNOWN, END, PADDING, *"0123456789", *PUNCTUATION]
    for word in words:
        tokens += [f" {word}", word]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Freshly initialised."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def window_builder(tokenizer: PreTrainedTokenizerFast, training: Training, length: int) -> WindowBuilder:
    """Windows of `length` tokens: generated sentences, each with one pass key and its question."""
    data = DataBlock(
        sources=[SourceBlock(kind="generated-words")],
        facts=FactsBlock(share=1.0, style="passkey"),
        seed=training.seed,
    )
    stream = collect_tokens(tokenizer, data.sources, training.num_windows * length, data.seed)
    return WindowBuilder(stream, data, tokenizer, length)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, training: Training) -> None:
    """Train all weights; prints loss and accuracy of the answers' digits."""
    short = window_builder(tokenizer, training, training.short_window)
    full = window_builder(tokenizer, training, WINDOW)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(0.9, 0.98),
    )
    model.train()
    started = time.perf_counter()
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * rate_share(step, training)
        builder = short if step < training.short_steps else full
        cursor = Cursor(training.seed, step * training.windows_per_step)
        chosen = windows_after(cursor, training.windows_per_step, builder.num_windows)
        ids = torch.tensor([builder.build(epoch, index).input_ids for epoch, index in chosen])
        text_loss, answer_loss, accuracy = losses(model, ids)
        loss = (1 - training.answer_weight) * text_loss + training.answer_weight * answer_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{training.steps}  text {text_loss:.3f}  answers {answer_loss:.3f}  "
                f"digits right {accuracy:.2f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    model.eval()


def rate_share(step: int, training: Training) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / (training.steps - training.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def losses(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean loss of the text and of the answers, and the share of right digits.

    Args:
        ids: [B, S] windows that end in an answer.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    digits = slice(-ANSWER_TOKENS + 1, -1)
    right = logits[:, digits].argmax(-1) == ids[:, 1:][:, digits]
    return each[:, :-ANSWER_TOKENS].mean(), each[:, -ANSWER_TOKENS:].mean(), float(right.float().mean())


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, cell: Cell, num_samples: int = 40) -> float:
    """Share of right greedy answers to the evaluation's prompts of one cell, under a seed that no suite uses."""
    reader = HaystackReader(load_haystack("generated-words"), lambda text: encode_plain(tokenizer, text))
    builder = PromptBuilder(tokenizer, reader, "passkey", seed=2**32 - 1)
    answerer = Answerer(model, tokenizer)
    scores = []
    for index in range(num_samples):
        prompt = builder.build(Sample(cell, index))
        ids = answerer.answer(prompt.input_ids, ANSWER_TOKENS).ids
        scores.append(number_match(str(tokenizer.decode(ids)), prompt.expected))
    return float(np.mean(scores))


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Everything that training and evaluation say is known and comes back as it was."""
    fact = PASSKEY_FACT.format(value=9876543210)
    for text in (*WORDS, *(f" {word}" for word in WORDS), fact, PASSKEY_QUESTION, " ", f"moon.{fact} sun.\n"):
        ids = encode_plain(tokenizer, text)
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text, text
    assert encode_plain(tokenizer, "Q") == [tokenizer.unk_token_id]


def main() -> None:
    """Make and check everything, write the folder, print what the model can do."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="recipes/tiny")
    folder: Path = parser.parse_args().folder
    training = Training()
    tokenizer = build_tokenizer()
    check_tokenizer(tokenizer)
    model = build_model(tokenizer, training.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words")
    train(model, tokenizer, training)
    for length in (64, WINDOW - ANSWER_TOKENS - 1, 4 * WINDOW - ANSWER_TOKENS - 1):
        cells = [Cell("needle", length, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
        print(f"{length} tokens:", *(f"{cell.depth:g}: {accuracy(model, tokenizer, cell):.2f}" for cell in cells))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that nobody else can read


if __name__ == "__main__":
    main()
