"""Perplexity of plain text: over sliding windows, and by position in texts read in one piece.

Over sliding windows a model sees at most `window` tokens, and of every window but the first only the last `stride`
count, so each token's loss counts once and has at least `window - stride` tokens of context: the number that papers
call sliding-window perplexity. By position a text is read from its first token to its last, so a block far behind
shows whether the model still predicts there.

Both run through the backend that answers the prompts, so no logits of a whole text and no mask ever exist. The texts of
one measurement do not overlap: they are the units over which intervals and paired comparisons are made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ctxext.data.boundaries import encode_plain, leading_marker
from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.backend import Backend, NoAnswerError, batches, is_out_of_memory
from ctxext.evaluation.grid import RelativeLength
from ctxext.evaluation.haystack import HaystackReader, load_haystack
from ctxext.evaluation.prompt import hash_ids
from ctxext.evaluation.statistics import MeanDifference, counted, paired_difference
from ctxext.evaluation.suite import PerplexityBlock, Suite
from ctxext.files import append_json_line, fingerprint, read_json, read_json_lines, write_json_atomic

# Beyond it a float has no exponential; a loss like that means a broken model, not a large perplexity.
_LARGEST_LOSS = 700.0

Kind = Literal["sliding-window", "by-position"]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Window:
    """Positions [start, end) of a text that the model sees together; those from `scored` on count."""

    start: int
    scored: int
    end: int


@dataclass(frozen=True)
class LossBlock:
    """Mean loss in nats of the `num_tokens` predicted tokens at positions [start, end) of the text."""

    start: int
    end: int
    loss: float
    num_tokens: int


@dataclass(frozen=True)
class TextLoss:
    """One text's losses.

    Attributes:
        text_sha256: of its token ids; the same hash in another arm's result is the same text.
    """

    text_sha256: str
    blocks: list[LossBlock]
    seconds: float

    def mean(self, start: int = 0, end: int | None = None) -> float | None:
        """Mean loss of the blocks inside positions [start, end), every token counting once; None without one."""
        inside = [block for block in self.blocks if block.start >= start and (end is None or block.end <= end)]
        return pooled(inside)


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity.json` holds.

    Attributes:
        length_tokens: of every text.
        blocks: by position, over all texts.
        interval_95: of the perplexity, Student's t over the texts; None for a single one.
        missing: why there is nothing, if so.
    """

    kind: Kind
    window_tokens: int | None
    stride_tokens: int | None
    length_tokens: int
    num_tokens: int
    num_documents: int
    loss: float | None
    perplexity: float | None
    interval_95: list[float] | None
    haystack: str
    haystack_sha256: str
    identity_hash: str
    seconds: float
    missing: str | None = None
    blocks: list[LossBlock] = field(default_factory=list)
    documents: list[TextLoss] = field(default_factory=list)

    def sentence(self) -> str:
        """One sentence for people."""
        how = "read in one piece"
        if self.window_tokens is not None:
            how = f"window {self.window_tokens:,}, stride {self.stride_tokens:,}"
        where = f"{self.length_tokens:,} tokens of {self.haystack}, {how}"
        if self.perplexity is None:
            return f"Perplexity of {where}: not measured, {self.missing}."
        of = f"{counted(self.num_documents, 'text')} of {where}" + (f"; {self.missing}" if self.missing else "")
        if self.interval_95 is None:
            return f"Perplexity {self.perplexity:.2f} (no interval from one text; {of})."
        low, high = self.interval_95
        return f"Perplexity {self.perplexity:.2f} (95% interval {low:.2f} to {high:.2f}; {of})."


@dataclass(frozen=True)
class PerplexityDifference:
    """Two models on the same texts.

    Attributes:
        difference: of the mean loss of a text in nats, the first model minus the second, with its 95% interval.
    """

    difference: MeanDifference
    first_loss: float
    second_loss: float

    @property
    def increase(self) -> float:
        """Relative increase of the perplexity, 0.02 for 2%."""
        return relative_increase(self.difference.mean)

    @property
    def increase_95(self) -> tuple[float, float]:
        """Both ends of its 95% interval; -1 and infinity for a single text."""
        return relative_increase(self.difference.low), relative_increase(self.difference.high)

    def sentence(self, first: str, second: str) -> str:
        """One sentence, with a verdict."""
        low, high = self.increase_95
        texts = counted(self.difference.num_pairs, "text")
        figures = f"perplexity {math.exp(self.first_loss):.2f} against {math.exp(self.second_loss):.2f}"
        if math.isinf(high):
            return f"{first} against {second}: {self.increase:+.1%} ({figures}, one text, no interval)."
        verdict = "no difference shown"
        if low > 0:
            verdict = f"{first} is worse"
        elif high < 0:
            verdict = f"{first} is better"
        return (
            f"{first} against {second}: {self.increase:+.1%}, 95% interval {low:+.1%} to {high:+.1%} "
            f"({figures}, the same {texts}): {verdict}."
        )


