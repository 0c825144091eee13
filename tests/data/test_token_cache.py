"""The token cache holds what the tokenizer gives, is built once, goes on after a kill, never serves what is stale."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from filelock import FileLock
from support import byte_tokenizer, child_environment, file_size_limit
from transformers import PreTrainedTokenizerFast

from ctxext.data import cache_build
from ctxext.data.boundaries import encode_plain
from ctxext.data.cache import TokenCache, default_folder, folder_of
from ctxext.data.cache_build import build_cache
from ctxext.data.demand import Demand, demands_of
from ctxext.data.sources import iter_documents
from ctxext.errors import ArtefactError, ResourceError
from ctxext.recipe.data import DataBlock, LengthBlock, SourceBlock


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def corpus(folder: Path, files: int = 3, rows: int = 40, mark: str = "row") -> SourceBlock:
    folder.mkdir(exist_ok=True)
    for number in range(files):
        lines = [
            json.dumps({"text": f"{mark} {number}/{row}: " + "words and more. " * (row % 7)}) for row in range(rows)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return SourceBlock(kind="text", paths=[str(folder / "*.jsonl")])


@pytest.fixture
def data(tmp_path: Path) -> DataBlock:
    return DataBlock(sources=[corpus(tmp_path / "corpus")], cache=str(tmp_path / "cache"))


def build(data: DataBlock, **options: Any) -> TokenCache:
    return build_cache(tokenizer(), data, **{"num_processes": 1, **options})


def texts_of(tokens: TokenCache) -> list[str]:
    return [tokenizer().decode(tokens.ids(number).tolist()) for number in range(len(tokens.lengths))]


def written(data: DataBlock) -> dict[str, int]:
    """When every file of tokens was written."""
    found = Path(str(data.cache)).rglob("tokens.arrow")
    return {str(path): path.stat().st_mtime_ns for path in found if ".partial-" not in path.parent.name}


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments end after every batch of ten documents."""
    monkeypatch.setattr(cache_build, "SEGMENT_TOKENS", 1)
    monkeypatch.setattr("ctxext.data.tokenize._BATCH_DOCUMENTS", 10)


def test_the_cache_holds_every_document_as_the_tokenizer_gives_it(data: DataBlock, short_segments: None) -> None:
    tokens = build(data)
    expected = list(iter_documents(data.sources[0], 0))
    assert len(tokens.lengths) == len(expected) == 120
    for number, document in enumerate(expected):
        assert tokens.ids(number).tolist() == [*encode_plain(tokenizer(), document.text), tokenizer().eos_token_id]
        assert tokens.lengths[number] == len(tokens.ids(number))
        assert tokens.origin(number) == document.origin
        assert tokens.learned(number) is None
    assert tokens.ids(0).dtype == np.uint16
    assert tokens.tokens_by_source == (int(tokens.lengths.sum()),)
    tokens.verify()


def test_the_files_are_open_to_datasets(data: DataBlock) -> None:
    build(data)
    path = next(Path(str(data.cache)).rglob("tokens.arrow"))
    rows = Dataset.from_file(str(path))
    assert rows.column_names == ["ids", "learned", "origin", "digest"]
    assert rows.features["ids"].feature.dtype == "uint16"
    assert len(rows) == 40


def test_a_finished_cache_is_opened_and_not_built_again(data: DataBlock) -> None:
    first, before = build(data), written(data)
    again = build(data)
    assert written(data) == before
    assert again.sha256 == first.sha256


def test_what_was_changed_is_built_again_and_the_rest_is_not(data: DataBlock, tmp_path: Path) -> None:
    first, before = build(data), written(data)
    path = tmp_path / "corpus" / "1.jsonl"
    path.write_text(path.read_text().replace("row 1/3", "ROW 1/3"))
    again = build(data)
    assert again.sha256 != first.sha256
    assert any(text.startswith("ROW 1/3") for text in texts_of(again))
    assert not any(text.startswith("row 1/3:") for text in texts_of(again))
    after = written(data)
    assert len(after) == len(before) + 1
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("change", ["tokenizer", "field", "seed"])
def test_nothing_is_served_to_other_settings(data: DataBlock, change: str, tmp_path: Path) -> None:
    build(data)
    before = written(data)
    other, used = data, tokenizer()
    if change == "tokenizer":
        used = byte_tokenizer()
        used.eos_token = "a"
    elif change == "seed":
        other = data.model_copy(update={"seed": 1})
    else:
        for path in (tmp_path / "corpus").iterdir():
            stat = path.stat()
            path.write_text(path.read_text().replace('"text"', '"body"'))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other = data.model_copy(update={"sources": [data.sources[0].model_copy(update={"text_field": "body"})]})
    build_cache(used, other, num_processes=1)
    assert len(written(data)) == 2 * len(before)


