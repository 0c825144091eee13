"""A Hugging Face tokenizer as llama.cpp's vocabulary: pieces, kinds, merges or scores, and how text is split first.

llama.cpp does not run the tokenizer's own pre-tokenizer. It knows a list of them by name and trusts the file to name
the right one; a wrong name loads without a word and splits numbers or punctuation elsewhere. So the name is given only
when the tokenizer's structure is one of those below, each of which was compared id by id with llama.cpp on trained
tokenizers (`tests/export/test_gguf.py`); anything else is refused unless the caller names it.

SentencePiece-style BPE (Llama 2, Mistral) has no pre-tokenizer but scores: llama.cpp joins the pair with the highest
score. A `tokenizer.json` holds ranked merges instead; minus the rank of the first merge that makes a piece is a score
that gives the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from ctxext.errors import ArtefactError, UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# What the pre-tokenizer does, step by step, and whether a whole word that is a piece skips the merges.
_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("byte-level with its regex",), False): "gpt-2",
    (("single digits", "byte-level with its regex"), False): "smollm",
    ((f"split {_CONTRACTIONS}" + r"\p{N}{1,3}" + _REST, "byte-level"), True): "llama-bpe",
    ((f"split {_CONTRACTIONS}" + r"\p{N}" + _REST, "byte-level"), False): "qwen2",
}
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp loads no byte-level BPE without merges. This one never applies: no other merge makes its parts.
_NO_MERGE = "[none] [none]"
# Merges rank from 0; pieces that no merge makes are never the result of a join, and any low score does.
_NEVER_JOINED = -1e9


@dataclass(frozen=True)
class GgufVocabulary:
    """What goes under `tokenizer.ggml`.

    Attributes:
        model: `gpt2` for byte-level BPE, `llama` for SentencePiece-style BPE.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: the pieces by id, as many as the embedding has rows.
        kinds: `gguf.TokenType` of each.
        merges: byte-level BPE only, in order of rank.
        scores: SentencePiece-style only.
        special: `bos`, `eos`, `unk`, `pad` where the tokenizer has them.
        add_bos, add_eos: whether plain encoding adds them.
        space_prefix: whether a space goes before the text.
        chat_template: Jinja source.
        notes: where ids can differ from the original tokenizer, for people.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...] | None
    scores: tuple[float, ...] | None
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    chat_template: str | None
    notes: tuple[str, ...]


def gguf_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int, pre: str | None = None) -> GgufVocabulary:
    """The vocabulary of a model whose embedding has `num_rows` rows.

    Args:
        tokenizer: backed by the `tokenizers` library.
        num_rows: the vocabulary is filled up to it with unused pieces, as llama.cpp takes its size from them.
        pre: llama.cpp's pre-tokenizer name, for a tokenizer that is not recognised; trusted as it is.

    Raises:
        UnsupportedModelError: llama.cpp has no counterpart, or the pre-tokenizer is not recognised.
        ArtefactError: the tokenizer has ids that the embedding has no rows for, or no end-of-text token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _no_counterpart("the tokenizer is not backed by the tokenizers library", type(tokenizer).__name__)
    if tokenizer.eos_token_id is None:
        # Left out, llama.cpp would end answers at token 11 (byte-level) or 2 (SentencePiece-style), whatever those are.
        raise ArtefactError(
            "the tokenizer names no end-of-text token",
            where="tokenizer_config.json: eos_token",
            hint="Set eos_token in tokenizer_config.json.",
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    model: dict[str, Any] = data["model"]
    if model["type"] != "BPE":
        raise _no_counterpart("the tokenizer is no byte-pair encoding", str(model["type"]))
    added = {entry["id"]: entry for entry in data.get("added_tokens") or []}
    tokens, kinds = _pieces(model, added, tokenizer.unk_token_id, num_rows)
    bos = tokenizer.bos_token_id
    encoded = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    common: dict[str, Any] = {
        "tokens": tokens,
        "kinds": kinds,
        "special": _special_ids(tokenizer),
        "add_bos": bos is not None and encoded[:1] == [bos],
        "add_eos": encoded[-1:] == [tokenizer.eos_token_id],
        "chat_template": _chat_template(tokenizer),
    }
    notes = [
        f"text beside {entry['content']!r} may be split differently: llama.cpp does not strip spaces around it"
        for entry in added.values()
        if entry.get("lstrip") or entry.get("rstrip")
    ]
    if model.get("byte_fallback"):
        if pre not in (None, "default"):
            raise _no_counterpart("a SentencePiece-style tokenizer has no pre-tokenizer to name", pre)
        return GgufVocabulary(
            model="llama",
            pre="default",
            merges=None,
            scores=_scores(model, tokens),
            space_prefix=_space_prefix(data, notes),
            notes=tuple(notes),
            **common,
        )
    if _is_nfc(data.get("normalizer")):
        notes.append("llama.cpp does not normalise: text that is not in Unicode's NFC form gives other ids")
    return GgufVocabulary(
        model="gpt2",
        pre=pre or pre_tokenizer_name(data),
        merges=tuple(_merge_line(merge) for merge in model["merges"]) or (_NO_MERGE,),
        scores=None,
        space_prefix=False,
        notes=tuple(notes),
        **common,
    )


def pre_tokenizer_name(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE, from its `tokenizer.json`.

    Raises:
        UnsupportedModelError: none of the known structures, with what was found.
    """
    steps = tuple(_step(step) for step in _sequence(data.get("pre_tokenizer"), "pretokenizers"))
    model = data["model"]
    ignore_merges = bool(model.get("ignore_merges"))
    normalizer = data.get("normalizer")
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    name = _PRE_TOKENIZERS.get((steps, ignore_merges))
    if name is None or odd or not (normalizer is None or _is_nfc(normalizer)):
        found = [*steps, *(["whole words skip the merges"] if ignore_merges else []), *odd]
        if normalizer is not None and not _is_nfc(normalizer):
            found.append(f"normalizer {normalizer['type']}")
        raise UnsupportedModelError(
            "the tokenizer splits text in a way that is not known to match one of llama.cpp's pre-tokenizers",
            where="tokenizer.json",
            got="; ".join(found) or "no pre-tokenizer",
            expected="that of " + ", ".join(_PRE_TOKENIZERS.values()),
            hint="If you know its name in llama.cpp (tokenizer.ggml.pre), pass it: --pre NAME.",
        )
    return name


