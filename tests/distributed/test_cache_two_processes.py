"""Two processes of a run share one token cache: the main one builds it, the other opens it, both read the same."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator, debug_launcher
from support import byte_tokenizer, child_environment

from ctxext.data.cache_build import build_cache
from ctxext.data.order import Cursor, Share
from ctxext.data.packing import WindowBuilder
from ctxext.recipe.data import DataBlock, SourceBlock, WindowsBlock

COUNT = 24


def data_block(folder: str) -> DataBlock:
    windows = WindowsBlock(positions="per-document", packing="best-fit")
    return DataBlock(sources=[SourceBlock(kind="generated-words")], windows=windows, cache=f"{folder}/cache")


def read_in_this_process(folder: str) -> None:
    """What each of the processes runs; leaves a file that says what it did and read."""
    accelerator = Accelerator(cpu=True)
    counted: list[int] = []
    with accelerator.main_process_first():
        cache = build_cache(
            byte_tokenizer(),
            data_block(folder),
            num_tokens=60_000,
            num_processes=1,
            progress=lambda done, total: counted.append(done),
        )
    builder = WindowBuilder(cache, data_block(folder), byte_tokenizer(), 1024)
    share = Share(accelerator.process_index, accelerator.num_processes)
    windows = builder.step_windows(Cursor(0, 0), COUNT, share)
    facts = {
        "pid": os.getpid(),
        "num_processes": accelerator.num_processes,
        "sha256": cache.sha256,
        "built": len(counted),
        "windows": [window.input_ids for window in windows],
    }
    (Path(folder) / f"rank-{accelerator.process_index}.json").write_text(json.dumps(facts))
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("run", ["first", "second"])
def test_one_builds_and_all_read_their_part(run: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-cache"
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=child_environment(PYTHONPATH=path),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    main, other = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert main["pid"] != other["pid"]
    assert main["num_processes"] == other["num_processes"] == 2
    assert main["sha256"] == other["sha256"]
    assert bool(main["built"]) is (run == "first")
    assert other["built"] == 0
    cache = build_cache(byte_tokenizer(), data_block(str(folder)), num_tokens=60_000, num_processes=1)
    builder = WindowBuilder(cache, data_block(str(folder)), byte_tokenizer(), 1024)
    expected = [window.input_ids for window in builder.step_windows(Cursor(0, 0), COUNT, Share())]
    assert sorted([*main["windows"], *other["windows"]]) == sorted(expected)
    assert len(main["windows"]) == len(other["windows"]) == COUNT // 2


if __name__ == "__main__":
    gc.freeze()  # a collection in the forked processes would copy every page of the libraries
    debug_launcher(read_in_this_process, args=(sys.argv[1],), num_processes=2)