def test_a_longer_run_goes_on_where_a_shorter_one_stopped(data: DataBlock, short_segments: None) -> None:
    part, before = build(data, num_tokens=3000), written(data)
    assert 3000 <= sum(part.tokens_by_source) < 3200
    whole = build(data)
    after = written(data)
    assert len(after) > len(before) > 1
    assert {path: after[path] for path in before} == before
    assert texts_of(whole)[: len(part.lengths)] == texts_of(part)
    # Less is asked for again: the same documents as the first time, whatever else is there by now.
    assert build(data, num_tokens=3000).sha256 == part.sha256
    assert build(data, num_tokens=3000).lengths.tolist() == part.lengths.tolist()


def test_the_number_of_processes_changes_nothing(data: DataBlock, tmp_path: Path) -> None:
    one = build(data)
    seen: list[tuple[int, int]] = []
    two = build(data, folder=tmp_path / "two", num_processes=2, progress=lambda done, total: seen.append((done, total)))
    assert two.sha256 == one.sha256
    assert texts_of(two) == texts_of(one)
    assert all(done <= total for done, total in seen)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_unusable_row_is_named_whichever_process_meets_it(
    data: DataBlock, tmp_path: Path, num_processes: int
) -> None:
    path = tmp_path / "corpus" / "2.jsonl"
    path.write_text(path.read_text() + '{"text": 7}\n')
    with pytest.raises(ArtefactError, match=r"2\.jsonl:41") as caught:
        build(data, num_processes=num_processes)
    assert ".." not in str(caught.value)
    lenient = [data.sources[0].model_copy(update={"max_bad_rows": 1})]
    tokens = build(data.model_copy(update={"sources": lenient}), num_processes=num_processes)
    assert len(tokens.lengths) == 120
    (counts,) = tokens.bad_rows
    assert sum(tally["count"] for tally in counts["bad"].values()) == 1
    # What the lenient recipe stored does not slip into the strict one.
    with pytest.raises(ArtefactError, match=r"2\.jsonl:41"):
        build(data)


def test_half_a_segment_is_not_there(data: DataBlock, short_segments: None) -> None:
    whole = build(data)
    part = next(Path(str(data.cache)).rglob("segment-00001")).parent
    shutil.rmtree(part / "segment-00003")
    half = part / "segment-00003.partial-1-abc"
    half.mkdir()
    (half / "tokens.arrow").write_bytes(b"half")
    assert build(data).sha256 == whole.sha256
    assert not half.exists()


@pytest.mark.parametrize("damage", ["cut", "record", "gone"])
def test_a_damaged_segment_is_built_again_and_said(data: DataBlock, short_segments: None, damage: str) -> None:
    whole = build(data)
    segment = sorted(Path(str(data.cache)).rglob("segment-00002"))[0]
    if damage == "cut":
        os.truncate(segment / "tokens.arrow", 100)
    elif damage == "record":
        (segment / "segment.json").write_text("{")
    else:
        (segment / "tokens.arrow").unlink()
    again = build(data)
    assert again.sha256 == whole.sha256
    assert texts_of(again) == texts_of(whole)
    assert len(again.messages) == 1
    assert again.messages[0].startswith("built again: ")


def test_flipped_bits_are_found_when_looked_for(data: DataBlock) -> None:
    tokens = build(data)
    wanted = tokens.ids(0).tobytes()
    path = next(path for path in Path(str(data.cache)).rglob("tokens.arrow") if wanted in path.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(wanted)] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match="checksum"):
        build(data).verify()


def test_a_full_disk_leaves_what_was_finished(data: DataBlock, short_segments: None) -> None:
    part = build(data, num_tokens=1000)
    with file_size_limit(500), pytest.raises(ResourceError):
        build(data)
    assert build(data, num_tokens=1000).sha256 == part.sha256
    assert not list(Path(str(data.cache)).rglob("*.partial-*"))
    assert len(build(data).lengths) == 120


