"""lm-evaluation-harness on our model: what needs it runs where it is installed, everything else always."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import byte_tokenizer, tiny_config, tiny_model
from transformers import AutoTokenizer, LlamaForCausalLM

from ctxext.errors import ArtefactError, PositionsNotInEffectError, UsageError
from ctxext.evaluation.harness import (
    HarnessScore,
    HarnessSummary,
    evaluate_harness,
    load_summary,
    parse_tasks,
    require_harness,
    save_tokenizer,
    score_picture,
    scores_of,
    summarise,
)
from ctxext.files import write_json_atomic
from ctxext.rope.patchers import extend_config

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'ctxext[harness]'",
)
REACH = 256


def test_task_names_come_from_a_list_with_commas() -> None:
    assert parse_tasks("hellaswag, niah_single_1,hellaswag,") == ["hellaswag", "niah_single_1"]
    with pytest.raises(UsageError, match="no task is named"):
        parse_tasks(" , ")


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is not None:

        def missing(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UsageError, match=r"not installed\. Install it with: pip install 'ctxext\[harness\]'") as raised:
        evaluate_harness(tiny_model(), byte_tokenizer(), ["hellaswag"], tmp_path, reach=REACH, weights={})
    assert raised.value.exit_code == 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError):
        require_harness()


def sample(scores: dict[str, Any], *, selection: str = "none", truncated: bool = False) -> dict[str, Any]:
    return {"filter": selection, "scores": scores, "truncated": truncated, "prompt_tokens": 90}


def stored(task: str, results: dict[str, Any], samples: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "identity_hash": "",
        "results": {"results": {task: results}, "versions": {task: 1}, "date": 1.0, **more},
        "samples": {task: samples},
    }


def test_every_length_of_a_ruler_task_is_scored_apart_and_lengths_that_did_not_run_are_left_out() -> None:
    found = scores_of(
        stored(
            "niah",
            {"alias": "niah", "4096,none": 0.75, "4096_stderr,none": 0.2, "8192,none": 0.5, "16384,none": -1},
            [
                *(sample({"4096": right, "8192": -1.0}) for right in (1.0, 1.0, 1.0, 0.0)),
                *(sample({"4096": -1.0, "8192": right}, truncated=True) for right in (1.0, 0.0)),
            ],
        )
    )
    assert [(one.length_tokens, one.value, one.num_samples, one.num_truncated) for one in found] == [
        (4096, 0.75, 4, 0),
        (8192, 0.5, 2, 2),
    ]
    assert found[0].interval_95 == pytest.approx([0.3006, 0.9544], abs=1e-4)  # Wilson, 3 of 4
    assert found[1].sentence() == (
        "niah, 8,192 tokens: 0.500 (95% interval 0.095 to 0.905, 2 samples, prompts of 90 tokens; "
        "2 prompts lost the beginning)"
    )


def test_filters_are_told_apart_and_scores_without_bounds_keep_the_harness_error() -> None:
    found = scores_of(
        stored(
            "gsm",
            {"exact_match,strict": 0.0, "exact_match,flexible": 1.0, "word_perplexity,none": 12.0, "f1,none": 0.9},
            [
                *(sample({"exact_match": 0.0}, selection="strict") for _ in range(3)),
                *(sample({"exact_match": 1.0}, selection="flexible") for _ in range(3)),
                *(sample({"word_perplexity": [1.0, 2.0], "f1": 0.5}) for _ in range(2)),
            ],
            higher_is_better={"gsm": {"exact_match": True, "word_perplexity": False}},
        )
    )
    assert [(one.metric, one.value, one.higher_is_better) for one in found] == [
        ("exact_match,strict", 0.0, True),
        ("exact_match,flexible", 1.0, True),
        ("word_perplexity", 12.0, False),
        ("f1", 0.9, None),
    ]
    assert found[0].interval_95 == pytest.approx([0, 0.5615], abs=1e-4)
    # Neither is the mean of its samples, and neither has a standard error.
    assert found[2].interval_95 is None
    assert found[3].interval_95 is None
    plain = scores_of(stored("t", {"bleu,none": 20.0, "bleu_stderr,none": 1.0}, [sample({"bleu": [1]})]))
    assert plain[0].interval_95 == pytest.approx([18.04, 21.96], abs=1e-2)


def test_stored_tasks_become_one_result_in_the_harness_own_form(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 0.0)):
        task = stored(name, {"acc,none": value}, [sample({"acc": value})])
        write_json_atomic(tmp_path / "harness" / f"{name}.json", task)
    summary = summarise(tmp_path, ["a", "b"], "0.4.13")
    merged = json.loads((tmp_path / "harness-results.json").read_text())
    assert merged["results"] == {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.0}}
    assert merged["versions"] == {"a": 1, "b": 1}
    assert load_summary(tmp_path) == summary
    assert [line.strip() for line in summary.lines()][1].startswith("a, acc: 1.000 (95% interval 0.207 to 1.000")
    assert (tmp_path / "harness.png").read_bytes().startswith(b"\x89PNG")
    assert load_summary(tmp_path / "nowhere") is None
    (tmp_path / "harness-summary.json").write_text('{"scores": [{"task": 1}]}')
    with pytest.raises(ArtefactError, match=r"harness-summary\.json: not a summary"):
        load_summary(tmp_path)


def test_scores_beyond_the_axis_are_named_instead_of_drawn() -> None:
    inside = HarnessScore("t", "acc", None, 0.5, [0.4, 0.6], True, 9, 0, None)
    outside = HarnessScore("t", "perplexity", None, 12.25, None, False, 9, 0, None)
    svg = score_picture([inside, outside]).svg.decode()
    assert "12.2" in svg
    assert "12.2" not in score_picture([inside]).svg.decode()


def test_the_tokenizer_that_tasks_load_names_no_code(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["someone/somewhere--code.Tokenizer", None]}
    tokenizer.save_pretrained(tmp_path / "plain")
    save_tokenizer(tokenizer, tmp_path / "safe")
    names = [(tmp_path / folder / "tokenizer_config.json").read_text() for folder in ("plain", "safe")]
    assert ["auto_map" in text for text in names] == [True, False]
    again = AutoTokenizer.from_pretrained(tmp_path / "safe", trust_remote_code=False)
    assert again("any text").input_ids == tokenizer("any text").input_ids


@needs_harness
def test_no_asked_length_is_longer_than_the_model_reaches(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 256"):
        run(tmp_path, ["niah_single_1"], lengths=[128, 512])


def task_file(folder: Path, *, data: str = "data.jsonl", kind: str = "multiple_choice") -> Path:
    """A task in the harness's format on local data: which of two letters comes next?"""
    rows = [{"text": "abcab" * n, "choices": ["c", "z"], "label": 0} for n in (1, 3, 30, 60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scoring = {
        "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n',
        "generate_until": 'doc_to_target: "c"\ngeneration_kwargs: {until: ["a"], max_gen_toks: 8}\n'
        "metric_list:\n  - metric: exact_match\n",
    }[kind]
    path = folder / f"{kind}.yaml"
    path.write_text(
        f"task: ctxext_test_{kind}\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / data}\ntest_split: test\n"
        f'output_type: {kind}\ndoc_to_text: "{{{{text}}}}"\ntarget_delimiter: ""\n{scoring}'
        "metadata:\n  version: 1.0\n"
    )
    return path


def extended() -> LlamaForCausalLM:
    """The tiny model with YaRN in its config from the start."""
    torch.manual_seed(0)
    config = extend_config(tiny_config(initializer_range=0.3), target_length=REACH)
    return LlamaForCausalLM(config).eval()


def run(folder: Path, tasks: list[str], model: Any = None, **asked: Any) -> tuple[HarnessSummary, list[str]]:
    told: list[str] = []
    summary = evaluate_harness(
        model or extended(),
        byte_tokenizer(),
        tasks,
        folder,
        **{"reach": REACH, "weights": {"seed": 0}, "inform": told.append, **asked},
    )
    return summary, told


@needs_harness
def test_the_harness_scores_our_model_with_its_extended_positions(tmp_path: Path) -> None:
    summary, told = run(tmp_path / "out", [str(task_file(tmp_path))])
    assert told[0].startswith("positions in effect")
    found = json.loads((tmp_path / "out" / "harness" / "ctxext_test_multiple_choice.json").read_text())
    rows = found["samples"]["ctxext_test_multiple_choice"]
    assert [row["prompt_tokens"] for row in rows] == [5, 15, 150, 300]
    unscaled = LlamaForCausalLM(tiny_config(initializer_range=0.3)).eval()
    unscaled.load_state_dict(extended().state_dict())
    ids = [byte_tokenizer()(("abcab" * 30) + letter).input_ids for letter in "cz"]
    with torch.no_grad():
        each = [
            [float(model(torch.tensor([row])).logits[0, -2].log_softmax(-1)[row[-1]]) for row in ids]
            for model in (extended(), unscaled)
        ]
    answers = [float(answer[0]) for answer in rows[2]["answers"]]
    assert answers == pytest.approx(each[0], abs=1e-3)
    assert max(abs(a - b) for a, b in zip(answers, each[1], strict=True)) > 0.01
    # The last prompt is longer than the model reaches, which the harness cuts and only logs.
    assert [row["truncated"] for row in rows] == [False, False, False, True]
    scores = {score.metric: score for score in summary.scores}
    assert scores["acc"].num_samples == 4
    assert scores["acc"].num_truncated == 1
    assert scores["acc"].interval_95 is not None


@needs_harness
def test_generated_answers_are_stored_and_a_finished_task_is_not_run_again(tmp_path: Path) -> None:
    tasks = [str(task_file(tmp_path, kind="generate_until"))]
    first, told = run(tmp_path / "out", tasks)
    assert any("asked through" in line for line in told)
    stored_at = tmp_path / "out" / "harness" / "ctxext_test_generate_until.json"
    content = stored_at.read_bytes()
    again, told = run(tmp_path / "out", tasks)
    assert told[-1] == "ctxext_test_generate_until: stored already"
    assert again == first
    assert stored_at.read_bytes() == content
    limited, told = run(tmp_path / "out", tasks, limit=2)
    assert any("asked through" in line for line in told)
    assert limited.scores[0].num_samples == 2
    _, told = run(tmp_path / "out", tasks, limit=2, weights={"seed": 1})
    assert any("asked through" in line for line in told)


@needs_harness
def test_the_callers_tokenizer_stays_as_it_was(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    before = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    evaluate_harness(
        extended(), tokenizer, [str(task_file(tmp_path))], tmp_path / "o", reach=REACH, weights={}, limit=1
    )
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == before


@needs_harness
def test_what_cannot_be_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'hellaswag'"):
        run(tmp_path, ["helaswag"])
    with pytest.raises(ArtefactError, match="could not read the task file"):
        run(tmp_path, [str(tmp_path / "none.yaml")])
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("dataset_path: json\n")
    with pytest.raises(ArtefactError, match="gives no task name"):
        run(tmp_path, [str(nameless)])
    broken = task_file(tmp_path, data="nowhere.jsonl")
    with pytest.raises(ArtefactError, match=r"could not run the task \(.*multiple_choice\.yaml|could not run the task"):
        run(tmp_path / "broken", [str(broken)])
    assert not (tmp_path / "broken" / "harness").exists()


@needs_harness
def test_positions_that_are_not_in_effect_stop_before_any_task(tmp_path: Path) -> None:
    model = extended()
    model.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(PositionsNotInEffectError):
        run(tmp_path, [str(task_file(tmp_path))], model)
