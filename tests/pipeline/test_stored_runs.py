"""Stored evaluations without their models: a good folder is in order, and every way of spoiling it is noticed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import SilentReporter, byte_tokenizer, json_lines, save_tiny_model, tiny_model

from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.reconstruct import find_sample, reconstruct
from ctxext.evaluation.results import write_results
from ctxext.evaluation.run import evaluate_arm
from ctxext.evaluation.store import load_samples
from ctxext.evaluation.suite import Suite
from ctxext.files import fingerprint, shipped_directory
from ctxext.pipeline.stored_runs import (
    derive_results,
    reconstruct_run,
    rescore_run,
    stored_arms,
    stored_command,
    validate_run,
)

SUITE = {
    "description": "t",
    "haystack": "generated-words",
    "tasks": [
        {"task": "needle", "name": "four", "num_keys": 4, "max_new_tokens": 5},
        {"task": "variable_tracking", "example": False, "max_new_tokens": 5},
    ],
    "grid": [{"length": 900, "depths": [0.0, 1.0], "samples": 2}, {"length": 1000, "depths": [0.5], "samples": 2}],
}
SHIPPED = shipped_directory("evals") / "baselines"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a real model has answered: 12 samples of two tasks."""
    base = tmp_path_factory.mktemp("stored")
    model = save_tiny_model(base / "model", initializer_range=0.2)
    folder = base / "run"
    evaluate_arm(
        Answerer(tiny_model(initializer_range=0.2), byte_tokenizer()),
        Suite.model_validate(SUITE),
        folder=folder,
        title="t",
        original_length=128,
        target_length=1024,
        weights={"source": str(model), "fingerprint": "f"},
        facts={"arm": "base", "environment": {"packages": {"tokenizers": "0.0.1"}}},
        reporter=SilentReporter(),
        check_stop=lambda: None,
    )
    return folder


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "run"))


def edit(change: Callable[[dict[str, Any]], None], line: int = 0) -> Callable[[Path], None]:
    """Change one stored sample."""

    def spoil(run: Path) -> None:
        path = run / "samples.jsonl"
        rows = json_lines(path)
        change(rows[line])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_results(run)

    return spoil


def lines(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Change the list of lines."""

    def spoil(run: Path) -> None:
        path = run / "samples.jsonl"
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    return spoil


def header(change: Callable[[dict[str, Any]], None], *, rehash: bool = False) -> Callable[[Path], None]:
    """Change `run.json`."""

    def spoil(run: Path) -> None:
        path = run / "run.json"
        values = json.loads(path.read_text())
        change(values)
        if rehash:
            values["identity_hash"] = fingerprint(values["identity"])
        path.write_text(json.dumps(values))
        write_results(run)

    return spoil


def raised(key: str, by: int = 1) -> Callable[[dict[str, Any]], None]:
    """Add to a number."""

    def change(row: dict[str, Any]) -> None:
        row[key] += by

    return change


def results(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change `results.json`."""

    def spoil(run: Path) -> None:
        values = json.loads((run / "results.json").read_text())
        change(values)
        (run / "results.json").write_text(json.dumps(values))

    return spoil


MUTANTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "torn last line": (lines(lambda rows: [*rows[:-1], rows[-1][:200]]), r"samples\.jsonl:12: half a line"),
    "torn middle line": (lines(lambda rows: [rows[0], rows[1][:70], *rows[2:]]), r"samples\.jsonl:2: half a line"),
    "no sample": (lines(lambda rows: [*rows, '{"a": 1}']), r"samples\.jsonl:13: not a sample"),
    "lost sample": (lines(lambda rows: rows[:-1]), r"1 of \d samples missing"),
    "lost cell": (
        lines(lambda rows: [row for row in rows if "four/1000" not in row]),
        "1000 tokens, depth 0.5: 2 of 2",
    ),
    "answered twice": (lines(lambda rows: [*rows, rows[3]]), r"samples\.jsonl:13: .* was answered before, in line 4"),
    "another score": (
        edit(lambda row: row.update(score=1.0)),
        r"samples\.jsonl:1: .*: score 1, but \w+/1 gives its answer 0",
    ),
    "another score beside": (
        edit(lambda row: row["scores"].update({"whole_match_all/1": 1.0})),
        r"samples\.jsonl:1: .*beside the deciding one .*whole_match_all/1",
    ),
    "another answer": (edit(lambda row: row.update(answer="1234567")), "the answer is not what its token ids say"),
    "other answer ids": (edit(lambda row: row.update(answer_ids=[5, 5])), "the answer is not what its token ids say"),
    "another expected answer": (edit(lambda row: row.update(answers=["7"])), "the suite asks about"),
    "another key": (edit(lambda row: row.update(key="k"), 1), r"samples\.jsonl:2: .*the suite asks about"),
    "another prompt": (edit(lambda row: row.update(prompt_sha256="0" * 64), 4), "its prompt is another one today"),
    "another haystack": (edit(lambda row: row.update(haystack_sha256="0" * 64)), "haystack_sha256 is not"),
    "needle elsewhere": (edit(raised("needle_position")), "no asked span begins at the needle's position"),
    "needle outside": (edit(raised("needle_position", 2000)), "outside the prompt of"),
    "span outside": (edit(lambda row: row["spans"].append([890, 2000, 0])), "a span from 890 to 2000 is outside"),
    "another span": (edit(lambda row: row["spans"].append([3, 5, 0])), "or its spans are others"),
    "another place": (edit(lambda row: row.update(depth=0.25)), "make another id"),
    "another index": (edit(lambda row: row.update(index=9)), "make another id"),
    "another task": (edit(lambda row: row.update(task="x", sample_id="x/900/0.0000/0")), "not one of the suite's"),
    "called degenerate": (edit(lambda row: row.update(degenerate="empty")), "called empty, but its answer is"),
    "old metric": (
        edit(lambda row: row.update(metric="string_match_all/0")),
        "string_match_all/0, which is not the present version",
    ),
    "edited identity": (header(lambda run: run["identity"].update(seed=7)), "identity_hash is not the hash"),
    "another metric": (
        header(lambda run: run["identity"]["tasks"]["four"].update(metric=["string_match_part/1"]), rehash=True),
        r"scored by \w+/1, but run.json says string_match_part/1",
    ),
    "no header": (lambda run: (run / "run.json").unlink(), "run.json: file not found"),
    "no results": (lambda run: (run / "results.json").unlink(), r"results\.json: cannot be compared"),
    "other results": (results(lambda table: table["cells"][0].update(num_right=9)), r"results\.json: .*give: cells"),
    "other suite": (header(lambda run: run["suite"].update(seed=7)), "the suite asks about"),
}


