"""`ctxext data build | stats | sample`: the data side alone, without a model's weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctxext.data.order import Cursor, Share, windows_after
from ctxext.data.packing import WindowBuilder
from ctxext.data.sources import source_parts
from ctxext.data.streaming import StreamedWindows
from ctxext.errors import UsageError
from ctxext.files import write_bytes_atomic, write_json_atomic
from ctxext.model.load import load_config, load_tokenizer, resolve_source, short_name
from ctxext.pipeline.data_picture import length_picture
from ctxext.pipeline.data_statistics import DataStatistics, statistics_of
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.training_data import TrainingData, prepare_training_data, window_tokens
from ctxext.pipeline.window_view import WindowView, render_window, view_window
from ctxext.planning.data_plan import source_words
from ctxext.recipe.data import STREAMED
from ctxext.recipe.schema import Recipe
from ctxext.rope.families import base_ropes

# Of text that is streamed in training, statistics look at this much.
_STREAMED_TOKENS = 10_000_000


def data_build(
    recipe: Recipe, reporter: Reporter, *, everything: bool = False, num_processes: int | None = None
) -> list[str]:
    """Tokenise what training needs (or everything) into the cache; lines that say what there is now."""
    if recipe.data.cache == STREAMED:
        raise UsageError(
            "this recipe stores no tokens, so there is nothing to build",
            where="data.cache",
            got=STREAMED,
            hint="Leave data.cache out, or name a folder.",
        )
    data, _ = _prepare(recipe, reporter, everything, num_processes)
    cache = data.cache
    lines = [
        f"{source_words(source)}: {tokens:,} tokens in {int((cache.source_of == number).sum()):,} documents"
        for number, (source, tokens) in enumerate(zip(recipe.data.sources, cache.tokens_by_source, strict=True))
    ]
    return [*lines, f"training reads {data.selection.num_tokens:,} of these tokens", *data.notes]


def data_stats(
    recipe: Recipe,
    reporter: Reporter,
    *,
    folder: Path | None = None,
    everything: bool = False,
    num_processes: int | None = None,
) -> tuple[DataStatistics, Path]:
    """Measure the training text and draw its lengths; returns the numbers and the folder of pictures and JSON.

    Raises:
        CtxextError: what is wrong with sources or recipe; a selection that training would refuse is no error here.
    """
    data, tokenizer = _prepare(recipe, reporter, everything, num_processes)
    statistics = statistics_of(recipe, data, tokenizer)
    folder = folder or Path("runs") / f"data-{short_name(recipe.model.source)}-{recipe.target_length}"
    picture = length_picture(
        data.cache.lengths,
        data.selection.ends - data.selection.begins,
        window_tokens=window_tokens(recipe),
        target_length=recipe.target_length,
    )
    write_bytes_atomic(folder / "lengths.png", picture.png)
    write_bytes_atomic(folder / "lengths.svg", picture.svg)
    write_json_atomic(folder / "statistics.json", statistics.to_json())
    return statistics, folder


def data_sample(recipe: Recipe, reporter: Reporter, *, num_windows: int = 2) -> list[WindowView]:
    """The first windows of training, as training will read them.

    Raises:
        CtxextError: what is wrong with sources or recipe.
        UsageError: no window asked for.
    """
    if num_windows < 1:
        raise UsageError("nothing to show", where="--windows", got=num_windows, expected="1 or more")
    if recipe.data.cache == STREAMED:
        tokenizer = load_tokenizer(resolve_source(recipe.model.source, recipe.model.revision))
        streamed = StreamedWindows(recipe.data, tokenizer, recipe.target_length)
        windows = streamed.step_windows(Cursor(recipe.train.seed, 0), num_windows, Share())
        return [view_window(window, tokenizer, 0, index) for index, window in enumerate(windows)]
    data, tokenizer = _prepare(recipe, reporter, False, None)
    builder = WindowBuilder(data.cache, recipe.data, tokenizer, recipe.target_length, data.selection)
    places = windows_after(Cursor(recipe.train.seed, 0), num_windows, builder.num_windows)
    return [view_window(builder.build(*place), tokenizer, *place) for place in places]


def _prepare(
    recipe: Recipe, reporter: Reporter, everything: bool, num_processes: int | None
) -> tuple[TrainingData, Any]:
    if everything:
        _refuse_endless(recipe)
    source = resolve_source(recipe.model.source, recipe.model.revision)
    tokenizer = load_tokenizer(source)
    streamed = recipe.data.cache == STREAMED
    if streamed:  # what it would read first, in the default cache
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": None})})
    data = prepare_training_data(
        recipe,
        tokenizer,
        reporter,
        original_length=base_ropes(load_config(source), recipe.on_existing)[0].original_length,
        everything=everything,
        most_tokens=_STREAMED_TOKENS if streamed else None,
        num_processes=num_processes,
        allow_short=True,
    )
    return data, tokenizer


def _refuse_endless(recipe: Recipe) -> None:
    for number, source in enumerate(recipe.data.sources):
        if any(part.endless for part in source_parts(source, recipe.data.seed + number)):
            raise UsageError(
                "this source has no end, so all of it cannot be read",
                where=f"data.sources[{number}] ({source.kind})",
                hint="Leave --all out to read what training needs.",
            )


def print_statistics(console: Console, recipe: Recipe, statistics: DataStatistics, folder: Path) -> None:
    """Tables and sentences that fit 80 columns."""
    console.print(_source_table(statistics))
    console.print(_mixture_table(recipe, statistics))
    long = f"{statistics.selection.long_share:.1%} of what is read is in documents of half a window"
    console.print(f"{long} ({-(-window_tokens(recipe) // 2):,} tokens) or more\n", markup=False)
    console.print(_ledger_table(statistics))
    if statistics.facts_share:
        _say(
            console,
            "facts",
            f"{statistics.facts_share:.0%} of the windows carry synthetic facts ({statistics.facts_style}): they train "
            "retrieval, which is not extension",
        )
    _say(console, "duplicates", statistics.duplicates.sentence())
    for line in statistics.contamination.lines():
        _say(console, "overlap", line)
    for note in statistics.notes:
        _say(console, "note", note)
    for warning in statistics.warnings:
        _say(console, "warning", warning)
    for problem in statistics.problems:
        _say(console, "problem", problem)
    console.print(f"Pictures and numbers: {folder}", markup=False, soft_wrap=True)


def print_json(values: Any) -> str:
    """JSON for `--json`."""
    return json.dumps(values, indent=2, ensure_ascii=False)


def print_samples(console: Console, views: Iterable[WindowView], *, full: bool = False) -> None:
    """Windows for the terminal, one below the other."""
    for view in views:
        console.print(render_window(view, full=full))
        console.print()


def _say(console: Console, what: str, text: str) -> None:
    style = {"problem": "bold red", "warning": "yellow", "overlap": "yellow"}.get(what, "bold")
    console.print(Text.assemble((f"{what}: ", style), text))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=bool(number))
    return table


def _source_table(statistics: DataStatistics) -> Table:
    table = _table("Sources", "source", "share", "documents", "tokens", "median", "longest", "tokens/word")
    for row in statistics.sources:
        per_word = f"{row.fertility.tokens_per_word:.2f}" if row.fertility.num_words else "-"
        table.add_row(
            Text(row.name),
            f"{row.weight:.0%}",
            f"{row.num_documents:,}",
            f"{row.num_tokens:,}",
            f"{row.median_tokens:,}",
            f"{row.longest_tokens:,}",
            per_word if row.fertility.level == "good" else Text(f"{per_word} !", style="yellow"),
        )
    return table


def _mixture_table(recipe: Recipe, statistics: DataStatistics) -> Table:
    """Tokens by source and length bucket: share of everything that is there, and of everything that is read."""
    rows = statistics.selection.table()
    before, after = (sum(values) for values in zip(*((r.tokens_before, r.tokens_after) for r in rows), strict=True))
    table = _table("Mixture by tokens a document", "source", "tokens a document", "there are", "", "read", "")
    last = None
    for row in rows:
        table.add_row(
            Text("" if row.source == last else source_words(recipe.data.sources[row.source])),
            row.bucket,
            f"{row.tokens_before:,}",
            f"{row.tokens_before / max(before, 1):.1%}",
            f"{row.tokens_after:,}",
            f"{row.tokens_after / max(after, 1):.1%}",
        )
        last = row.source
    return table


def _ledger_table(statistics: DataStatistics) -> Table:
    table = _table("Kept and dropped", "what", "documents", "tokens")
    for row in statistics.ledger:
        table.add_row(Text(row.what), *("" if n is None else f"{n:,}" for n in (row.num_documents, row.num_tokens)))
    return table
