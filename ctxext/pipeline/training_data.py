"""From a recipe to the documents that training reads: tokenised, checked against the evaluation, chosen by length.

    sources -> token cache -> contamination guard -> selection -> windows

The guard looks for the texts of the recipe's own suite: the documents of its haystacks (of tasks and perplexity alike),
the documents of question files, and the wordings of facts and questions, which it learns from drawn samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctxext.data.cache import TokenCache, folder_of
from ctxext.data.cache_build import build_cache
from ctxext.data.contamination import WORDING, ContaminationResult, Guard, fixed_parts
from ctxext.data.sampling import Selection, choose_documents, target_advice
from ctxext.data.streaming import require_streamable
from ctxext.data.tokenize import separator_of
from ctxext.errors import ArtefactError
from ctxext.evaluation.haystack import NOISE, TextFiles, load_haystack
from ctxext.evaluation.suite import Suite, load_suite
from ctxext.evaluation.tasks.base import SPREAD_DEPTH, Draft, Task
from ctxext.evaluation.tasks.bodies import InText
from ctxext.evaluation.tasks.qa import QaTask
from ctxext.files import fingerprint, read_json, write_json_atomic
from ctxext.pipeline.reporter import Reporter
from ctxext.recipe.schema import Recipe

# Changes when the same texts could be judged otherwise.
_GUARD_VERSION = 1
_NUM_DRAFTS = 100
_NUM_FILE_DRAFTS = 8
# Wordings hardly depend on the length; tasks that draw longer lists for longer prompts are quick at this one.
_DRAFT_LENGTH = 4096
_DECODED_AT_ONCE = 256
# Text that stands in for the user's own says nothing about the length that the user needs.
_STAND_INS = ("python-stdlib", "python-docs", "generated-words")


@dataclass(frozen=True)
class TrainingData:
    """What training reads.

    Attributes:
        notes: what people should know before training begins.
    """

    cache: TokenCache
    selection: Selection
    contamination: ContaminationResult
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For the run folder, from which report and model card read it."""
        return {
            "num_documents": len(self.cache.lengths),
            "tokens_by_source": list(self.cache.tokens_by_source),
            "bad_rows": list(self.cache.bad_rows),
            "selection": self.selection.to_json(),
            "contamination": self.contamination.to_json(),
            "notes": list(self.notes),
        }


def window_tokens(recipe: Recipe) -> int:
    """Tokens of a training row."""
    return recipe.data.windows.length or recipe.target_length


def training_tokens(recipe: Recipe) -> int:
    """Tokens that the whole training sees."""
    return recipe.train.steps * recipe.train.windows_per_step * window_tokens(recipe)


def prepare_training_data(
    recipe: Recipe,
    tokenizer: Any,
    reporter: Reporter,
    *,
    original_length: int,
    everything: bool = False,
    most_tokens: int | None = None,
    num_processes: int | None = None,
    allow_short: bool = False,
) -> TrainingData:
    """Build or open the token cache, check it against the evaluation, and choose what is read.

    Args:
        everything: read all of every source, not only what training needs.
        most_tokens: read for no more training tokens than these.
        allow_short: leave it to the caller to judge a selection without long documents.

    Raises:
        CtxextError: whatever is wrong with sources, their lengths, or their overlap with the evaluation.
    """
    num_tokens = min(training_tokens(recipe), most_tokens or training_tokens(recipe))
    with reporter.progress("read and tokenise training text") as progress:
        cache = build_cache(
            tokenizer,
            recipe.data,
            num_tokens=None if everything else num_tokens,
            window_tokens=window_tokens(recipe),
            num_processes=num_processes,
            progress=progress,
        )
    contamination = check_contamination(recipe, cache, tokenizer)
    selection = choose_documents(
        cache.lengths,
        cache.source_of,
        recipe.data,
        num_tokens=num_tokens,
        window_tokens=window_tokens(recipe),
        seed=recipe.data.seed,
        excluded=contamination.excluded,
        allow_short=allow_short,
    )
    advice = _advice(recipe, cache, original_length)
    said = contamination.sentence()
    if contamination.found:
        said += "; data.contamination=exclude leaves them out"
    notes = (*cache.messages, *selection.notes, said, *([advice] if advice else []))
    return TrainingData(cache, selection, contamination, notes)


def report_notes(data: dict[str, Any]) -> list[str]:
    """What a report must say about training text, from a run's `data.json`: overlap, and rows that were unusable."""
    contamination = data["contamination"]
    clean = "references" in contamination and not contamination["found"]
    notes = [] if clean else [f"Training text: {contamination['sentence']}."]
    for number, counts in enumerate(data["bad_rows"]):
        for reason, tally in counts["bad"].items():
            notes.append(
                f"{tally['count']:,} unusable rows or files of data.sources[{number}] were left out: {reason}."
            )
    return notes