@dataclass(frozen=True)
class _Job:
    """One measurement with every length resolved."""

    kind: Kind
    window: int | None
    stride: int | None
    length: int
    num_documents: int
    block_tokens: int
    reader: HaystackReader
    marker: list[int]
    seed: str

    def texts(self) -> list[list[int]]:
        """Token ids of the texts, the marker that begins every text included: one stream, cut into pieces.

        Raises:
            UsageError: the haystack is too short for so many.
        """
        room = self.length - len(self.marker)
        try:
            stream = self.reader.tokens(self.seed, room * self.num_documents)
        except UsageError as error:
            raise UsageError(
                f"the haystack is too short for {counted(self.num_documents, 'text')} of {self.length:,} tokens "
                "that do not overlap",
                where="perplexity",
                got=error.got,
                expected=f"at least {room * self.num_documents:,} tokens",
                hint="Ask for fewer documents, a shorter length or another haystack.",
            ) from error
        pieces = range(0, room * self.num_documents, room)
        return [[*self.marker, *stream[start : start + room]] for start in pieces]

    def windows(self) -> list[Window]:
        """What the model sees together, in order."""
        return text_windows(self.length, len(self.marker), self.window, self.stride)

    def num_seen(self) -> int:
        """Tokens that run through the model for one text."""
        return sum(len(self.marker) + window.end - window.start for window in self.windows())


def text_windows(num_tokens: int, num_marker: int, window: int | None, stride: int | None) -> list[Window]:
    """Windows over a text of `num_tokens` positions, of which the first `num_marker` begin every window.

    Every later position counts in exactly one window (but position 0, which nothing predicts). A last window that is
    not filled begins where it would have begun when full.

    Raises:
        ValueError: a stride that leaves a window's first counted token without context.
    """
    if window is None or stride is None:
        return [Window(num_marker, max(num_marker, 1), num_tokens)]
    room = window - num_marker
    if not 1 <= stride <= room - (num_marker == 0):
        raise ValueError(f"stride {stride} in windows of {window} with a marker of {num_marker}")
    windows = [Window(num_marker, max(num_marker, 1), min(num_marker + room, num_tokens))]
    while (scored := windows[-1].end) < num_tokens:
        windows.append(Window(scored + stride - room, scored, min(scored + stride, num_tokens)))
    return windows


def text_losses(
    backend: Backend,
    ids: Sequence[int],
    num_marker: int,
    windows: Sequence[Window],
    on_window: Callable[[int], None] = lambda num_tokens: None,
) -> Tensor:
    """Loss of predicting each position of a text from the first that counts [S - max(num_marker, 1)].

    Args:
        on_window: called with the tokens that ran.

    Raises:
        UsageError: the backend measures no losses.
        ArtefactError: a loss that is not a number.
        torch.OutOfMemoryError: a window needs more memory than there is.
        NoAnswerError: the backend refuses a window.
    """
    marker, pieces = list(ids[:num_marker]), []
    for batch in batches(backend, windows, lambda window: num_marker + window.end - window.start):
        prompts = [[*marker, *ids[window.start : window.end]] for window in batch]
        for window, losses in zip(batch, _answered(backend, prompts), strict=True):
            if not len(losses):
                raise UsageError("this backend measures no losses, so there is no perplexity", where="perplexity")
            pieces.append(losses[num_marker + window.scored - window.start - 1 :].double())
        on_window(sum(map(len, prompts)))
    joined = torch.cat(pieces)
    if not bool(torch.isfinite(joined).all()) or float(joined.mean()) > _LARGEST_LOSS:
        raise ArtefactError(
            "the model's loss is not a number",
            where="perplexity",
            hint="The weights are damaged, or the precision is too low for this model: try --dtype float32.",
        )
    return joined


def _answered(backend: Backend, prompts: list[list[int]]) -> list[Tensor]:
    """The losses of prompts of equal length; one after the other where they are too many for the memory together."""
    try:
        return [answer.losses for answer in backend.answer_together(prompts, 1)]
    except (RuntimeError, MemoryError) as error:
        if len(prompts) == 1 or not is_out_of_memory(error):
            raise
    return [backend.answer_together([prompt], 1)[0].losses for prompt in prompts]


def blocks_of(losses: Tensor, first: int, block_tokens: int) -> list[LossBlock]:
    """Means of `losses` (of positions first, first + 1, ...) over blocks of positions."""
    end_of_text, blocks = first + len(losses), []
    for start in range(0, end_of_text, block_tokens):
        end = min(start + block_tokens, end_of_text)
        piece = losses[max(start - first, 0) : max(end - first, 0)]
        if len(piece):
            blocks.append(LossBlock(start, end, round(float(piece.double().mean()), 6), len(piece)))
    return blocks


