"""Several real processes share an evaluation: what is stored is what one process stores, to the bit."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import debug_launcher
from support import SilentReporter, child_environment, json_lines, make_job

from ctxext.errors import ResourceError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.run import evaluate_arm
from ctxext.evaluation.sharding import ALONE, Processes, owners, this_launch
from ctxext.evaluation.store import SampleResult, load_samples
from ctxext.evaluation.suite import Sample, Suite, resolve_samples
from ctxext.model.load import load_config, load_model, load_tokenizer, resolve_source
from ctxext.pipeline.extend import extend
from ctxext.pipeline.recipes import recipe_of

# Batches of short prompts, trunks of long ones (two haystacks a length), a long prompt that stands alone.
SUITE = Suite.model_validate(
    {
        "description": "t",
        "wording": "passkey",
        "haystack": "generated-words",
        "haystacks": "paired",
        "grid": [
            {"length": 120, "depths": [0.0, 0.5, 1.0], "samples": 12},
            {"length": 1100, "depths": [0.0, 0.5, 0.75, 1.0], "samples": 2},
            {"length": 1200, "depths": [0.5], "samples": 1},
        ],
        "max_new_tokens": 7,
        "loss_block_tokens": 32,
    }
)
# A whole run, all arms.
SETTINGS = ("train.steps=2", "evaluation.untrained=true", "evaluation.control=true")
SAMPLES = resolve_samples(SUITE, 128, 512)


def evaluate(folder: Path, *, slow: float = 0.0, samples: list[Sample] | None = None) -> SilentReporter:
    """Evaluate the shipped model in this process, alone or among those of a launcher."""
    source = resolve_source("recipes:tiny")
    model = load_model(source, load_config(source), dtype=torch.float32, device=torch.device("cpu"))
    reporter = SilentReporter()
    results = evaluate_arm(
        Answerer(model, load_tokenizer(source)),
        SUITE,
        folder=folder,
        title="t",
        original_length=128,
        target_length=512,
        weights={"source": "recipes:tiny"},
        facts={},
        reporter=reporter,
        check_stop=lambda: time.sleep(slow),
        samples=samples,
    )
    assert sorted(result.sample_id for result in results) == sorted(s.sample_id for s in samples or SAMPLES)
    return reporter


def evaluate_in_each(folder: str, slow: str) -> None:
    """What each of the processes runs; leaves a file that says who it was and what it told."""
    reporter = evaluate(Path(folder), slow=float(slow))
    rank = dist.get_rank()
    facts = {
        "pid": os.getpid(),
        "world_size": dist.get_world_size(),
        "backend": dist.get_backend(),
        "told": [sample.sample_id for sample in reporter.samples],
        "messages": reporter.messages,
    }
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(facts))


def extend_in_each(recipe_path: str, output: str) -> None:
    """A whole run in each of the processes."""
    extend(recipe_of(recipe_path, [*SETTINGS, f"output_dir={output}"]), SilentReporter())


def command(folder: Path, num_processes: int, slow: float = 0.0) -> list[str]:
    """A fresh interpreter that forks the processes: this one may hold threads, which do not survive a fork."""
    return [sys.executable, __file__, str(folder), str(num_processes), str(slow)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return child_environment(PYTHONPATH=path)


def launch(folder: Path, num_processes: int) -> None:
    finished = subprocess.run(
        command(folder, num_processes), env=environment(), text=True, capture_output=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


def stored(folder: Path) -> dict[str, SampleResult]:
    """Everything but the time."""
    return {result.sample_id: replace(result, seconds=0.0) for result in load_samples(folder)}


def reports_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "engine.json").read_text())
    return report


def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    # One thread, as in the processes that are compared with it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluate(folder)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(folder, 2)
    return folder


def test_two_processes_store_what_one_stores_to_the_bit(one: Path, two: Path) -> None:
    facts = ranks(two)
    assert facts[0]["pid"] != facts[1]["pid"]
    assert [(fact["world_size"], fact["backend"]) for fact in facts] == [(2, "gloo")] * 2
    assert stored(two) == stored(one)
    assert len(stored(one)) == len(SAMPLES) == 45
    assert reports_of(two)["num_processes"] == 2
    assert len({tuple(result.answer_ids) for result in stored(one).values()}) > 20
    scores = [json.loads((folder / "results.json").read_text())["results"] for folder in (one, two)]
    assert scores[0] == scores[1]


def test_everything_ends_up_in_one_file_once_and_both_have_done_a_share(one: Path, two: Path) -> None:
    assert sorted(path.name for path in two.glob("samples*")) == ["samples.jsonl"]
    assert len(json_lines(two / "samples.jsonl")) == len(SAMPLES)
    reports = [reports_of(folder) for folder in (one, two)]
    for key in ("work", "num_sharing", "kernels"):
        assert reports[0][key] == reports[1][key], key
    assert reports[1]["self_check"]["outcome"] == "identical"
    assert reports[1]["num_sharing"] == 6  # at depth 0 nothing is shared


def test_only_the_main_process_tells_and_it_tells_of_every_sample_once(two: Path) -> None:
    main, other = ranks(two)
    assert sorted(main["told"]) == sorted(sample.sample_id for sample in SAMPLES)
    assert any("self-check" in message for message in main["messages"])
    assert (other["told"], other["messages"]) == ([], [])


@pytest.mark.parametrize("killed", ["the main process", "all of them"])
def test_a_kill_loses_nothing_and_any_number_of_processes_goes_on(one: Path, tmp_path: Path, killed: str) -> None:
    folder = tmp_path / "run"
    running = subprocess.Popen(
        command(folder, 2, slow=0.3), env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: (folder / "samples.rank1.jsonl").exists() and (folder / "samples.jsonl").exists())
    children = [int(pid) for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
    victims = {"the main process": children[:1], "all of them": children}[killed]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert running.wait(timeout=60) != 0
    before = [path for path in folder.glob("samples*.jsonl") if path.stat().st_size]
    assert [path.name for path in sorted(before)] == ["samples.jsonl", "samples.rank1.jsonl"]
    finished = stored(folder)
    assert 0 < len(finished) < len(SAMPLES)
    with (folder / "samples.rank1.jsonl").open("a") as stream:
        stream.write('{"sample_id": "needle/12')  # a kill in the middle of a line
    if killed == "all of them":
        launch(folder, 3)
    else:
        evaluate(folder)
    assert sorted(path.name for path in folder.glob("samples*")) == ["samples.jsonl", "samples.rejected.jsonl"]
    assert same(stored(folder), stored(one))
    lines = json_lines(folder / "samples.jsonl")
    assert len(lines) == len(SAMPLES), "nothing was answered twice"


def same(first: dict[str, SampleResult], second: dict[str, SampleResult]) -> bool:
    """Equal but for the last bits of the losses: a resumed batch has other companions."""
    return set(first) == set(second) and all(
        replace(first[name], loss_blocks=[]) == replace(second[name], loss_blocks=[])
        and first[name].loss_blocks == pytest.approx(second[name].loss_blocks, abs=2e-5)
        for name in first
    )


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_arm_of_a_run_is_evaluated_by_all_processes(tmp_path: Path) -> None:
    job = make_job(tmp_path)  # two lengths, so two batches
    (tmp_path / "two").mkdir()
    extend(job.recipe(*SETTINGS, f"output_dir={tmp_path}/one"), SilentReporter())
    arguments = [sys.executable, __file__, "extend", str(job.recipe_path), str(tmp_path / "two")]
    finished = subprocess.run(arguments, env=environment(), text=True, capture_output=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for arm in ("before", "untrained", "control", "after"):
        one, two = (stored(tmp_path / run / "eval" / arm) for run in ("one", "two"))
        assert set(one) == set(two), arm
        assert len(one) == 4
        assert sorted(path.name for path in (tmp_path / "two" / "eval" / arm).glob("samples*")) == ["samples.jsonl"]
        assert reports_of(tmp_path / "two" / "eval" / arm)["num_processes"] == 2, arm
        if arm in ("before", "untrained"):
            assert one == two, arm  # training in two processes rounds otherwise
    assert (tmp_path / "two" / "report" / "index.html").exists()


def test_a_launcher_whose_processes_accelerate_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_launch() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="asked for several processes, but Accelerate runs as one"):
        this_launch()


@pytest.mark.parametrize(("num_processes", "fails"), [(1, False), (2, True)])
def test_accelerate_launch_on_a_cpu_runs_one_process_and_that_is_refused_when_more_were_asked_for(
    num_processes: int, fails: bool
) -> None:
    script = "from ctxext.evaluation.sharding import this_launch; print(this_launch())"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(num_processes)]
    finished = subprocess.run(
        [*launcher, "--no_python", sys.executable, "-c", script],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert ("Accelerate runs as one" in finished.stderr) == fails, finished.stderr
    assert ("Processes(index=0, count=1)" in finished.stdout) != fails


def test_work_is_shared_evenly_the_dearest_first() -> None:
    costs = [1.0, 9.0, 2.0, 3.0, 3.0, 4.0, 0.0]
    owner = owners(costs, 2)
    loads = [sum(cost for cost, index in zip(costs, owner, strict=True) if index == process) for process in (0, 1)]
    assert loads == [11.0, 11.0]
    assert set(owners([0.0] * 5, 3)) <= {0, 1, 2}
    assert owners(costs, 1) == [0] * 7
    assert owners([], 4) == []
    many = [float(number % 13) for number in range(200)]
    shares = [sum(c for c, i in zip(many, owners(many, 7), strict=True) if i == process) for process in range(7)]
    assert max(shares) - min(shares) <= 12


def test_one_process_waits_for_nobody() -> None:
    alone = Processes()
    alone.wait(lambda: pytest.fail("nothing to wait for"))
    assert alone.gathered(3) == [3]
    assert alone.from_main(lambda: 4) == 4


if __name__ == "__main__":
    gc.freeze()  # a collection in the forked processes would copy every page of the libraries
    if sys.argv[1] == "extend":
        debug_launcher(extend_in_each, args=(sys.argv[2], sys.argv[3]), num_processes=2)
    else:
        debug_launcher(evaluate_in_each, args=(sys.argv[1], sys.argv[3]), num_processes=int(sys.argv[2]))