def check_contamination(recipe: Recipe, cache: TokenCache, tokenizer: Any) -> ContaminationResult:
    """Compare every document of the cache with the texts of the recipe's suite.

    What was found is kept beside the cache, so that going on with a run need not read everything again.

    Raises:
        ArtefactError: they overlap, and `data.contamination` is `refuse`.
    """
    guard = guard_for(load_suite(recipe.evaluation.suite))
    key = fingerprint([_GUARD_VERSION, cache.sha256, guard.fingerprint], digits=32)
    kept = folder_of(recipe.data) / "contamination" / f"{key}.json"
    if kept.is_file():
        return ContaminationResult.from_json(read_json(kept)).under(recipe.data.contamination)
    texts = decoded(cache, tokenizer, range(len(cache.lengths))) if guard.references else ()
    found = guard.scan(texts, "report", cache.origin)
    write_json_atomic(kept, found.to_json())
    return found.under(recipe.data.contamination)


def streamed_json(recipe: Recipe) -> dict[str, Any]:
    """What `data.json` holds for text that is read while training, which nobody can check before.

    Raises:
        UsageError: the recipe asks for what needs the whole text.
    """
    require_streamable(recipe.data)
    sentence = "contamination not checked: the text was read while training, without a cache"
    return {"contamination": {"found": False, "sentence": sentence}, "bad_rows": [], "notes": [sentence]}


def decoded(cache: TokenCache, tokenizer: Any, documents: Iterable[int]) -> Iterator[str]:
    """The documents' text, without separators."""
    behind = len(separator_of(tokenizer))
    waiting: list[list[int]] = []
    for document in documents:
        waiting.append(cache.ids(document)[:-behind].tolist())
        if len(waiting) == _DECODED_AT_ONCE:
            yield from _decode(tokenizer, waiting)
            waiting = []
    if waiting:
        yield from _decode(tokenizer, waiting)


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def _advice(recipe: Recipe, cache: TokenCache, original_length: int) -> str | None:
    own = [number for number, source in enumerate(recipe.data.sources) if source.kind not in _STAND_INS]
    return target_advice(cache.lengths[np.isin(cache.source_of, own)], original_length, recipe.target_length)


def guard_for(suite: Suite) -> Guard:
    """A guard that knows the texts of a suite.

    Raises:
        CtxextError: a haystack or file that is not there.
    """
    documents: dict[str, Sequence[str]] = {}
    wordings: dict[str, Sequence[str]] = {}
    choices = [block.haystack or suite.haystack for block in suite.perplexity or ()]
    for task in suite.members:
        if isinstance(task, QaTask) and task.file:
            documents[f"question file {Path(task.file).name}"] = _documents_of(suite, task)
            continue
        drafts = _drafts(suite, task, _NUM_DRAFTS)
        if isinstance(drafts[0].body, InText):
            choices.append(task.own_haystack or suite.haystack)
        # The beginning of the answer is left out: where it alone holds words (cloze), they are common knowledge.
        samples = [
            [draft.intro, draft.question, *(item.text for item in getattr(draft.body, "items", ()))] for draft in drafts
        ]
        if parts := fixed_parts(samples):
            wordings[f"{WORDING}{task.cell_name}"] = parts
    for choice in choices:
        haystack = load_haystack(choice)
        if haystack.documents is not None:
            # Without this machine's folders: the name goes into reports and model cards.
            name = haystack.name
            if isinstance(choice, TextFiles):
                name = f"text {', '.join(Path(path).name for path in choice.text)}"
            documents[f"haystack {name}"] = haystack.documents
        elif haystack.name == "noise":
            documents["haystack noise"] = (NOISE,)
    return Guard(documents, wordings)


def _drafts(suite: Suite, task: Task, count: int) -> list[Draft]:
    """Samples at the depths that the suite asks for, in turn."""
    depths = [SPREAD_DEPTH] if task.spread else [d for row in task.grid or suite.grid for d in row.depths]
    return [
        task.draft(random.Random(f"wording/{number}"), _DRAFT_LENGTH, depths[number % len(depths)])
        for number in range(count)
    ]


def _documents_of(suite: Suite, task: Task) -> list[str]:
    """The documents of a question file: those of some samples, each with its fillers until there are no more.

    A sample leaves out what holds its answer by chance, which another sample does not.
    """
    texts: dict[str, None] = {}
    for draft in _drafts(suite, task, _NUM_FILE_DRAFTS):
        body: Any = draft.body
        texts.update(dict.fromkeys(item.text for item in body.items))
        filler = random.Random("documents")
        with suppress(ArtefactError):  # the file's documents are used up
            while True:
                texts[body.filler(filler)] = None
    return list(texts)
