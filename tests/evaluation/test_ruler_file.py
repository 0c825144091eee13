"""RULER's own files: read with their errors, tokenised and scored as RULER does; nothing else is called RULER's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import SilentReporter, byte_tokenizer

from ctxext.errors import ArtefactError, UsageError
from ctxext.evaluation.clusters import cluster_of
from ctxext.evaluation.effective_length import RULER_TASKS
from ctxext.evaluation.rescore import rescored
from ctxext.evaluation.ruler_file import (
    RulerBuilder,
    read_ruler_file,
    read_ruler_files,
    require_reach,
    ruler_budget,
    ruler_identity,
    ruler_metric,
    ruler_scores,
)
from ctxext.evaluation.scoring import METRICS
from ctxext.evaluation.store import SampleResult, load_samples
from ctxext.evaluation.suite import Cell, Sample
from ctxext.pipeline.ruler import evaluate_ruler_files
from ctxext.pipeline.stored_runs import reconstruct_run, validate_run

ESSAY = " ".join(f"Sentence {number} speaks of boats, bread and of bridge {number * 7}." for number in range(60))


def row(value: str = "4821973", *, text: str = ESSAY, **changes: Any) -> dict[str, Any]:
    """A line as RULER's needle generator writes it, in other words."""
    half = len(text) // 2
    hidden = f"{text[:half]} The number of quiet-harbour is: {value}. {text[half:]}"
    return {
        "index": hidden.find(value),
        "input": f"{hidden}\nWhich number has quiet-harbour?",
        "outputs": [value],
        "length": 3900,
        "length_w_model_temp": 3900,
        "answer_prefix": " The number of quiet-harbour is",
        "token_position_answer": 7,
        **changes,
    }


def write(path: Path, *rows: Mapping[str, Any]) -> Path:
    """A file of these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def place(root: Path, task: str, length: int = 4096) -> Path:
    """Where RULER's run.sh puts a file."""
    return root / str(length) / "data" / task / "validation.jsonl"


def scored(task: str, answers: Sequence[tuple[str, list[str]]], length: int = 4096) -> list[SampleResult]:
    """Answers with their expected strings, scored by the task's metric."""
    metric = METRICS[ruler_metric(task)].versioned
    found = []
    for index, (answer, outputs) in enumerate(answers):
        sample = Sample(Cell(task, length, 0.5), index)
        plain = SampleResult(
            sample_id=sample.sample_id,
            task=task,
            length_tokens=length,
            depth=0.5,
            index=index,
            status="ok",
            needle_position=0,
            haystack_sha256="",
            prompt_sha256=sample.sample_id,
            key="",
            expected=" | ".join(outputs),
            answers=outputs,
            answer=answer,
            metric=metric,
            facts={"ruler_line": index + 1},
        )
        found.append(rescored(plain, None, thinking=False))
    return found


def test_task_and_length_come_from_rulers_own_place(tmp_path: Path) -> None:
    file = read_ruler_file(write(place(tmp_path, "niah_multikey_1"), row(), row("7777777")))
    assert (file.task, file.length_tokens, file.length_from) == ("niah_multikey_1", 4096, "the path")
    assert (file.metric, file.max_new_tokens, len(file.samples)) == ("string_match_all", 128, 2)
    named = read_ruler_file(write(tmp_path / "vt.jsonl", row()))
    assert (named.task, named.length_tokens, named.length_from) == ("vt", 3900, "the longest line")
    told = read_ruler_file(write(tmp_path / "x.jsonl", row()), task="qa_2", length_tokens=8192)
    assert (told.task, told.length_tokens, told.metric) == ("qa_2", 8192, "string_match_part")


def test_budgets_and_metrics_are_rulers() -> None:
    budgets = {task: ruler_budget(task) for task in RULER_TASKS}
    assert budgets == {**dict.fromkeys(RULER_TASKS[:8], 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert [task for task in RULER_TASKS if ruler_metric(task) == "string_match_part"] == ["qa_1", "qa_2"]
    assert set(ruler_identity()["tasks"]) == set(RULER_TASKS)


def test_older_files_without_answer_prefix_and_with_one_output_are_read(tmp_path: Path) -> None:
    old = {"index": 0, "input": "text. Answer:", "output": "seven", "length": 40}
    file = read_ruler_file(write(place(tmp_path, "qa_1"), old))
    assert (file.rows[0].text, file.rows[0].outputs) == ("text. Answer:", ("seven",))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not valid JSON"),
        ("[1]", "no text in 'input'"),
        ('{"outputs": ["1"]}', "no text in 'input'"),
        ('{"input": "a"}', "'outputs' is no list"),
        ('{"input": "a", "outputs": []}', "'outputs' is no list"),
        ('{"input": "a", "outputs": [7]}', "'outputs' is no list"),
        ('{"input": "a", "outputs": [""]}', "'outputs' is no list"),
        ('{"input": "a", "outputs": ["1"], "answer_prefix": 3}', "'answer_prefix' is no text"),
    ],
)
def test_a_line_that_is_no_sample_is_refused_with_its_number(tmp_path: Path, line: str, named: str) -> None:
    path = write(place(tmp_path, "niah_single_1"), row())
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(ArtefactError, match=rf"validation\.jsonl:3: .*{named}"):
        read_ruler_file(path)


