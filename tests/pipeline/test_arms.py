"""Arms of `ctxext eval`: every arm is asked the same prompts under its own positions, and the report says which."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
from support import Job, SilentReporter, make_job, run_cli, save_tiny_model

from ctxext.errors import ArtefactError, CtxextError, GateError, UsageError
from ctxext.evaluation.store import SampleResult, load_samples
from ctxext.files import read_json
from ctxext.pipeline.arms import ArmSpec, parse_arms
from ctxext.pipeline.evaluate import evaluate_models, gather_evaluation, report_evaluation
from ctxext.pipeline.evaluation_plan import EvaluationRequest
from ctxext.pipeline.extend import extend
from ctxext.rope.methods import Linear, Yarn


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    made = make_job(tmp_path_factory.mktemp("arms"))
    extend(made.recipe("evaluation.before=false"), SilentReporter())
    return made


def request(job: Job, output: Path, *arms: str, **changes: object) -> EvaluationRequest:
    values: dict[str, object] = {
        "model": str(job.folder / "models" / "tiny"),
        "arms": arms,
        "suite": str(job.folder / "suite.yaml"),
        "output": str(output),
        "dtype": "float32",
        "target_length": 256,
        **changes,
    }
    return EvaluationRequest(**values)  # type: ignore[arg-type]


def prompts(samples: list[SampleResult]) -> dict[str, str]:
    return {sample.sample_id: sample.prompt_sha256 for sample in samples}


def test_without_arms_the_model_is_the_only_one() -> None:
    assert parse_arms([], model="m", method="yarn", target_length=None) == [ArmSpec("base")]


def test_arms_are_models_or_variants_of_the_model() -> None:
    texts = ["base", "untrained", "pi=method:linear", "y=method:yarn,beta_fast=64", "extended=runs/x/merged"]
    assert parse_arms(texts, model="m", method="yarn", target_length=512) == [
        ArmSpec("base"),
        ArmSpec("untrained", method=Yarn()),
        ArmSpec("pi", method=Linear()),
        ArmSpec("y", method=Yarn(beta_fast=64)),
        ArmSpec("extended", source="runs/x/merged"),
    ]


@pytest.mark.parametrize(
    ("texts", "model", "target_length", "says"),
    [
        ([], None, None, "no model to evaluate"),
        (["base", "base"], "m", None, "given twice; got 'base'"),
        (["base"], None, None, "variants of a model"),
        (["untrained"], "m", None, "--target-length N"),
        (["pi=method:linear"], "m", None, "--target-length N"),
        (["control"], "m", 512, "needs a model"),
        (["control="], "m", 512, "names no model"),
        (["../x=m"], "m", 512, "not an arm"),
        (["=m"], "m", 512, "not an arm"),
        (["x=method:jarn"], "m", 512, "unknown RoPE method.*yarn"),
        (["x=method:yarn,beta=3"], "m", 512, "beta"),
    ],
)
def test_an_arm_that_cannot_be_made_is_refused(
    texts: list[str], model: str | None, target_length: int | None, says: str
) -> None:
    with pytest.raises(CtxextError, match=says) as caught:
        parse_arms(texts, model=model, method="yarn", target_length=target_length)
    assert caught.value.exit_code == 2


def test_all_arms_answer_the_same_prompts_under_their_own_positions(job: Job, tmp_path: Path) -> None:
    reporter = SilentReporter()
    output = tmp_path / "out"
    folder = evaluate_models(
        request(
            job,
            output,
            "base",
            "untrained",
            "pi=method:linear",
            f"extended={job.output}",
            f"adapter={job.output / 'adapter'}",
        ),
        reporter,
    )
    facts, arms = gather_evaluation(output)
    assert [arm.name for arm in arms] == ["base", "untrained", "pi", "extended", "adapter"]
    assert all(prompts(arm.samples) == prompts(arms[0].samples) for arm in arms)
    assert {len(arm.samples) for arm in arms} == {4}
    types = {arm.name: (arm.run["identity"]["rope_parameters"] or {}).get("rope_type") for arm in arms}
    assert types == {"base": "default", "untrained": "yarn", "pi": "linear", "extended": "yarn", "adapter": "yarn"}
    by_name = {arm.name: {s.sample_id: s.answer_ids for s in arm.samples} for arm in arms}
    assert by_name["adapter"] == by_name["extended"]
    assert (facts.original_length, facts.target_length) == (128, 256)
    assert any("Arm base reaches 128 positions" in message for message in reporter.messages)
    assert folder == output
    page = output / "report" / "index.html"
    assert "no control arm" in page.read_text()
    before = {path.name: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}
    assert report_evaluation(output) == page
    assert before == {path.name: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}


def test_a_stopped_evaluation_of_arms_goes_on_where_it_was(job: Job, tmp_path: Path) -> None:
    asked = request(job, tmp_path / "out", "base", "untrained")
    evaluate_models(asked, SilentReporter())
    lines = (tmp_path / "out/arms/untrained/samples.jsonl").read_bytes()
    again = SilentReporter()
    evaluate_models(asked, again)
    assert (tmp_path / "out/arms/untrained/samples.jsonl").read_bytes() == lines


def test_arms_whose_tokenizers_differ_are_refused_before_anything_is_loaded(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base and tiny have tokenizers that make different prompts"):
        evaluate_models(request(job, tmp_path / "out", "base", "tiny=recipes:tiny"), SilentReporter())
    assert not (tmp_path / "out").exists()


def test_other_arms_in_the_folder_are_refused(job: Job, tmp_path: Path) -> None:
    evaluate_models(request(job, tmp_path / "out", "base", "x=method:linear"), SilentReporter())
    with pytest.raises(ArtefactError, match=r"something else.*rope_parameters"):
        evaluate_models(request(job, tmp_path / "out", "base", "x=method:yarn"), SilentReporter())


def test_a_limit_asks_fewer_and_says_so(job: Job, tmp_path: Path) -> None:
    reporter = SilentReporter()
    evaluate_models(request(job, tmp_path / "out", limit=1, beyond_reach=True), reporter)
    samples = load_samples(tmp_path / "out")
    assert [sample.length_tokens for sample in samples] == [240]
    assert "1 of the suite's 4 samples were asked; intervals are wider." in reporter.messages
    assert "1 of the suite's 4 samples were asked" in html.unescape((tmp_path / "out/report/index.html").read_text())


def test_too_little_time_for_the_longest_length_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-minutes"):
        evaluate_models(request(job, tmp_path / "out", max_minutes=1e-9, beyond_reach=True), SilentReporter())


def test_a_gate_that_is_not_met_ends_with_exit_code_6_and_keeps_everything(job: Job, tmp_path: Path) -> None:
    with pytest.raises(GateError) as caught:
        evaluate_models(
            request(job, tmp_path / "out", "base", f"extended={job.output}", gates=("effective_length=240",)),
            SilentReporter(),
        )
    assert caught.value.exit_code == 6
    (outcome,) = read_json(tmp_path / "out/gates.json")
    assert outcome["name"] == "effective_length"
    assert not outcome["met"]
    assert (tmp_path / "out/report/index.html").is_file()


def test_a_wrong_gate_is_refused_before_anything_is_loaded(job: Job, tmp_path: Path) -> None:
    with pytest.raises(CtxextError, match="tale"):
        evaluate_models(request(job, tmp_path / "out", gates=("tale=0",)), SilentReporter())


def test_the_command_line_takes_arms_and_another_grid(job: Job, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "m")
    finished = run_cli(
        *("eval", "m", "--suite", str(job.folder / "suite.yaml"), "--arm", "base", "--arm", "untrained"),
        *("--target-length", "256", "--lengths", "100,120", "--depths", "3", "--samples", "2", "-o", "out"),
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    samples = load_samples(tmp_path / "out/arms/base")
    assert {(s.length_tokens, s.depth) for s in samples} == {(n, d) for n in (100, 120) for d in (0.0, 0.5, 1.0)}
    assert len(samples) == 12
    assert "12 samples at 100 (6) and 120 (6) tokens" in finished.stdout
    assert "nothing is claimed beyond 120 tokens" in finished.stdout
