"""`extend`: the stages in order, each resumable.

plan -> evaluate base -> (evaluate untrained) -> train -> merge, verify -> evaluate extended -> (control arm) -> report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel

from ctxext.data.layout import pieces_sha256
from ctxext.data.packing import WindowBuilder
from ctxext.data.streaming import StreamedWindows
from ctxext.data.windows import TrainingWindows
from ctxext.errors import CtxextError, InterruptedRunError, exit_code_of
from ctxext.evaluation.answerer import Answerer
from ctxext.evaluation.perplexity import load_perplexity
from ctxext.evaluation.prompt import prompt_identity
from ctxext.evaluation.run import evaluate_arm
from ctxext.evaluation.sharding import this_launch
from ctxext.evaluation.store import load_samples
from ctxext.evaluation.suite import resolve_samples, stored_suite
from ctxext.export.card import is_edited, write_card
from ctxext.export.merge import merged_in_memory, read_back, write_merged
from ctxext.export.quantised import compare_with_quantised
from ctxext.files import fingerprint, read_json, require_free_space, verify_manifest, write_json_atomic
from ctxext.model.attention_choice import AttentionHost, attention_of
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
from ctxext.model.parts import causal_lm
from ctxext.model.quantised import QUANTISATION_KEY, load_quantised, quantisation
from ctxext.pipeline.excerpts import write_excerpts
from ctxext.pipeline.gates import enforce_gates
from ctxext.pipeline.report import arms_of_run, gather, report_run
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.run_folder import ADAPTER_NAME, WHOLE_NAME, RunFolder, environment_facts
from ctxext.pipeline.training_data import TrainingData, prepare_training_data, streamed_json
from ctxext.planning.cost import estimated_seconds, measured_flops_per_second
from ctxext.planning.parallel_plan import ParallelPlan, plan_parallel
from ctxext.planning.periodic_plan import periodic_suite
from ctxext.planning.plan import Plan, make_plan
from ctxext.recipe.data import STREAMED
from ctxext.recipe.effects import Difference
from ctxext.recipe.schema import Recipe
from ctxext.rope.methods import NoRewrite, RopeMethod
from ctxext.rope.patchers import apply_method
from ctxext.rope.portable import exported_form
from ctxext.rope.verify import verify_positions
from ctxext.train.adapter import load_trained, read_provenance, save_trained
from ctxext.train.checkpoint import TrainState
from ctxext.train.inexact import record as record_inexact
from ctxext.train.inexact import records as inexact_records
from ctxext.train.loop import Trainer, make_accelerator
from ctxext.train.periodic import CHECKPOINT, PeriodicEvaluation
from ctxext.train.sharding import empty_model
from ctxext.train.signals import StopRequest
from ctxext.train.step import SummedLoss
from ctxext.train.trackers import start_trackers, stop_trackers
from ctxext.train.watch import make_monitors, reasons_against_attention

DEFAULT_OUTPUT = "runs"


@dataclass(frozen=True)
class Origin:
    """Where a curriculum began, for its later stages, whose own base is what the stage before has merged.

    Attributes:
        stages: method, target length and plan of the stages before.
    """

    source: ModelSource
    config: PreTrainedConfig
    fingerprint: str
    stages: list[dict[str, Any]]


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
    parallel: ParallelPlan
    training_data: TrainingData | None = None
    origin: Origin | None = None
    allow_inexact: bool = False

    @property
    def trained_name(self) -> str:
        """Of the folder that training writes, in the run's and in the control arm's folder."""
        return WHOLE_NAME if self.recipe.adaptation == "full" else ADAPTER_NAME

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


def planned(recipe: Recipe) -> tuple[Plan, ParallelPlan]:
    """The plan, and what it says about processes.

    Raises:
        CtxextError: see `make_plan` and `plan_parallel`.
    """
    plan, parallel = make_plan(recipe), plan_parallel(recipe, SummedLoss)
    return replace(plan, parallel=parallel.to_json()), parallel


def extend(
    recipe: Recipe,
    reporter: Reporter,
    *,
    last_stage: str = "report",
    origin: Origin | None = None,
    started: float | None = None,
    allow_inexact: bool = False,
) -> Path:
    """Run (or go on with) the whole job and return the run folder; of a recipe with stages, see `pipeline.stages`.

    Args:
        last_stage: `train` stops once the adapter is there, `merge` once the checkpoint is; `report` does everything.
        origin: the model that a curriculum began with, which the arm `base` then is.
        started: when `train.max_hours` began, by `time.monotonic()`; now when left out.
        allow_inexact: train on although settings differ from those that the training began with; recorded.

    Raises:
        CtxextError: with the exit code of its kind; `status.json` repeats code and reason.
    """
    hours, started = recipe.train.max_hours, time.monotonic() if started is None else started
    plan, parallel = planned(recipe)
    run = RunFolder(output_folder(recipe))
    device = choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    reporter.plan(plan, estimated_run_seconds(recipe, plan), str(run.path))
    accelerator = make_accelerator(dtype, device, list(recipe.train.trackers), run.path)
    source = resolve_source(recipe.model.source, recipe.model.revision)
    with StopRequest(None if hours is None else 3600 * hours, started) as stop:
        require_free_space(run.path, plan.disk_bytes, "checkpoints and the merged model")
        if accelerator.is_main_process:
            # Before the status is this command's to write: a folder of another run is refused and left as it is.
            facts = environment_facts(str(device), str(dtype).removeprefix("torch."))
            for note in run.open(recipe, plan.to_json(), facts, allow_inexact=allow_inexact):
                reporter.info(note)
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
                parallel,
                origin=origin,
                allow_inexact=allow_inexact,
            )
            _run_stages(job, last_stage)
        except BaseException as error:  # bugs too, or status.json would keep what an earlier try said
            _record_end(run, error)
            raise
    if accelerator.is_main_process:
        run.ended(0, "done")
    return run.path


def _record_end(run: RunFolder, error: BaseException) -> None:
    if run.path.is_dir():
        with suppress(CtxextError):  # a full disk must not hide the error that is being reported
            expected = isinstance(error, CtxextError)
            run.ended(exit_code_of(error), str(error) if expected else f"{type(error).__name__}: {error}")


def _run_stages(job: _Job, last_stage: str) -> None:
    stages: list[tuple[str, str, Callable[[_Job], object]]] = []
    if job.recipe.evaluation.before and last_stage == "report":
        stages.append(("evaluate-base", "evaluate the base model", _evaluate_base))
    if job.recipe.evaluation.untrained and last_stage == "report":
        stages.append(("evaluate-untrained", "evaluate the extended model before training", _evaluate_untrained))
    what = "every weight" if job.recipe.adaptation == "full" else "LoRA"
    stages.append(("train", f"train {what} at the longer length", _train_extended))
    if last_stage == "merge":
        stages.append(("merge", "merge, write and read back the plain checkpoint", _merge))
    elif last_stage == "report":
        stages.append(("merge", "merge, write and read back the plain checkpoint; evaluate it", _merge_and_evaluate))
        if job.recipe.evaluation.control:
            stages.append(("control", "control arm: the same training without the RoPE rewrite", _control_arm))
        stages.append(("report", "write heatmaps and report", _report))
    for number, (name, title, action) in enumerate(stages, start=1):
        job.reporter.stage(number, len(stages), title)
        job.stop.new_pace()
        with _timed(job, name):
            action(job)
        job.stop.agree(this_launch())
        job.stop.check("everything finished so far is saved")
    if last_stage == "report":
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


def _load(job: _Job, config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    model = load_model(job.source, config, dtype=job.dtype, device=job.device, attention=attention)
    job.reporter.info(verify_positions(model, config).summary())
    return model


def _load_trained(job: _Job, folder: Path, method: RopeMethod) -> Any:
    config = _config_for(job, method)
    trained = load_trained(folder, job.source, config, dtype=job.dtype, device=job.device)
    job.reporter.info(verify_positions(causal_lm(trained), config).summary())
    return trained


def _load_for_training(job: _Job, config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """Where weights are shared, one process reads them into host memory and the others wait for their part."""
    in_4_bits, sharded = job.recipe.adaptation == "qlora", job.parallel.sharded
    if sharded and not job.is_main:
        return empty_model(config, job.dtype, attention, in_4_bits=in_4_bits)
    load = load_quantised if in_4_bits else load_model
    device = torch.device("cpu") if sharded else job.device
    model = load(job.source, config, dtype=job.dtype, device=device, attention=attention)
    job.reporter.info(verify_positions(model, config).summary())
    return model


def _evaluate(job: _Job, model: PreTrainedModel, arm: str, title: str) -> None:
    """Every process takes its share of the samples."""
    weights: dict[str, Any] = {"source": job.source.name, "fingerprint": job.plan.weights, "arm": arm}
    if job.origin is not None and arm == "base":
        weights |= {"source": job.origin.source.name, "fingerprint": job.origin.fingerprint}
    if arm in ("extended", "control"):
        weights["plan_id"] = job.plan.plan_id
    backend, suite, folder = Answerer(model, job.tokenizer), stored_suite(job.plan.suite), job.run.evaluation(arm)
    evaluate_arm(
        backend,
        suite,
        folder=folder,
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
    """Whether an arm has every sample, so that its model need not be loaded to find out; all processes agree."""
    return this_launch().from_main(lambda: _all_samples_stored(job, arm))


def _all_samples_stored(job: _Job, arm: str) -> bool:
    folder, suite = job.run.evaluation(arm), stored_suite(job.plan.suite)
    if not (folder / "run.json").is_file():
        return False
    identity = read_json(folder / "run.json").get("identity", {})
    if any(identity.get(key) != value for key, value in prompt_identity(suite).items()):
        return False  # samples of another suite, which opening the store will refuse by name
    stored = {sample.sample_id for sample in load_samples(folder) if sample.status == "ok"}
    wanted = resolve_samples(suite, job.plan.original_length, job.plan.target_length)
    texts_measured = len(load_perplexity(folder)) >= len(suite.perplexity or [])
    return texts_measured and all(sample.sample_id in stored for sample in wanted)


def _evaluate_base(job: _Job) -> None:
    if _evaluation_complete(job, "base"):
        job.reporter.info("finished earlier")
        return
    if job.origin is None:
        _evaluate(job, _load(job, job.base_config), "base", "base model, as it came")
        return
    model = load_model(job.origin.source, job.origin.config, dtype=job.dtype, device=job.device)
    job.reporter.info(verify_positions(model, job.origin.config).summary())
    _evaluate(job, model, "base", "base model, as it came, before all stages")


def _evaluate_untrained(job: _Job) -> None:
    if _evaluation_complete(job, "untrained"):
        job.reporter.info("finished earlier")
        return
    _evaluate(job, _load(job, _config_for(job, job.recipe.rope)), "untrained", f"{job.recipe.rope.method}, untrained")


def _provenance(job: _Job, method: RopeMethod) -> dict[str, Any]:
    resolved = method.resolved(job.plan.original_length, job.plan.target_length)
    quantised = {QUANTISATION_KEY: quantisation(job.dtype)} if job.recipe.adaptation == "qlora" else {}
    return {
        "base": {"source": job.source.name, "revision": job.source.revision, "fingerprint": job.plan.weights},
        "method": resolved.model_dump(mode="json"),
        "original_length": job.plan.original_length,
        "target_length": job.plan.target_length,
        "on_existing": job.recipe.on_existing,
        "plan_id": job.plan.plan_id,
        **({"inexact_resumes": inexact} if (inexact := inexact_records(job.run.path)) else {}),
        **quantised,
    }


def _windows(job: _Job) -> tuple[TrainingWindows, str]:
    """The windows that an arm trains on, from their beginning, and what identifies them."""
    data, target_length = job.recipe.data, job.plan.target_length
    if data.cache == STREAMED:
        streamed = StreamedWindows(data, job.tokenizer, target_length)
        facts = streamed_json(job.recipe)
        if job.is_main:
            write_json_atomic(job.run.path / "data.json", facts)
        return streamed, streamed.sha256
    if job.training_data is None:
        # The main process builds the cache; the others find it finished.
        with job.accelerator.main_process_first():
            job.training_data = prepare_training_data(
                job.recipe, job.tokenizer, job.reporter, original_length=job.plan.original_length
            )
        if job.is_main:
            write_json_atomic(job.run.path / "data.json", job.training_data.to_json())
            for note in job.training_data.notes:
                job.reporter.info(note)
    cache, selection = job.training_data.cache, job.training_data.selection
    builder = WindowBuilder(cache, data, job.tokenizer, target_length, selection)
    passes = job.plan.train_tokens / max(builder.layout.ledger.tokens_kept, 1)
    job.reporter.info(
        f"training text of {len(cache.lengths):,} documents: {builder.layout.ledger.sentence()}"
        + (f"; read {passes:.1f} times in another order each time" if passes > 1.01 else "")
    )
    return builder, fingerprint([cache.sha256, pieces_sha256(selection)], digits=64)


def _train(job: _Job, method: RopeMethod, folder: Path, adapter: Path, title: str) -> None:
    """Train one arm into `folder` and write its adapter; skipped when the adapter is complete."""
    if adapter.is_dir():
        verify_manifest(adapter)
        job.reporter.info(f"finished earlier: {adapter}")
        return
    start_trackers(
        job.accelerator, job.recipe.train.trackers, job.run.path, method.method, {"plan_id": job.plan.plan_id}
    )
    windows, data_sha256 = _windows(job)
    config = _config_for(job, method)
    monitors = make_monitors(job.recipe, config, job.device, job.dtype, job.plan.original_length)
    for reason in reasons_against_attention(job.recipe):
        job.reporter.info(f"attention entropies are not watched: {reason}")
    attention = attention_of(job.recipe, config, AttentionHost.of(job.device), job.dtype)
    in_use = {
        "dtype-in-use": str(job.dtype).removeprefix("torch."),
        "device": job.device.type,
        "attention-in-use": attention.implementation,
    }
    state = TrainState(0, job.plan.decides | in_use, data_sha256, job.accelerator.num_processes)
    model, periodic = _load_for_training(job, config, attention.implementation), _periodic(job, method, folder)
    noted = _noted(job, method)
    trainer = Trainer(
        job.accelerator, model, config, windows, job.recipe, folder, state, job.parallel, monitors, periodic, noted
    )
    with job.reporter.training(title, job.recipe.train.steps) as hooks:
        trainer.run(hooks, job.stop)
    stop_trackers(job.accelerator)
    chosen = {} if trainer.chosen is None else {CHECKPOINT: asdict(trainer.chosen)}
    with trainer.whole_model() as trained:
        if job.is_main:
            save_trained(adapter, trained, job.tokenizer, _provenance(job, method) | chosen)
    job.accelerator.wait_for_everyone()
    job.accelerator.free_memory()  # it would keep the trained model beside those of later stages


def _periodic(job: _Job, method: RopeMethod, folder: Path) -> PeriodicEvaluation | None:
    """The evaluations during the training of one arm; None where the recipe asks for none."""
    plan, settings = job.plan, job.recipe.train.evaluate
    suite = periodic_suite(job.recipe.train, plan.original_length, plan.target_length)
    if settings is None or suite is None:
        return None
    return PeriodicEvaluation(
        settings,
        suite,
        job.tokenizer,
        folder,
        original_length=plan.original_length,
        target_length=plan.target_length,
        last_step=plan.steps,
        weights={
            "source": job.source.name,
            "fingerprint": plan.weights,
            "plan_id": plan.plan_id,
            "method": method.method,
        },
        environment=environment_facts(str(job.device), str(job.dtype).removeprefix("torch.")),
    )


def _noted(job: _Job, method: RopeMethod) -> Callable[[int, Sequence[Difference]], None] | None:
    """Notes an inexact resume of an arm in the run folder; None where there must be none."""
    if not job.allow_inexact:
        return None
    arm = "control" if method.method == "none" else "extended"

    def note(step: int, found: Sequence[Difference]) -> None:
        if job.is_main:
            record_inexact(job.run.path, arm, step, found)

    return note


def _train_extended(job: _Job) -> None:
    _train(job, job.recipe.rope, job.run.path, job.run.path / job.trained_name, f"train {job.recipe.rope.method}")


def _merge(job: _Job) -> PreTrainedModel | None:
    """One process merges, and all read what it wrote; None when it was merged earlier."""
    if this_launch().from_main(job.run.merged.is_dir):
        verify_manifest(job.run.merged)
        job.reporter.info(f"merged earlier: {job.run.merged}")
        return None
    if not job.is_main:
        this_launch().wait()
        return _read_merged(job)
    trained = job.run.path / job.trained_name
    wrapped = _load_trained(job, trained, job.recipe.rope)
    provenance = _provenance(job, job.recipe.rope)
    provenance |= {key: value for key, value in read_provenance(trained).items() if key == CHECKPOINT}
    if job.origin is not None:
        # Readers of the checkpoint care for the model that it comes from, not for a folder between the stages.
        origin = {"source": job.origin.source.name, "revision": job.origin.source.revision}
        provenance |= {"base": {**origin, "fingerprint": job.origin.fingerprint}, "stages": job.origin.stages}
    model, proof = write_merged(job.run.merged, wrapped, job.tokenizer, provenance)
    job.reporter.info(proof.comparison("the trained model" if job.trained_name == WHOLE_NAME else "base + adapter"))
    job.reporter.info(proof.verification.summary())
    if job.recipe.adaptation == "qlora":
        folder, config = job.run.path / job.trained_name, _config_for(job, job.recipe.rope)
        job.reporter.info(compare_with_quantised(model, folder, job.source, config))
    this_launch().wait()
    return model


def _read_merged(job: _Job) -> PreTrainedModel:
    model = read_back(job.run.merged, job.dtype, job.device)
    job.reporter.info(verify_positions(model, exported_form(_config_for(job, job.recipe.rope))[0]).summary())
    return model


def _merge_and_evaluate(job: _Job) -> None:
    arm = "extended" if job.recipe.rope.method != "none" else "control"
    model = _merge(job)
    if model is None and _evaluation_complete(job, arm):
        return
    title = f"{job.recipe.rope.method}, trained" if arm == "extended" else "no rewrite, trained"
    _evaluate(job, _read_merged(job) if model is None else model, arm, title)


def _control_arm(job: _Job) -> None:
    method = NoRewrite(control=True)
    adapter = job.run.control / job.trained_name
    _train(job, method, job.run.control, adapter, "train the control arm")
    if _evaluation_complete(job, "control"):
        return
    merged = merged_in_memory(_load_trained(job, adapter, method))
    _evaluate(job, merged, "control", "control arm: no rewrite, same training")


def _report(job: _Job) -> None:
    if not job.is_main:
        return
    arms = arms_of_run(job.run, job.recipe.rope.method)
    write_excerpts(job.run.path / "eval", stored_suite(job.plan.suite), job.tokenizer, arms)
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
    enforce_gates(
        gates,
        arms,
        job.run.path,
        job.reporter,
        original_length=facts.original_length,
        answer_tokens=facts.answer_tokens,
    )