def test_files_that_cannot_be_what_they_should_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not say which.*--ruler-task"):
        read_ruler_file(write(tmp_path / "a" / "data.jsonl", row()))
    with pytest.raises(UsageError, match="unknown RULER task"):
        read_ruler_file(write(tmp_path / "a" / "data.jsonl", row()), task="niah")
    with pytest.raises(UsageError, match="exceed the length"):
        read_ruler_file(write(place(tmp_path, "vt"), row()), length_tokens=2048)
    with pytest.raises(UsageError, match="--ruler-length"):
        read_ruler_file(write(tmp_path / "vt.jsonl", row(length=None)))
    with pytest.raises(ArtefactError, match="no samples"):
        read_ruler_file(write(place(tmp_path, "cwe")))
    with pytest.raises(ArtefactError, match="no RULER file here"):
        read_ruler_files([str(tmp_path / "nowhere.jsonl")])
    write(tmp_path / "two" / "fwe.jsonl", row())
    write(tmp_path / "two" / "b" / "fwe.jsonl", row())
    with pytest.raises(UsageError, match="two files for task fwe"):
        read_ruler_files([str(tmp_path / "two")])


def test_the_prompt_is_input_and_prefix_as_one_text(tmp_path: Path) -> None:
    file = read_ruler_file(write(place(tmp_path, "niah_single_2"), row(), row("1112223")))
    tokenizer = byte_tokenizer()
    prompt = RulerBuilder(tokenizer, [file]).build(file.samples[1])
    text = tokenizer.decode(prompt.input_ids)
    assert text == row("1112223")["input"] + row()["answer_prefix"]
    (span,) = prompt.spans
    assert tokenizer.decode(prompt.input_ids[span.start : span.end]).strip() == "1112223"
    assert prompt.needle_position == span.start
    assert (prompt.answers, prompt.metric, prompt.max_new_tokens) == (("1112223",), "string_match_all", 128)
    with pytest.raises(KeyError):
        RulerBuilder(tokenizer, [file]).build(Sample(file.samples[0].cell, 2))


def test_special_tokens_are_the_tokenizers_own_business(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 256)]
    )
    file = read_ruler_file(write(place(tmp_path, "niah_single_2"), row()))
    prompt = RulerBuilder(tokenizer, [file]).build(file.samples[0])
    assert (prompt.input_ids[0], prompt.input_ids.count(256)) == (256, 1)
    assert tokenizer.decode(prompt.input_ids[prompt.spans[0].start : prompt.spans[0].end]).strip() == "4821973"


def test_samples_of_one_text_are_not_called_independent(tmp_path: Path) -> None:
    other = ESSAY.replace("boats", "ships").replace("bread", "butter").replace("bridge", "tower")
    rows = [row("1000001"), row("1000002"), row("1000003", text=other), row("1000004", text=other)]
    file = read_ruler_file(write(place(tmp_path, "niah_single_2"), *rows))
    first, second, third, fourth = file.texts
    assert (first == second, third == fourth, first == third) == (True, True, False)
    noise = "\n".join(
        ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 30
    )
    noisy = read_ruler_file(write(place(tmp_path, "niah_single_1"), row("1000001", text=noise), row("1", text=noise)))
    built = [RulerBuilder(byte_tokenizer(), [noisy]).build(sample) for sample in noisy.samples]
    assert len({cluster_of(prompt) for prompt in built}) == 2, "noise is no text, needles decide"


def test_scores_are_rulers_to_the_digit_substrings_included() -> None:
    answers = [
        (" 1234567.", ["1234567"]),
        (" 12345678", ["1234567"]),  # a longer number counts, as RULER counts it
        (" 123 4567", ["1234567"]),
        (" Quiet-HARBOUR", ["quiet-harbour"]),
        (" 7654321", ["1234567", "7654321"]),
        ("", ["1234567"]),
    ]
    scores = ruler_scores(scored("niah_multikey_1", answers)).to_json()
    assert scores["scores"] == {"4096": {"niah_multikey_1": 58.33}}  # (1 + 1 + 0 + 1 + 1/2 + 0) / 6
    qa = ruler_scores(scored("qa_1", [("It is the capital", ["Rome", "the Capital"]), ("no", ["yes"])])).to_json()
    assert qa["scores"] == {"4096": {"qa_1": 50.0}}
    third = ruler_scores(scored("vt", [("AAAAA", ["AAAAA", "BBBBB", "CCCCC"])])).to_json()
    assert third["scores"] == {"4096": {"vt": 33.33}}


