"""`extend`: the stages in order, each resumable.

plan -> evaluate base -> (evaluate untrained) -> train -> merge, verify -> evaluate extended -> (control arm) -> report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel

from ctxext.data.packing import WindowBuilder
from ctxext.data.tokenize import TokenStream, collect_tokens
from ctxext.errors import CtxextError, InterruptedRunError, exit_code_of
from ctxext.evaluation.gates import check_gates, gate_error
from ctxext.evaluation.run import evaluate_arm, suite_identity
from ctxext.evaluation.store import load_samples
from ctxext.evaluation.suite import resolve_samples
from ctxext.export.card import is_edited, write_card
from ctxext.export.merge import read_back, write_merged
from ctxext.files import read_json, require_free_space, verify_manifest, write_json_atomic
from ctxext.model.load import (
    ModelSource,
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    resolve_source,
    short_name,
)
from ctxext.pipeline.report import gather, report_run
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.run_folder import RunFolder, environment_facts
from ctxext.planning.cost import estimated_seconds, measured_flops_per_second
from ctxext.planning.plan import Plan, make_plan, suite_of
from ctxext.recipe.schema import Recipe
from ctxext.rope.methods import NoRewrite, RopeMethod
from ctxext.rope.patchers import apply_method
from ctxext.rope.portable import exported_form
from ctxext.rope.verify import verify_positions
from ctxext.train.adapter import load_adapter, save_adapter
from ctxext.train.checkpoint import TrainState
from ctxext.train.loop import Trainer, make_accelerator
from ctxext.train.signals import StopRequest

DEFAULT_OUTPUT = "runs"


@dataclass
class _Job:
    """What all stages share."""

    recipe: Recipe
    plan: Plan
    run: RunFolder
    reporter: Reporter
    stop: StopRequest
    source: ModelSource
    base_config: PreTrainedConfig
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    accelerator: Accelerator
    stream: TokenStream | None = None

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)


def output_folder(recipe: Recipe) -> Path:
    """Where the run goes: `output_dir`, or a name made of model, method and length under `runs/`."""
    if recipe.output_dir:
        return Path(recipe.output_dir)
    return Path(DEFAULT_OUTPUT) / f"{short_name(recipe.model.source)}-{recipe.rope.method}-{recipe.target_length}"


def estimated_run_seconds(recipe: Recipe, plan: Plan) -> float:
    """Time of all evaluations and trainings at the matrix speed measured on this machine now."""
    device = choose_device()
    speed = measured_flops_per_second(device, choose_dtype(recipe.model.dtype, device))
    trainings = 1 + recipe.evaluation.control
    return estimated_seconds(plan.evaluation_flops + trainings * plan.train_flops, speed)


def extend(recipe: Recipe, reporter: Reporter, *, last_stage: str = "report") -> Path:
    """Run (or go on with) the whole job and return the run folder.

    Args:
        last_stage: `train` stops once the adapter is there; `report` does everything.

    Raises:
        CtxextError: with the exit code of its kind; `status.json` repeats code and reason.
    """
    plan = make_plan(recipe)
    run = RunFolder(output_folder(recipe))
    device = choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    reporter.plan(plan, estimated_run_seconds(recipe, plan), str(run.path))
    accelerator = make_accelerator(dtype, device, list(recipe.train.trackers), run.path)
    source = resolve_source(recipe.model.source, recipe.model.revision)
    with StopRequest() as stop:
        require_free_space(run.path, 2 * plan.merged_bytes, "checkpoints and the merged model")
        if accelerator.is_main_process:
            # Before the status is this command's to write: a folder of another run is refused and left as it is.
            run.open(recipe, plan.to_json(), environment_facts(str(device), str(dtype).removeprefix("torch.")))
        accelerator.wait_for_everyone()
        try:
            job = _Job(
                recipe,
                plan,
                run,
                reporter,
                stop,
                source,
                load_config(source),
                load_tokenizer(source),
                accelerator.device,
                dtype,
                accelerator,
            )
            _run_stages(job, last_stage)
        except BaseException as error:  # bugs too, or status.json would keep what an earlier try said
            _record_end(run, error)
            raise
    run.ended(0, "done")
    return run.path


def _record_end(run: RunFolder, error: BaseException) -> None:
    if run.path.is_dir():
        with suppress(CtxextError):  # a full disk must not hide the error that is being reported
            expected = isinstance(error, CtxextError)
            run.ended(exit_code_of(error), str(error) if expected else f"{type(error).__name__}: {error}")


def _run_stages(job: _Job, last_stage: str) -> None:
    stages: list[tuple[str, str, Callable[[_Job], None]]] = []
    if job.recipe.evaluation.before and last_stage != "train":
        stages.append(("evaluate-base", "evaluate the base model", _evaluate_base))
    if job.recipe.evaluation.untrained and last_stage != "train":
        stages.append(("evaluate-untrained", "evaluate the extended model before training", _evaluate_untrained))
    stages.append(("train", "train LoRA at the longer length", _train_extended))
    if last_stage != "train":
        stages.append(("merge", "merge, write and read back the plain checkpoint; evaluate it", _merge_and_evaluate))
        if job.recipe.evaluation.control:
            stages.append(("control", "control arm: the same training without the RoPE rewrite", _control_arm))
        stages.append(("report", "write heatmaps and report", _report))
    for number, (name, title, action) in enumerate(stages, start=1):
        job.reporter.stage(number, len(stages), title)
        with _timed(job, name):
            action(job)
        job.stop.check("everything finished so far is saved")
    if last_stage != "train":
        _check_gates(job)


@contextmanager
def _timed(job: _Job, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    except InterruptedRunError:
        if job.is_main:
            job.run.stage_finished(stage, time.perf_counter() - started)
        raise
    if job.is_main:
        job.run.stage_finished(stage, time.perf_counter() - started)


def _config_for(job: _Job, method: RopeMethod) -> PreTrainedConfig:
    return apply_method(job.base_config, method, job.recipe.target_length, job.recipe.on_existing)


def _load(job: _Job, config: PreTrainedConfig) -> PreTrainedModel:
    model = load_model(job.source, config, dtype=job.dtype, device=job.device)
    job.reporter.info(verify_positions(model, config).summary())
    return model


def _evaluate(job: _Job, model: PreTrainedModel, arm: str, title: str) -> None:
    if not job.is_main:
        return
    weights: dict[str, Any] = {"source": job.source.name, "fingerprint": job.plan.weights, "arm": arm}
    if arm in ("extended", "control"):
        weights["plan_id"] = job.plan.plan_id
    evaluate_arm(
        model,
        job.tokenizer,
        suite_of(job.plan),
        folder=job.run.evaluation(arm),
        title=title,
        original_length=job.plan.original_length,
        target_length=job.plan.target_length,
        weights=weights,
        facts={
            "arm": arm,
            "plan_id": job.plan.plan_id,
            "environment": environment_facts(str(job.device), str(model.dtype).removeprefix("torch.")),
        },
        reporter=job.reporter,
        check_stop=lambda: job.stop.check("finished samples are saved"),
    )


def _evaluation_complete(job: _Job, arm: str) -> bool:
    """Whether an arm has every sample, so that its model need not be loaded to find out."""
    folder, suite = job.run.evaluation(arm), suite_of(job.plan)
    if not (folder / "run.json").is_file():
        return False
    identity = read_json(folder / "run.json").get("identity", {})
    if any(identity.get(key) != value for key, value in suite_identity(suite).items()):
        return False  # samples of another suite, which opening the store will refuse by name
    stored = {sample.sample_id for sample in load_samples(folder) if sample.status == "ok"}
    wanted = resolve_samples(suite, job.plan.original_length, job.plan.target_length)
    return all(sample.sample_id in stored for sample in wanted)


def _evaluate_base(job: _Job) -> None:
    if _evaluation_complete(job, "base"):
        job.reporter.info("finished earlier")
        return
    _evaluate(job, _load(job, job.base_config), "base", "base model, as it came")


def _evaluate_untrained(job: _Job) -> None:
    if _evaluation_complete(job, "untrained"):
        job.reporter.info("finished earlier")
        return
    _evaluate(job, _load(job, _config_for(job, job.recipe.rope)), "untrained", f"{job.recipe.rope.method}, untrained")


def _provenance(job: _Job, method: RopeMethod) -> dict[str, Any]:
    resolved = method.resolved(job.plan.original_length, job.plan.target_length)
    return {
        "base": {"source": job.source.name, "revision": job.source.revision, "fingerprint": job.plan.weights},
        "method": resolved.model_dump(mode="json"),
        "original_length": job.plan.original_length,
        "target_length": job.plan.target_length,
        "on_existing": job.recipe.on_existing,
        "plan_id": job.plan.plan_id,
    }


def _builder(job: _Job) -> WindowBuilder:
    data, plan = job.recipe.data, job.plan
    if job.stream is None:
        with job.reporter.progress("read and tokenise training text") as progress:
            job.stream = collect_tokens(job.tokenizer, data.sources, plan.train_tokens, data.seed, progress)
        job.reporter.info(_stream_summary(job.stream, plan.train_tokens))
    return WindowBuilder(job.stream, data, job.tokenizer, plan.target_length)


def _stream_summary(stream: TokenStream, wanted: int) -> str:
    text = f"{len(stream.ids):,} tokens of training text in {len(stream.document_starts):,} documents"
    passes = wanted / len(stream.ids)
    return f"{text}, read {passes:.1f} times in another order each time" if passes > 1.01 else text


def _train(job: _Job, method: RopeMethod, folder: Path, adapter: Path, title: str) -> None:
    """Train one arm into `folder` and write its adapter; skipped when the adapter is complete."""
    if adapter.is_dir():
        verify_manifest(adapter)
        job.reporter.info(f"finished earlier: {adapter}")
        return
    builder = _builder(job)
    assert job.stream is not None
    config = _config_for(job, method)
    state = TrainState(0, job.plan.plan_id, job.stream.sha256, job.accelerator.num_processes)
    trainer = Trainer(
        job.accelerator, _load(job, config), config, builder, job.recipe.lora, job.recipe.train, folder, state
    )
    if job.recipe.train.trackers:
        job.accelerator.init_trackers(method.method, config={"plan_id": job.plan.plan_id})
    with job.reporter.training(title, job.recipe.train.steps) as hooks:
        trainer.run(hooks, job.stop)
    if job.recipe.train.trackers:
        job.accelerator.end_training()
    if job.is_main:
        save_adapter(adapter, trainer.model, _provenance(job, method))
    job.accelerator.wait_for_everyone()
    job.accelerator.free_memory()  # it would keep the trained model beside those of later stages


def _train_extended(job: _Job) -> None:
    _train(job, job.recipe.rope, job.run.path, job.run.adapter, f"train {job.recipe.rope.method}")


def _merge_and_evaluate(job: _Job) -> None:
    if not job.is_main:
        return
    arm = "extended" if job.recipe.rope.method != "none" else "control"
    config = _config_for(job, job.recipe.rope)
    if job.run.merged.is_dir():
        verify_manifest(job.run.merged)
        job.reporter.info(f"merged earlier: {job.run.merged}")
        if _evaluation_complete(job, arm):
            return
        model = read_back(job.run.merged, job.dtype, job.device)
        job.reporter.info(verify_positions(model, exported_form(config)[0]).summary())
    else:
        wrapped = load_adapter(job.run.adapter, _load(job, config))
        model, proof = write_merged(job.run.merged, wrapped, job.tokenizer, _provenance(job, job.recipe.rope))
        job.reporter.info(
            f"merged checkpoint read back by stock transformers: largest logit difference to base + adapter "
            f"{proof.largest_logit_difference:.1e}"
        )
        job.reporter.info(proof.verification.summary())
    _evaluate(job, model, arm, f"{job.recipe.rope.method}, trained" if arm == "extended" else "no rewrite, trained")


def _control_arm(job: _Job) -> None:
    method = NoRewrite(control=True)
    adapter = job.run.control / "adapter"
    _train(job, method, job.run.control, adapter, "train the control arm")
    if not job.is_main or _evaluation_complete(job, "control"):
        return
    config = _config_for(job, method)
    merged: Any = load_adapter(adapter, _load(job, config)).merge_and_unload()
    merged.eval()
    _evaluate(job, merged, "control", "control arm: no rewrite, same training")


def _report(job: _Job) -> None:
    if not job.is_main:
        return
    report_run(job.run)
    if is_edited(job.run.merged):
        job.reporter.info("the model card was edited by hand and is kept; `ctxext card RUN --replace` writes it anew")
    else:
        job.reporter.info(f"model card: {write_card(job.run.path)}")


def _check_gates(job: _Job) -> None:
    """Raise what ends the run with exit code 6; everything that was made stays."""
    gates = job.recipe.evaluation.gates
    if gates is None or not job.is_main:
        return
    facts, arms = gather(job.run, job.recipe)
    answer_tokens = facts.suite.get("max_new_tokens") or 0
    outcomes = check_gates(gates, arms, original_length=facts.original_length, answer_tokens=answer_tokens)
    write_json_atomic(job.run.path / "gates.json", [asdict(outcome) for outcome in outcomes])
    for outcome in outcomes:
        job.reporter.info(outcome.sentence)
    if error := gate_error(outcomes):
        raise error