def problems_of(run: Path) -> str:
    reporter = SilentReporter()
    with pytest.raises(ArtefactError, match="not in order") as caught:
        validate_run(str(run), reporter, every_prompt=True)
    assert caught.value.exit_code == 3
    return "\n".join(reporter.messages)


def test_a_good_folder_is_in_order(good: Path) -> None:
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    reporter = SilentReporter()
    validate_run(str(good), reporter, every_prompt=True)
    assert reporter.messages == ["run: 12 lines, 12 samples, 12 prompts made again with equal hash: in order"]
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before


@pytest.mark.parametrize("name", MUTANTS)
def test_every_way_of_spoiling_a_folder_is_noticed(run: Path, name: str) -> None:
    spoil, message = MUTANTS[name]
    spoil(run)
    assert re.search(message, found := problems_of(run)), found


def test_another_try_after_a_failed_one_is_no_problem(run: Path) -> None:
    rows = json_lines(run / "samples.jsonl")
    failed = {**rows[2], "status": "out_of_memory", "answer": "", "answer_ids": [], "score": 0.0, "scores": {}}
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [failed, *rows]))
    validate_run(str(run), SilentReporter())


def test_without_the_tokenizer_the_rest_is_checked(run: Path) -> None:
    header(lambda run: run["identity"]["weights"].update(source="/nowhere/model"), rehash=True)(run)
    reporter = SilentReporter()
    validate_run(str(run), reporter)
    assert any("--tokenizer" in message for message in reporter.messages)
    assert any("no prompt was made again" in message for message in reporter.messages)


def test_the_prompt_of_a_sample_is_shown_after_its_hash_was_proven(good: Path) -> None:
    reporter = SilentReporter()
    reconstruct_run(str(good), "four/1000/0.5000/1", reporter)
    sample = find_sample(load_samples(good), "four/1000/0.5000/1")
    text = "\n".join(reporter.messages)
    assert f"1,000 tokens, hash {sample.prompt_sha256[:16]} as stored" in text
    assert f"for {sample.key} is: {sample.expected}." in text
    assert f"tokens {sample.needle_position:,} to" in text
    reconstruct_run(str(good), "four/1000/0.5000/1", whole := SilentReporter(), full=True)
    assert "--- tokens 0 to 999" in whole.messages
    made = reconstruct(stored_arms(str(good))[0].builder(byte_tokenizer()), sample, None, {})
    assert byte_tokenizer().decode(made.prompt.input_ids) == whole.messages[-1]


def test_samples_are_found_by_a_part_of_their_id_or_as_the_worst(good: Path) -> None:
    samples = load_samples(good)
    assert find_sample(samples, "tracking/1000/0.5000/0").task == "variable_tracking"
    assert find_sample(samples, "worst").length_tokens == 900
    with pytest.raises(UsageError, match="2 samples have this"):
        find_sample(samples, "four/1000")
    with pytest.raises(UsageError, match=r"no sample has this.*'worst'"):
        find_sample(samples, "nothing")


