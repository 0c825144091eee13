"""Building the token cache: parts tokenised side by side, one process each, in the order in which they are read.

A process reads, tokenises and writes a part on its own, so nothing large passes between processes. Where parts are
fewer than processes, the tokenizer's own threads take the rest. The result does not depend on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from ctxext.data.bad_rows import BadRows
from ctxext.data.cache import PartPlace, TokenCache, folder_of, open_cache, places_of
from ctxext.data.demand import Demand, demands_of
from ctxext.data.segments import SegmentRecord, segment_path, segments_of, write_segment
from ctxext.data.sources import read_part
from ctxext.data.tokenize import Encoder, Progress
from ctxext.errors import ArtefactError, CtxextError, ResourceError
from ctxext.files import remove_partials, require_free_space
from ctxext.recipe.data import DataBlock

# A segment is what a kill can cost: some minutes of one core.
SEGMENT_TOKENS = 1 << 26
_POLL_SECONDS = 0.5
# Typical of English text and code; only for the bar and the free-space check.
_BYTES_PER_TOKEN = 3
# Starting a process costs a second or two: below this many tokens each it does not pay.
_WORTH_A_PROCESS = 4_000_000


class Counter(Protocol):
    """A number that processes share."""

    value: int

    def get_lock(self) -> Any:
        """Held while the number changes."""


@dataclass
class _Count:
    """A number within one process."""

    value: int = 0

    @contextmanager
    def get_lock(self) -> Iterator[None]:
        """Nothing to hold."""
        yield


@dataclass(frozen=True)
class PartResult:
    """What became of one part: tokens of its documents in order, and what people should know."""

    lengths: npt.NDArray[np.int64]
    messages: tuple[str, ...]


def build_cache(
    tokenizer: Any,
    data: DataBlock,
    *,
    num_tokens: int | None = None,
    window_tokens: int = 0,
    folder: Path | None = None,
    num_processes: int | None = None,
    progress: Progress | None = None,
) -> TokenCache:
    """The token cache of a recipe's sources; tokenises what is not there yet.

    Args:
        num_tokens: of training; each source is read until its share is there. All of every source when None.
        window_tokens: of a training row, from which follows what a long document is.
        folder: of all caches; as the recipe says when left out.
        num_processes: as many as there are cores and it pays when None.
        progress: called with tokens done and (where not known, estimated) to be done.

    Raises:
        ArtefactError: sources that are not there, unusable or without text.
        ResourceError: too little room on the disk.
    """
    folder = folder or folder_of(data)
    demands = demands_of(data, num_tokens, window_tokens)
    places, bad_rows = places_of(tokenizer, data, folder)
    try:
        if finished := open_cache(places, demands, bad_rows):
            return finished
    except ArtefactError:
        pass  # the build says what is damaged, and makes it anew
    expected = _expected_tokens(places, demands)
    require_free_space(folder, int(expected * Encoder(tokenizer).dtype(0).itemsize * 1.1), "the token cache")
    processes = num_processes or _processes_for(expected)
    if processes == 1:
        messages = _build_here(tokenizer, places, demands, expected, progress)
    else:
        messages = _build_in_processes(tokenizer, places, demands, processes, expected, progress)
    cache = open_cache(places, demands, bad_rows, messages)
    assert cache is not None, "every part that was asked for is built"
    return cache


def _processes_for(expected: int) -> int:
    return max(min(os.cpu_count() or 1, expected // _WORTH_A_PROCESS), 1)


def _expected_tokens(places: Sequence[PartPlace], demands: Sequence[Demand]) -> int:
    """Tokens that the build will hold; estimated by size where all of a source is read."""
    total = 0
    for number, demand in enumerate(demands):
        num_bytes = sum(_num_bytes(place) for place in places if place.source_number == number)
        sized = num_bytes // _BYTES_PER_TOKEN
        if demand.tokens is None:
            total += sized
        else:
            total += min(demand.tokens, sized) if sized else demand.tokens
    return total


def _num_bytes(place: PartPlace) -> int:
    if place.part.end is not None:
        return place.part.end - place.part.begin
    return sum(os.path.getsize(path) for path in place.part.paths if os.path.isfile(path)) - place.part.begin


def _build_here(
    tokenizer: Any,
    places: Sequence[PartPlace],
    demands: Sequence[Demand],
    expected: int,
    progress: Progress | None,
) -> list[str]:
    encoder, left, count = Encoder(tokenizer), list(demands), _Count()
    messages: list[str] = []
    for place in places:
        if not left[place.source_number].met:
            result = build_part(encoder, place, left[place.source_number], count, progress, expected)
            left[place.source_number] = left[place.source_number].after(result.lengths)
            messages += result.messages
    return messages


# Of a worker process; set once when it starts.
_worker_encoder: Encoder
_worker_count: Counter


def _start_worker(tokenizer: Any, count: Counter, num_threads: int) -> None:
    # Read when the tokenizer's threads are first needed, which is later than this.
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
    global _worker_encoder, _worker_count
    _worker_encoder, _worker_count = Encoder(tokenizer), count


def _work(place: PartPlace, demand: Demand) -> PartResult:
    return build_part(_worker_encoder, place, demand, _worker_count)


def _build_in_processes(
    tokenizer: Any,
    places: Sequence[PartPlace],
    demands: Sequence[Demand],
    num_processes: int,
    expected: int,
    progress: Progress | None,
) -> list[str]:
    """Parts go out in reading order, some ahead of what is known to be needed; the surplus stays for later runs."""
    context = multiprocessing.get_context("spawn")
    workers = min(num_processes, len(places))
    count: Any = context.Value("q", 0)
    left = list(demands)
    messages: list[str] = []
    waiting, running = deque(places), deque[tuple[PartPlace, Future[PartResult]]]()
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(tokenizer, count, max(num_processes // workers, 1))
    ) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    place = waiting.popleft()
                    if not left[place.source_number].met:
                        running.append((place, pool.submit(_work, place, left[place.source_number])))
                if not running:
                    break
                wait([future for _, future in running], timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                while running and running[0][1].done():
                    place, future = running.popleft()
                    result = _result(future)
                    left[place.source_number] = left[place.source_number].after(result.lengths)
                    messages += result.messages
                if progress is not None:
                    progress(count.value, max(expected, count.value))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return messages


def _result(future: Future[PartResult]) -> PartResult:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process that tokenised text was killed, most likely for memory",
            where="the token cache",
            hint="Use fewer processes; what was finished is kept.",
        ) from error
    except CtxextError as error:
        # An exception that crosses processes is made anew from its sentence, as if that were what failed.
        raise type(error)(
            error.what, where=error.where, got=error.got, expected=error.expected, hint=error.hint
        ) from error


def build_part(
    encoder: Encoder,
    place: PartPlace,
    demand: Demand,
    count: Counter,
    progress: Progress | None = None,
    expected: int = 0,
) -> PartResult:
    """Tokenise what is missing of one part, going on behind its last whole segment.

    Raises:
        ArtefactError: the part cannot be read, or too much of it is unusable.
        ResourceError: the disk is full; whole segments stay.
    """
    messages: list[str] = []
    place.folder.mkdir(parents=True, exist_ok=True)
    with _locked(place.folder / "lock", place.part.name, messages):
        remove_partials(place.folder)
        records, lengths = _finished(place, messages)

        def counted(more: npt.NDArray[np.int64]) -> None:
            with count.get_lock():
                count.value += int(more.sum())
            if progress is not None:
                progress(count.value, max(expected, count.value))

        left = demand
        for more in lengths:
            left = left.after(more)
            counted(more)
        while not (left.met or (records and records[-1].last)):
            begin = records[-1].end if records else 0
            segment = _SegmentDemand(left, counted)
            bad = BadRows(place.source.max_bad_rows)
            documents = read_part(place.source, place.part, place.seed, start=begin, bad=bad)
            records.append(
                write_segment(
                    segment_path(place.folder, len(records)),
                    begin,
                    encoder.batches(documents, bad),
                    encoder.dtype,
                    segment.is_enough,
                    bad.facts,
                )
            )
            left = segment.left
            lengths.append(np.concatenate([*segment.lengths, np.zeros(0, dtype=np.int64)]))
    joined = np.concatenate([*lengths, np.zeros(0, dtype=np.int64)])
    return PartResult(joined, tuple(messages))


class _SegmentDemand:
    """Ends a segment when the demand is met or the segment is large."""

    def __init__(self, left: Demand, counted: Any) -> None:
        self.left = left
        self.lengths: list[npt.NDArray[np.int64]] = []
        self._counted = counted
        self._num_tokens = 0

    def is_enough(self, lengths: npt.NDArray[np.int64]) -> bool:
        """Called after every batch with the lengths of its documents."""
        self.left = self.left.after(lengths)
        self.lengths.append(lengths)
        self._num_tokens += int(lengths.sum())
        self._counted(lengths)
        return self.left.met or self._num_tokens >= SEGMENT_TOKENS


def _finished(place: PartPlace, messages: list[str]) -> tuple[list[SegmentRecord], list[npt.NDArray[np.int64]]]:
    """Records and document lengths of the whole segments; those from the first damaged one on are removed."""
    records: list[SegmentRecord] = []
    lengths: list[npt.NDArray[np.int64]] = []
    try:
        for segment in segments_of(place.folder):
            lengths.append(segment.lengths)
            records.append(segment.record)
    except ArtefactError as error:
        messages.append(f"built again: {error}")
    # Behind a damaged or missing segment nothing can be trusted to follow on.
    kept = {segment_path(place.folder, number) for number in range(len(records))}
    for path in set(place.folder.glob("segment-*")) - kept:
        shutil.rmtree(path)
    return records, lengths


@contextmanager
def _locked(path: Path, name: str, messages: list[str]) -> Iterator[None]:
    """One builder a part at a time; the system lets go of the lock of one that was killed."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        messages.append(f"waited for another process that was building {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