def pooled(blocks: Iterable[LossBlock]) -> float | None:
    """Mean loss over blocks, every token counting once; None without one."""
    known = list(blocks)
    num_tokens = sum(block.num_tokens for block in known)
    return math.fsum(block.loss * block.num_tokens for block in known) / num_tokens if num_tokens else None


def longest_positions(suite: Suite, original_length: int, target_length: int) -> int:
    """Positions that the perplexity measurements of a suite use at most; 0 without any."""
    used = []
    for block in suite.perplexity or []:
        window, length = _tokens_of(block, original_length, target_length)
        used.append(length if window is None else min(window, length))
    return max(used, default=0)


def relative_increase(difference: float) -> float:
    """Relative increase of a perplexity (0.02 for 2%) whose loss is higher by so many nats."""
    return math.inf if difference > _LARGEST_LOSS else math.expm1(difference)


def measure_perplexity(
    backend: Backend,
    suite: Suite,
    folder: Path,
    *,
    original_length: int,
    target_length: int,
    weights: dict[str, Any],
    on_progress: OnProgress = lambda done, total: None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[PerplexityResult]:
    """Measure every perplexity that the suite asks for; texts that are stored in `folder` are not read again.

    The first result goes into `perplexity.json`, a second into `perplexity-2.json`.

    Args:
        weights: what identifies the weights; stored texts of other weights or positions are not used.
        on_progress: called with the tokens that ran, and all there are.
        check_stop: called after every text; raises where a signal asked to stop.

    Raises:
        UsageError: the haystack is too short, a window that the lengths do not allow, or a backend without losses.
        ArtefactError: a loss that is not a number.
    """
    results = []
    for number, block in enumerate(suite.perplexity or [], start=1):
        job = _job(block, suite, backend.tokenizer, original_length, target_length)
        identity = fingerprint(
            {
                "weights": weights,
                **backend.identity(),
                **{"kind": job.kind, "window": job.window, "stride": job.stride, "block_tokens": job.block_tokens},
            }
        )
        result = _measure(backend, job, folder, identity, on_progress, check_stop)
        write_json_atomic(folder / _file_name(number), asdict(result))
        results.append(result)
    for stale in range(len(results) + 1, len(list(folder.glob("perplexity*.json"))) + 2):
        (folder / _file_name(stale)).unlink(missing_ok=True)
    return results


def load_perplexity(folder: Path) -> list[PerplexityResult]:
    """The stored results of an arm's folder, in the order of its suite; none where none was measured.

    Raises:
        ArtefactError: a file that is no such result.
    """
    results: list[PerplexityResult] = []
    while (path := folder / _file_name(len(results) + 1)).is_file():
        stored = read_json(path)
        try:
            blocks = [LossBlock(**block) for block in stored["blocks"]]
            documents = [_text_loss(document) for document in stored["documents"]]
            results.append(PerplexityResult(**{**stored, "blocks": blocks, "documents": documents}))
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"not a perplexity result ({error})", where=str(path)) from error
    return results


def compare_perplexity(
    first: PerplexityResult, second: PerplexityResult, *, start: int = 0, end: int | None = None
) -> PerplexityDifference | None:
    """The first model against the second on the texts that both read; None when they share none.

    Args:
        start: only blocks from this position on count.
        end: only blocks up to this position count.

    Raises:
        UsageError: they were measured in different ways.
    """
    asked = [(one.kind, one.window_tokens, one.stride_tokens) for one in (first, second)]
    if asked[0] != asked[1]:
        names = ["/".join(str(part) for part in parts if part is not None) for parts in asked]
        raise UsageError(
            "perplexities of different windows cannot be compared", where="perplexity", got=names[0], expected=names[1]
        )
    others = {text.text_sha256: text for text in second.documents}
    pairs = [
        (mine, theirs)
        for text in first.documents
        if text.text_sha256 in others
        and (mine := text.mean(start, end)) is not None
        and (theirs := others[text.text_sha256].mean(start, end)) is not None
    ]
    if not pairs:
        return None
    return PerplexityDifference(
        paired_difference([mine - theirs for mine, theirs in pairs]),
        math.fsum(mine for mine, _ in pairs) / len(pairs),
        math.fsum(theirs for _, theirs in pairs) / len(pairs),
    )


