"""What there is to know about a recipe's training text before anything is trained: numbers only, no printing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ctxext.data.contamination import ContaminationResult
from ctxext.data.duplicates import Duplicates, find_duplicates
from ctxext.data.fertility import Fertility, fertility
from ctxext.data.packing import WindowBuilder
from ctxext.data.sampling import Selection, too_short
from ctxext.errors import CtxextError
from ctxext.pipeline.training_data import TrainingData, decoded, window_tokens
from ctxext.planning.data_plan import source_words
from ctxext.recipe.schema import Recipe

# Documents of a source that are enough to know how many tokens a word takes.
_FERTILITY_DOCUMENTS = 300


@dataclass(frozen=True)
class SourceRow:
    """One source.

    Attributes:
        weight: share of the training tokens that it is to give.
        num_tokens: in its documents, separators included.
        median_tokens, longest_tokens: of a document.
    """

    name: str
    weight: float
    num_documents: int
    num_tokens: int
    median_tokens: int
    longest_tokens: int
    fertility: Fertility


@dataclass(frozen=True)
class LedgerRow:
    """Tokens that were met and are not in windows, or are; documents where whole ones are meant."""

    what: str
    num_documents: int | None
    num_tokens: int | None


@dataclass(frozen=True)
class DataStatistics:
    """All of it.

    Attributes:
        problems: what training would refuse.
        warnings: what it would accept and people should know.
    """

    sources: tuple[SourceRow, ...]
    selection: Selection
    ledger: tuple[LedgerRow, ...]
    duplicates: Duplicates
    contamination: ContaminationResult
    facts_share: float
    facts_style: str | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "sources": [
                {**asdict(row), "fertility": {**asdict(row.fertility), "level": row.fertility.level}}
                | {"tokens_per_word": row.fertility.tokens_per_word if row.fertility.num_words else None}
                for row in self.sources
            ],
            "selection": self.selection.to_json(),
            "ledger": [asdict(row) for row in self.ledger],
            "duplicates": {
                **asdict(self.duplicates),
                "exact_share": self.duplicates.exact_share,
                "near_share": self.duplicates.near_share,
            },
            "contamination": self.contamination.to_json(),
            "facts": {"share": self.facts_share, "style": self.facts_style},
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def statistics_of(recipe: Recipe, data: TrainingData, tokenizer: Any) -> DataStatistics:
    """Measure prepared training data; texts are decoded from the cache, document by document."""
    cache, selection = data.cache, data.selection
    rows = tuple(_source_rows(recipe, data, tokenizer))
    problems = [str(error)] if (error := too_short(selection, recipe.data, window_tokens(recipe))) else []
    ledger = list(_left_out(recipe, data))
    try:
        packed = WindowBuilder(cache, recipe.data, tokenizer, recipe.target_length, selection).layout.ledger
    except CtxextError as failure:
        problems.append(str(failure))
    else:
        ledger += [LedgerRow(f"dropped: {reason}", None, count) for reason, count in packed.dropped.items()]
        ledger.append(LedgerRow("in windows", None, packed.tokens_kept))
        if packed.num_padding:
            ledger.append(LedgerRow("padding added, never learned", None, packed.num_padding))
    warnings = [f"{row.name}: {said}" for row in rows if (said := row.fertility.sentence())]
    return DataStatistics(
        sources=rows,
        selection=selection,
        ledger=tuple(ledger),
        duplicates=find_duplicates(decoded(cache, tokenizer, range(len(cache.lengths))), seed=recipe.data.seed),
        contamination=data.contamination,
        facts_share=recipe.data.facts.share if recipe.data.facts else 0.0,
        facts_style=recipe.data.facts.style if recipe.data.facts else None,
        problems=tuple(problems),
        warnings=tuple(warnings),
        notes=data.notes,
    )


def _source_rows(recipe: Recipe, data: TrainingData, tokenizer: Any) -> Iterator[SourceRow]:
    total = sum(source.weight for source in recipe.data.sources)
    for number, source in enumerate(recipe.data.sources):
        documents = np.flatnonzero(data.cache.source_of == number)
        lengths = data.cache.lengths[documents]
        # Evenly over all of them: the first ones may all come from one file.
        looked_at = documents[:: max(len(documents) // _FERTILITY_DOCUMENTS, 1)][:_FERTILITY_DOCUMENTS]
        texts = decoded(data.cache, tokenizer, looked_at.tolist())
        yield SourceRow(
            name=source_words(source),
            weight=source.weight / total,
            num_documents=len(documents),
            num_tokens=int(lengths.sum()),
            median_tokens=int(np.median(lengths)),
            longest_tokens=int(lengths.max()),
            fertility=fertility(zip(texts, data.cache.lengths[looked_at].tolist(), strict=True)),
        )


def _left_out(recipe: Recipe, data: TrainingData) -> Iterator[LedgerRow]:
    """Everything that was met and is not read, and what is."""
    for source, counts in zip(recipe.data.sources, data.cache.bad_rows, strict=False):
        for kind, table in (("unusable", counts["bad"]), ("left out", counts["left_out"])):
            for reason, tally in table.items():
                yield LedgerRow(f"{source.kind}, {kind}: {reason}", int(tally["count"]), None)
    yield LedgerRow("tokenised", len(data.cache.lengths), int(data.cache.lengths.sum()))
    for entry in data.selection.left_out:
        name = recipe.data.sources[entry.source].kind
        yield LedgerRow(f"{name}, not read: {entry.reason}", entry.num_documents, entry.num_tokens)
    yield LedgerRow("read in training", len(np.unique(data.selection.documents)), data.selection.distinct_tokens)
    if repeated := data.selection.num_tokens - data.selection.distinct_tokens:
        yield LedgerRow("of these read again, to keep the shares", None, repeated)