def test_too_little_room_is_refused_before_anything_is_written(
    data: DataBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = DataBlock(sources=[SourceBlock(kind="generated-words")], cache=data.cache)
    with pytest.raises(ResourceError, match="not enough free disk space for the token cache"):
        build(endless, num_tokens=10**15)
    assert not Path(str(data.cache)).exists()


CHILD = """
import sys, time
sys.path[:0] = [sys.argv[1]]
from support import byte_tokenizer
from ctxext.data import cache_build, tokenize
from ctxext.recipe.data import DataBlock
cache_build.SEGMENT_TOKENS, tokenize._BATCH_DOCUMENTS = 1, 10
data = DataBlock.model_validate_json(sys.argv[2])
print("ready", flush=True)
tokens = cache_build.build_cache(byte_tokenizer(), data, num_processes=1,
    progress=lambda done, total: (print(done, flush=True), time.sleep(float(sys.argv[3]))))
print(tokens.sha256, *tokens.messages, flush=True)
"""


def child(data: DataBlock, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[1]), data.model_dump_json(), str(pause)]
    return subprocess.Popen(command, env=child_environment(), text=True, stdout=subprocess.PIPE)


def test_a_killed_build_goes_on_and_two_at_once_share_the_work(data: DataBlock, tmp_path: Path) -> None:
    killed = child(data, pause=0.1)
    assert killed.stdout is not None
    while int(killed.stdout.readline().replace("ready", "0")) < 2000:
        pass
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = written(data)
    assert kept
    first, second = child(data, pause=0.02), child(data, pause=0.02)
    said = [process.communicate(timeout=100)[0].splitlines()[-1] for process in (first, second)]
    expected = build(data, folder=tmp_path / "undisturbed").sha256
    assert [line.split()[0] for line in said] == [expected] * 2
    after = written(data)
    assert {path: after[path] for path in kept} == kept
    assert not list(Path(str(data.cache)).rglob("*.partial-*"))


def test_a_part_that_another_process_builds_is_waited_for(data: DataBlock) -> None:
    build(data, num_tokens=10)
    part = next(Path(str(data.cache)).rglob("segment-00000")).parent
    shutil.rmtree(part / "segment-00000")
    with ThreadPoolExecutor(1) as other:
        with FileLock(part / "lock"):
            waiting = other.submit(build, data)
            time.sleep(1.0)
            assert not waiting.done()
        tokens = waiting.result(timeout=60)
    assert len(tokens.lengths) == 120
    assert [message.split(" that")[0] for message in tokens.messages] == ["waited for another process"]


def test_demands_follow_from_weights_and_lengths() -> None:
    sources = [SourceBlock(kind="python-stdlib", weight=3), SourceBlock(kind="generated-words", min_tokens=64)]
    plain = demands_of(DataBlock(sources=sources), 4000, 512)
    assert plain[0] == Demand(3001, most=3001)
    assert (plain[1].tokens, plain[1].long_tokens, plain[1].long_from) == (1001, 1001, 64)
    long = demands_of(DataBlock(sources=sources, length=LengthBlock(long_share=0.6)), 4000, 512)
    assert (long[0].long_tokens, long[0].long_from) == (1801, 256)
    assert demands_of(DataBlock(sources=sources), None, 512) == [Demand(None)] * 2


def test_reading_goes_on_until_there_are_enough_long_documents() -> None:
    lengths = np.array([10, 10, 300, 10, 300, 10], dtype=np.int64)
    assert Demand(20, most=20).num_taken(lengths) == 2
    assert Demand(20, 300, 256, 10_000).num_taken(lengths) == 3
    assert Demand(20, 500, 256, 10_000).num_taken(lengths) == 5
    assert Demand(20, 900, 256, 10_000).num_taken(lengths) == 6
    assert Demand(20, 900, 256, 325).num_taken(lengths) == 4
    assert Demand(None).num_taken(lengths) == 6
    for demand in (Demand(20, most=20), Demand(20, 500, 256, 10_000), Demand(20, 900, 256, 325)):
        taken = demand.num_taken(lengths)
        assert demand.after(lengths[:taken]).met
        assert not demand.after(lengths[: taken - 1]).met
        assert demand.after(lengths[:taken]).num_taken(lengths) == 0


def test_the_folder_is_the_recipes_or_the_users(tmp_path: Path) -> None:
    assert folder_of(DataBlock(cache=str(tmp_path))) == tmp_path
    assert default_folder({"CTXEXT_CACHE_DIR": "/x"}) == Path("/x/tokens")
    assert default_folder({"XDG_CACHE_HOME": "/y"}) == Path("/y/ctxext/tokens")
    assert default_folder({}).parts[-3:] == (".cache", "ctxext", "tokens")


def test_opening_costs_no_file_handles(data: DataBlock, short_segments: None) -> None:
    tokens = build(data)
    texts_of(tokens)
    started = time.monotonic()
    open_files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_link(name)]
    assert not [name for name in open_files if name.endswith("tokens.arrow")]
    assert time.monotonic() - started < 5


def _is_link(name: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{name}")