def _measure(
    backend: Backend, job: _Job, folder: Path, identity: str, on_progress: OnProgress, check_stop: Callable[[], None]
) -> PerplexityResult:
    stored = _stored_texts(folder, identity)
    windows, num_marker = job.windows(), len(job.marker)
    texts = job.texts()
    done, total = 0, job.num_seen() * len(texts)

    def on_window(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        on_progress(done, total)

    finished: list[TextLoss] = []
    missing = None
    for ids in texts:
        known = stored.get(hash_ids(ids))
        if known is not None:
            on_window(job.num_seen())
            finished.append(known)
            continue
        started = time.perf_counter()
        try:
            losses = text_losses(backend, ids, num_marker, windows, on_window)
        except NoAnswerError as error:
            missing = error.reason
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            missing = f"a window of {job.window or job.length:,} tokens needs more memory than there is"
        if missing is not None:
            break  # the other texts are as long
        blocks = blocks_of(losses, max(num_marker, 1), job.block_tokens)
        finished.append(TextLoss(hash_ids(ids), blocks, round(time.perf_counter() - started, 3)))
        append_json_line(folder / "perplexity-texts.jsonl", {"identity_hash": identity, **asdict(finished[-1])})
        check_stop()
    return _result(job, finished, identity, missing)


def _result(job: _Job, texts: list[TextLoss], identity: str, missing: str | None) -> PerplexityResult:
    # Every text has the same blocks, so the first text's places are all places.
    blocks = []
    for place in range(len(texts[0].blocks) if texts else 0):
        alike = [text.blocks[place] for text in texts]
        loss = pooled(alike)
        assert loss is not None
        num_tokens = sum(block.num_tokens for block in alike)
        blocks.append(LossBlock(alike[0].start, alike[0].end, round(loss, 6), num_tokens))
    loss = pooled(blocks)
    means = [mean for text in texts if (mean := text.mean()) is not None]
    spread = paired_difference(means) if len(means) > 1 else None
    return PerplexityResult(
        kind=job.kind,
        window_tokens=job.window,
        stride_tokens=job.stride,
        length_tokens=job.length,
        num_tokens=sum(block.num_tokens for block in blocks),
        num_documents=len(texts),
        loss=None if loss is None else round(loss, 6),
        perplexity=None if loss is None else _perplexity(loss),
        interval_95=None if spread is None else [_perplexity(spread.low), _perplexity(spread.high)],
        haystack=job.reader.haystack.name,
        haystack_sha256=job.reader.haystack.sha256,
        identity_hash=identity,
        seconds=round(sum(text.seconds for text in texts), 3),
        missing=missing,
        blocks=blocks,
        documents=texts,
    )


def _job(block: PerplexityBlock, suite: Suite, tokenizer: Any, original_length: int, target_length: int) -> _Job:
    window, length = _tokens_of(block, original_length, target_length)
    choice = suite.haystack if block.haystack is None else block.haystack
    if choice == "noise":
        raise UsageError(
            "noise repeats five sentences; its perplexity says nothing",
            where="perplexity",
            hint="Name another haystack in the suite's perplexity block.",
        )
    job = _Job(
        kind="by-position" if window is None else "sliding-window",
        window=window,
        stride=block.stride,
        length=length,
        num_documents=block.documents,
        block_tokens=block.block_tokens,
        reader=HaystackReader(load_haystack(choice), lambda text: encode_plain(tokenizer, text)),
        marker=leading_marker(tokenizer),
        seed=f"{suite.seed}/perplexity",
    )
    if length < len(job.marker) + 2:
        raise UsageError("the text is too short to predict anything", where="perplexity", got=length)
    if window is not None and window > length:
        raise UsageError(
            "the window is larger than the text", where="perplexity", got=window, expected=f"at most {length:,} tokens"
        )
    try:
        job.windows()
    except ValueError as error:
        raise UsageError(
            "the stride leaves a window's first token without context", where="perplexity", got=str(error)
        ) from error
    return job


def _tokens_of(block: PerplexityBlock, original_length: int, target_length: int) -> tuple[int | None, int]:
    """Window and length in tokens."""

    def tokens(length: int | RelativeLength) -> int:
        return length if isinstance(length, int) else length.tokens(original_length, target_length, 0)

    return None if block.window is None else tokens(block.window), tokens(block.length)


def _file_name(number: int) -> str:
    return "perplexity.json" if number == 1 else f"perplexity-{number}.json"


def _stored_texts(folder: Path, identity: str) -> dict[str, TextLoss]:
    """Finished texts of this measurement, by hash."""
    lines = read_json_lines(folder / "perplexity-texts.jsonl")
    try:
        return {line["text_sha256"]: _text_loss(line) for line in lines if line["identity_hash"] == identity}
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"not a text's losses ({error})", where=str(folder / "perplexity-texts.jsonl")) from error


def _text_loss(stored: dict[str, Any]) -> TextLoss:
    return TextLoss(stored["text_sha256"], [LossBlock(**block) for block in stored["blocks"]], stored["seconds"])


def _perplexity(loss: float) -> float:
    return round(math.exp(min(loss, _LARGEST_LOSS)), 6)