def test_the_effective_length_needs_all_13_tasks() -> None:
    right, wrong = [("1", ["1"])] * 10, [("2", ["1"])] * 10
    whole = [s for task in RULER_TASKS for s in scored(task, right, 4096)]
    longer = [s for task in RULER_TASKS for s in scored(task, wrong if task in ("vt", "cwe") else right, 8192)]
    found = ruler_scores(whole + longer)
    assert found.to_json()["average_of_13"] == {"4096": 100.0, "8192": 84.62}
    assert found.effective_length is not None
    assert found.effective_length.text() == "4,096 tokens (8,192 fails)"
    partial = ruler_scores([s for s in whole if s.task != "fwe"])
    assert partial.effective_length is None
    assert "4,096 tokens lack fwe" in str(partial.reason)
    assert "not given" in partial.lines()[-1]
    assert ruler_scores([]).reason == "no sample has a score"
    lost = ruler_scores([replace(whole[0], status="out_of_memory"), *whole[1:]])
    assert lost.effective_length is None
    assert "without a score at 4,096" in str(lost.reason)
    assert any("1 without a score" in line for line in lost.lines())


def test_scores_by_another_metric_are_not_called_rulers() -> None:
    other = [rescored(sample, None, "whole_match_all", thinking=False) for sample in scored("vt", [("1", ["1"])])]
    with pytest.raises(ArtefactError, match="not RULER's own"):
        ruler_scores(other)


def test_prompts_beyond_the_models_reach_are_refused(tmp_path: Path) -> None:
    file = read_ruler_file(write(place(tmp_path, "niah_single_2"), row()))
    builder = RulerBuilder(byte_tokenizer(), [file])
    exact = len(builder.build(file.samples[0]).input_ids) + 128
    require_reach(builder, file.samples, exact, "m")
    with pytest.raises(UsageError, match=rf"take {exact:,} positions.*at most {exact - 1:,}"):
        require_reach(builder, file.samples, exact - 1, "m")


def tiny_row(key: str, words: int) -> dict[str, Any]:
    """What the shipped tiny model can answer: a pass key among words."""
    text = " ".join(["cat sun moon lake dog"] * words)
    return {
        "index": 7,
        "input": f"{text}. the pass key is {key}. {text}. what is the pass key?",
        "outputs": [key],
        "answer_prefix": " the pass key is",
    }


def test_files_are_run_and_scored_for_real_stored_and_checked(tmp_path: Path) -> None:
    rows = [tiny_row(key, words) for key, words in (("48219", 1), ("73105", 3), ("90246", 2))]
    write(place(tmp_path, "niah_single_1", 256), *rows)
    write(place(tmp_path, "qa_1", 256), *rows)
    reporter = SilentReporter()
    with pytest.raises(UsageError, match="which this model reaches"):
        evaluate_ruler_files("recipes:tiny", [str(tmp_path / "256")], output=str(tmp_path / "out"), reporter=reporter)
    assert not (tmp_path / "out").exists()
    arguments: dict[str, Any] = {"output": str(tmp_path / "out"), "beyond_reach": True}
    folder = evaluate_ruler_files("recipes:tiny", [str(tmp_path / "256")], reporter=reporter, **arguments)
    stored = load_samples(folder)
    assert len(stored) == 6
    assert {sample.metric for sample in stored} == {"string_match_all/1", "string_match_part/1"}
    scores = json.loads((folder / "ruler.json").read_text())
    assert scores["scores"] == {"256": {"niah_single_1": 100.0, "qa_1": 100.0}}
    assert scores["effective_length"] is None
    results = json.loads((folder / "results.json").read_text())
    assert results["configs"]["qa_1"]["generation_kwargs"]["max_gen_toks"] == 32
    samples = (folder / "samples.jsonl").read_bytes()
    evaluate_ruler_files("recipes:tiny", [str(tmp_path / "256")], reporter=SilentReporter(), **arguments)
    assert (folder / "samples.jsonl").read_bytes() == samples, "what is stored is not asked again"
    validate_run(str(folder), check := SilentReporter(), every_prompt=True)
    assert "6 prompts made again with equal hash: in order" in check.messages[-1]
    reconstruct_run(str(folder), "niah_single_1/256/0.5000/1", shown := SilentReporter())
    assert "the pass key is 73105." in "\n".join(shown.messages)
    write(place(tmp_path, "qa_1", 256), *rows[:2])
    with pytest.raises(ArtefactError, match="changed"):
        reconstruct_run(str(folder), "qa_1/256/0.5000/1", SilentReporter())