def test_a_prompt_that_cannot_be_made_again_says_what_differs(run: Path, tmp_path: Path) -> None:
    sample = "four/1000/0.5000/1"
    edit(lambda row: row.update(prompt_sha256="0" * 64), 8)(run)
    wanted = json_lines(run / "samples.jsonl")[8]["sample_id"]
    with pytest.raises(ArtefactError, match=r"only what stands around.*tokenizers 0.0.1 then"):
        reconstruct_run(str(run), wanted, SilentReporter())
    header(lambda run: run["suite"].update(seed=7))(run)
    with pytest.raises(ArtefactError, match=r"what differs: seed \(0 then, 7 now\); the question"):
        reconstruct_run(str(run), sample if sample != wanted else "four/900/0.0000/0", SilentReporter())
    header(lambda run: run["suite"].update(seed=0))(run)
    with pytest.raises(ArtefactError, match="tokenizer is another one"):
        reconstruct_run(str(run), "four/900/0.0000/0", SilentReporter(), tokenizer="recipes:tiny")
    with pytest.raises(ArtefactError, match="no tokenizer"):
        reconstruct_run(str(run), "four/900/0.0000/0", SilentReporter(), tokenizer="/nowhere/at/all")


def test_recorded_baselines_are_in_order_and_not_changed_by_name() -> None:
    reporter = SilentReporter()
    validate_run("tiny", reporter)
    assert [message.partition(":")[0] for message in reporter.messages] == ["base", "control", "extended", "untrained"]
    assert all("in order" in message for message in reporter.messages)
    with pytest.raises(UsageError, match="Copy its folder"):
        rescore_run("tiny", None, reporter)
    with pytest.raises(UsageError, match="neither a folder nor a recorded baseline"):
        validate_run("nothing", reporter)


def test_all_arms_of_a_copied_baseline_are_scored_anew(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(SHIPPED / "tiny", tmp_path / "copy"))
    reporter = SilentReporter()
    rescore_run(str(copy), "string_match_all", reporter)
    text = "\n".join(reporter.messages)
    assert text.count("500 answers scored anew (number_match/1 before, string_match_all/1 now)") == 4
    assert "needle/376/0.7500/11 is right now: expected '91979', answered ' 919799'" in text
    validate_run(str(copy), SilentReporter())
    with pytest.raises(UsageError, match="unknown metric"):
        rescore_run(str(copy), "nothing", reporter)


def test_one_arm_named_by_itself_knows_its_suite(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(SHIPPED / "tiny", tmp_path / "copy"))
    (arm,) = stored_arms(str(copy / "extended"))
    assert (arm.name, arm.suite is not None, len(arm.wanted or [])) == ("extended", True, 500)
    reconstruct_run(str(copy), "base:worst", reporter := SilentReporter())
    assert reporter.messages[0].split() == ["arm", "base"]
    with pytest.raises(UsageError, match="one of base, control, extended, untrained"):
        reconstruct_run(str(copy), "nobody:worst", reporter)


def test_options_of_the_command_line_go_where_they_belong(good: Path, tmp_path: Path) -> None:
    reporter, run = SilentReporter(), str(good)
    assert not stored_command(["model"], reporter)
    assert stored_command([], reporter, validate=run, every_prompt=True)
    assert stored_command(["worst"], reporter, reconstruct=run, full=True)
    assert stored_command([], reporter, rescore=str(shutil.copytree(good, tmp_path / "run")), metric="whole_match_all")
    wrong: list[tuple[str, list[str], dict[str, Any]]] = [
        ("give one", [], {"validate": run, "rescore": run}),
        ("--metric belongs to --rescore", [], {"validate": run, "metric": "number_match"}),
        ("--full belongs to --reconstruct", ["model"], {"full": True}),
        ("--all belongs to --validate", [], {"rescore": run, "every_prompt": True}),
        ("--tokenizer belongs to", [], {"rescore": run, "tokenizer": "recipes:tiny"}),
        ("and no model", ["model"], {"rescore": run}),
        ("and one sample", [], {"reconstruct": run}),
    ]
    for message, words, options in wrong:
        with pytest.raises(UsageError, match=message):
            stored_command(words, reporter, **options)


def test_results_are_derived_for_every_arm(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = Path(shutil.copytree(SHIPPED / "tiny", tmp_path / "copy"))
    stored = [path.read_bytes() for path in sorted(copy.glob("*/results.json"))]
    for path in copy.glob("*/results.json"):
        path.unlink()
    assert derive_results(str(copy)) == [copy / name for name in ("base", "control", "extended", "untrained")]
    assert [path.read_bytes() for path in sorted(copy.glob("*/results.json"))] == stored
    with pytest.raises(ArtefactError, match="no evaluated samples"):
        derive_results(str(tmp_path_factory.mktemp("empty")))
