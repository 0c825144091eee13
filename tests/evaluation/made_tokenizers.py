"""Tokenizers made on the spot: byte-level BPE, Unigram with metaspace, BPE with metaspace and byte fallback, bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from support import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ctxext.data.words import document

CORPUS = [document(f"corpus/{number}") + "\nThe number 12345 is: 678.\n" for number in range(60)]


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as in GPT-2 and SmolLM2; adds nothing by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram with metaspace, as sentencepiece makes it; a post-processor puts BOS before and EOS behind every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    letters = [chr(code) for code in range(33, 127)] + ["\n"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with metaspace and byte fallback, as in Llama 2: a line break is two tokens, BOS stands before every text."""
    marks = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[*marks, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=64,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


_MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_tokenizer,
    "byte-level BPE": bpe_tokenizer,
    "unigram with BOS and EOS": unigram_tokenizer,
    "BPE with byte fallback": fallback_tokenizer,
}
NAMES = tuple(_MAKERS)


@cache
def made_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of `NAMES`, made once."""
    return _MAKERS[name]()