def _no_counterpart(what: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp's Llama family has no counterpart: {what}",
        where="tokenizer",
        got=got,
        expected="byte-level or SentencePiece-style BPE",
    )


def _pieces(
    model: Mapping[str, Any], added: Mapping[int, Any], unknown: int | None, num_rows: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    pieces: dict[int, str] = {number: piece for piece, number in model["vocab"].items()}
    pieces.update({number: entry["content"] for number, entry in added.items()})
    if pieces and max(pieces) >= num_rows:
        raise ArtefactError(
            "the tokenizer has ids that the embedding has no rows for",
            where="tokenizer",
            got=max(pieces),
            expected=f"ids below {num_rows}",
        )
    byte_fallback = bool(model.get("byte_fallback"))
    tokens, kinds = [], []
    for number in range(num_rows):
        piece = pieces.get(number)
        tokens.append(f"[PAD{number}]" if piece is None else piece)
        if piece is None:
            kind = TokenType.UNUSED
        elif byte_fallback and number == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        elif byte_fallback and _BYTE_PIECE.fullmatch(piece):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        kinds.append(int(kind))
    return tuple(tokens), tuple(kinds)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    return {kind: int(number) for kind, number in ids.items() if number is not None}


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def _sequence(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, nested sequences laid flat."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _sequence(inner, key)]


def _step(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "byte-level with its regex" if step.get("use_regex", True) else "byte-level"
    if kind == "Digits" and step.get("individual_digits"):
        return "single digits"
    pattern = step.get("pattern")
    if kind == "Split" and isinstance(pattern, dict) and step.get("behavior") == "Isolated" and not step.get("invert"):
        return f"split {pattern.get('Regex', pattern)}"
    return json.dumps(step, sort_keys=True)


def _is_nfc(normalizer: Any) -> bool:
    return [step["type"] for step in _sequence(normalizer, "normalizers")] == ["NFC"]


def _merge_line(merge: list[str] | str) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _scores(model: Mapping[str, Any], tokens: tuple[str, ...]) -> tuple[float, ...]:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return tuple(-float(ranks[token]) if token in ranks else _NEVER_JOINED for token in tokens)


def _space_prefix(data: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether a SentencePiece-style tokenizer puts a space before the text; refuses what llama.cpp cannot follow."""
    prepends = False
    for step in _sequence(data.get("normalizer"), "normalizers"):
        if step == {"type": "Prepend", "prepend": "▁"}:
            prepends = True
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            raise _no_counterpart("the tokenizer normalises text", json.dumps(step, sort_keys=True))
    for step in _sequence(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" or step.get("replacement") != "▁" or step.get("split"):
            raise _no_counterpart("the tokenizer splits text before its merges", json.dumps(step, sort_keys=True))
        prepends = step.get("prepend_scheme") in ("always", "first")
        if prepends:
            notes.append(
                "text that begins with a space, or follows a special token, gets one space more than in transformers: "
                "llama.cpp adds one always, as SentencePiece does"
            )
    return prepends
