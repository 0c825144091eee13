"""What a recipe trains on: `data` with its sources, lengths, windows and synthetic facts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ctxext.errors import CtxextError
from ctxext.recipe.base import Block, PositiveInt, Seed, Share

_DEFAULT_CHUNKS = 2
# The value of `data.cache` that means no cache.
STREAMED = "none"
_FILE_KINDS = ("text", "code", "tokens")


class WindowsBlock(Block):
    """Training rows.

    Attributes:
        mode: `full-length` (every row spans the target length) or `skip-wise` (PoSE: short rows whose chunks lie far
            apart in position; the low-resource mode).
        length: tokens a row; the target length when left out (full-length only).
        chunks: how many runs of consecutive positions a skip-wise row has.
        skips: how the gaps of a skip-wise row are drawn: `uniform` (all together uniform over what is free) or
            `full-range` (the last position is always the last of the target length).
        packing: `concatenate` (documents in order with separators, cut where a row ends) or `best-fit` (no document
            that fits into a row is split; Ding et al. 2024, arXiv:2404.10830).
        positions: of full-length rows: `consecutive`, `per-document` (from 0 at every document start) or
            `random-shift` (consecutive from a random start; the row is then shorter than the target length).
    """

    mode: Literal["full-length", "skip-wise"] = "full-length"
    length: PositiveInt | None = None
    chunks: Annotated[int, Field(ge=2, le=16)] = _DEFAULT_CHUNKS
    skips: Literal["uniform", "full-range"] = "uniform"
    packing: Literal["concatenate", "best-fit"] = "concatenate"
    positions: Literal["consecutive", "per-document", "random-shift"] = "consecutive"

    @model_validator(mode="after")
    def _fields_belong_to_mode(self) -> WindowsBlock:
        if self.mode == "skip-wise":
            if self.length is None:
                raise ValueError("skip-wise windows need windows.length (tokens a row)")
            if self.positions != "consecutive":
                raise ValueError("skip-wise windows have positions of their own; leave windows.positions out")
        elif self.positions == "random-shift":
            if self.length is None:
                raise ValueError("positions: random-shift needs windows.length, below the target length")
        elif self.length is not None:
            raise ValueError("full-length windows span target_length; leave windows.length out or use mode: skip-wise")
        if self.mode == "full-length" and (self.chunks != _DEFAULT_CHUNKS or self.skips != "uniform"):
            raise ValueError("full-length windows have no gaps; leave windows.chunks and skips out or use skip-wise")
        if self.skips == "full-range" and self.chunks < 3:
            raise ValueError(
                "skips: full-range with 2 chunks never shows the middle of the target length; use chunks: 3 or more"
            )
        if self.length is not None and self.length < self.chunks:
            raise ValueError(f"a window of {self.length} tokens cannot have {self.chunks} chunks")
        return self


class SourceBlock(Block):
    """One source of training text.

    Attributes:
        kind: `python-stdlib` (docstrings and sources of this Python, without its documentation topics), `python-docs`
            (those topics; they are the evaluation's default haystack), `text` (.txt, .md, .rst, .jsonl, .json,
            .parquet, also compressed), `code` (folders, each one long document), `dataset` (anything that Hugging Face
            `datasets` reads: a hub id, or `json`, `parquet`, `csv` with paths), `tokens` (.npy or .bin arrays of ids),
            `generated-words` (seeded sentences of common words).
        paths: files, folders or glob patterns, for `text`, `code` and `tokens`; data files, for `dataset`.
        name, config, split, revision, streaming: of a `dataset`.
        text_field: the field of a row that holds the text.
        messages_field: the field of a row that holds chat messages instead; they go through the tokenizer's chat
            template, and only the assistant's turns are learned.
        include: file name patterns of a `code` source.
        weight: share of the tokens, relative to the other sources.
        min_tokens, max_tokens: shorter documents are dropped, longer ones cut into several.
        max_bad_rows: rows and files that may be unusable before the build stops.
    """

    kind: Literal["python-stdlib", "python-docs", "text", "code", "dataset", "tokens", "generated-words"]
    paths: list[str] = Field(default_factory=list)
    name: str | None = None
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    messages_field: str | None = None
    revision: str | None = None
    streaming: bool = True
    include: list[str] = Field(default_factory=list)
    weight: Annotated[float, Field(gt=0)] = 1.0
    min_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    max_bad_rows: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fields_belong_to_kind(self) -> SourceBlock:
        if self.kind in _FILE_KINDS and not self.paths:
            raise ValueError(f"kind: {self.kind} needs paths")
        if self.kind not in (*_FILE_KINDS, "dataset") and self.paths:
            raise ValueError(f"kind: {self.kind} takes no paths; kind: text does")
        if (self.kind == "dataset") != (self.name is not None):
            raise ValueError("kind: dataset needs a name (a hub id, or json, parquet, csv), and only it takes one")
        if self.config is not None and self.kind != "dataset":
            raise ValueError(f"kind: {self.kind} takes no config; kind: dataset does")
        if self.messages_field is not None and self.kind not in ("text", "dataset"):
            raise ValueError(f"kind: {self.kind} has no rows with messages; text (.jsonl) and dataset have")
        if self.include and self.kind != "code":
            raise ValueError(f"kind: {self.kind} takes no include; kind: code does")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        return self


class FactsBlock(Block):
    """Synthetic retrieval data mixed into training windows, declared because it trains retrieval, not extension.

    Attributes:
        share: share of the windows that carry facts and questions about them.
        style: `records` (statements in prose), `tables` (key-value tables), `references` (facts that name one another,
            several hops) or `mixed` (all three): wordings, keys and values unlike every evaluation task; or `passkey`
            (the evaluation's own wording; for the tiny demonstration model only).
        per_window: facts in one such window, each asked once.
    """

    share: Share
    style: Literal["records", "tables", "references", "mixed", "passkey"] = "records"
    per_window: Annotated[int, Field(ge=1, le=8)] = 1

    @model_validator(mode="after")
    def _one_passkey(self) -> FactsBlock:
        if self.style == "passkey" and self.per_window > 1:
            raise ValueError("a question for the pass key has one answer; per_window above 1 needs style: records")
        return self


class LengthBlock(Block):
    """Which documents are taken more often, by their length; sources keep their weights.

    Attributes:
        long_from: tokens from which a document counts as long; half a window when left out.
        long_share: share of every source's tokens that comes from long documents (0.6 for 60/40); as the source has
            them when left out.
        upsample: how much more often a long document is taken than a short one (Fu et al. 2024, arXiv:2402.10171);
            excludes long_share.
        allow_short: train although less than a tenth of full-length windows' tokens come from documents of at least
            half a window.
    """

    long_from: PositiveInt | None = None
    long_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    upsample: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    allow_short: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> LengthBlock:
        if self.long_share is not None and self.upsample is not None:
            raise ValueError("long_share and upsample both set how often long documents are taken; give one of them")
        return self


class DataBlock(Block):
    """What is trained on.

    Attributes:
        preset: a mixture from the literature, see `ctxext list data-presets`; its sources then stand in `sources`.
        length: length-aware sampling.
        contamination: what happens when training text holds what the evaluation asks about: `refuse`, `exclude`
            (documents that overlap are left out, with counts) or `report`.
        cache: folder of tokenised sources; below the user's cache folder when left out. `none` stores nothing: windows
            are made while training, for text that no disk holds (see `ctxext.data.streaming`).
        seed: of orders, windows, facts.
    """

    sources: Annotated[list[SourceBlock], Field(min_length=1)] = Field(
        default_factory=lambda: [SourceBlock(kind="python-stdlib")]
    )
    preset: str | None = None
    windows: WindowsBlock = WindowsBlock()
    length: LengthBlock = LengthBlock()
    facts: FactsBlock | None = None
    contamination: Literal["refuse", "exclude", "report"] = "report"
    cache: str | None = None
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _preset_gives_sources(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(name, str):
            return values
        from ctxext.recipe.presets import preset_sources  # it is made of this module's blocks

        try:
            sources = preset_sources(name)
        except CtxextError:
            return values  # `_preset_exists` says it, on the right line
        given = values.get("sources")
        if given is not None and _as_blocks(given) != _as_blocks(sources):
            raise ValueError(f"preset: {name} names the sources; leave out preset or sources")
        return {**values, "sources": sources}

    @field_validator("preset")
    @classmethod
    def _preset_exists(cls, name: str | None) -> str | None:
        if name is not None:
            from ctxext.recipe.presets import load_preset

            try:
                load_preset(name)
            except CtxextError as error:
                raise ValueError(str(error)) from error
        return name


def _as_blocks(sources: Any) -> list[SourceBlock] | None:
    """Sources as blocks, None when they are not of that form."""
    try:
        return [SourceBlock.model_validate(source) for source in sources]
    except (TypeError, ValidationError):
        return None
