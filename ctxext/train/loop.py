"""The training loop on Accelerate: resumable to the bit on the same machine, refusing to train unscaled positions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch import nn
from transformers import PreTrainedConfig

from ctxext.data.order import Cursor
from ctxext.data.packing import PackedWindow
from ctxext.data.windows import TrainingWindows
from ctxext.errors import ArtefactError, ResourceError
from ctxext.evaluation.sharding import require_all_processes, this_launch
from ctxext.files import write_json_atomic
from ctxext.model.adaptation import TrainedPart, adapt, trained_parts
from ctxext.model.compiled import compile_layers
from ctxext.model.host_memory import freed_memory_kept
from ctxext.model.liger import prove_liger
from ctxext.model.lora import num_trainable
from ctxext.model.loss import DecoderHead
from ctxext.model.loss_proof import prove_loss
from ctxext.model.parts import causal_lm
from ctxext.model.quantised import num_parameters
from ctxext.model.router_jitter import add_router_jitter
from ctxext.model.savings import apply_savings, savings_of
from ctxext.model.trained import set_trained_tensors
from ctxext.model.whole import compute_dtype
from ctxext.planning.parallel_plan import ParallelPlan
from ctxext.recipe.effects import Difference
from ctxext.recipe.schema import Recipe
from ctxext.rope.verify import RopeVerification, verify_positions
from ctxext.train.adapter import adapter_tensors
from ctxext.train.checkpoint import (
    Checkpoint,
    TrainState,
    checkpoint_path,
    newest_checkpoint,
    optimizer_tensors,
    read_checkpoint,
    save_checkpoint,
    set_optimizer_tensors,
)
from ctxext.train.inexact import is_fixed, other_run
from ctxext.train.kernels import proven_kernels
from ctxext.train.metrics import EVALUATION, MetricsFile, StepMetrics
from ctxext.train.monitors import Monitor, StepEvent, WatchesModel
from ctxext.train.non_finite import NonFinitePolicy
from ctxext.train.optimizer import make_optimizer
from ctxext.train.parallel import Together, ddp_arguments
from ctxext.train.periodic import Chosen, PeriodicEvaluation
from ctxext.train.probe import PROBE_NAME, Probe
from ctxext.train.random_state import nothing_drawn, random_states, seed_process, set_random_state
from ctxext.train.schedule import learning_rate_at
from ctxext.train.sequence import share_windows
from ctxext.train.signals import StopRequest
from ctxext.train.step import StepResult, SummedLoss, run_step
from ctxext.train.trackers import require_trackers
from ctxext.train.worst_case import Prepared, try_worst_case


@dataclass(frozen=True)
class TrainStart:
    """What is known when the loop starts; for the console and `environment.json`."""

    num_trainable: int
    num_parameters: int
    trained: list[TrainedPart]
    verification: RopeVerification
    kernels: list[str]
    steps: int
    resumed_step: int
    messages: list[str]
    probe: Probe | None


@dataclass(frozen=True)
class TrainHooks:
    """Where progress goes."""

    on_start: Callable[[TrainStart], None]
    on_step: Callable[[StepMetrics], None]
    on_note: Callable[[str], None] = lambda text: None


def make_accelerator(dtype: torch.dtype, device: torch.device, trackers: list[str], folder: Path) -> Accelerator:
    """The Accelerator of a run.

    Raises:
        ResourceError: a launcher asked for several processes and Accelerate runs as one; a tracker is not there.
    """
    require_all_processes()
    require_trackers(trackers)
    # Accelerate keeps one precision for the life of a process and refuses another; a notebook trains more than once.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        # While one process evaluates, the others wait for the next stage; the default of ten minutes would kill them.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
            DistributedDataParallelKwargs(**ddp_arguments()),
        ],
        project_config=ProjectConfiguration(project_dir=str(folder)),
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise ResourceError(
            "the launcher asked for several processes, but Accelerate runs as one",
            where="WORLD_SIZE",
            got=accelerator.num_processes,
            expected=f"{asked} processes",
            hint="On CPU, start with torchrun; accelerate launch --cpu runs one process.",
        )
    return accelerator


class Trainer:
    """Trains an extended model as a recipe says.

    Args:
        model: the base, loaded with `config`; where weights are shared, on the CPU in the main process and without
            weights in the others.
        parallel: how the processes share the work.
        config: the extended config that must be in effect.
        folder: of this arm; gets `metrics.jsonl` and `checkpoints/`.
        state: plan, data and processes of this run; its step is ignored.
        monitors: what watches the training.
        periodic: evaluates every so many steps, and says which step's weights to end with.
        on_inexact: told of a resume with other settings; without it there is none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        config: PreTrainedConfig,
        windows: TrainingWindows,
        recipe: Recipe,
        folder: Path,
        state: TrainState,
        parallel: ParallelPlan,
        monitors: Sequence[Monitor] = (),
        periodic: PeriodicEvaluation | None = None,
        on_inexact: Callable[[int, Sequence[Difference]], None] | None = None,
    ) -> None:
        settings = recipe.train
        self._accelerator = accelerator
        self._settings = settings
        self._windows = windows
        self._monitors = monitors
        self._periodic = periodic
        self.chosen: Chosen | None = None
        self._folder = folder
        self._metrics = MetricsFile(folder)
        self._recipe, self._config = recipe, config
        self._identity = state
        self._on_inexact = on_inexact
        self._non_finite = NonFinitePolicy(settings.non_finite)
        self._together = Together(accelerator, parallel)
        if not parallel.sharded:
            verify_positions(model, config)
        prove_loss(model)
        self._adapted = adapt(model, recipe.adaptation, recipe.lora, settings.seed)
        self._adapted.train()
        if settings.loss == "liger":
            prove_liger(DecoderHead(causal_lm(self._adapted)))
        self._loss = SummedLoss(self._adapted, settings.router_loss, with_liger=settings.loss == "liger")
        self._together.shard(self._loss, causal_lm(self._adapted).get_decoder())
        apply_savings(self._adapted, savings_of(settings, windows.length))
        if settings.compile:
            compile_layers(self._adapted)
        optimizer = make_optimizer(self._adapted, settings)
        self._model, self._optimizer = self._together.prepare(self._loss, optimizer)
        # Wrappers and casts of prepare() have rounded frequencies before: look again.
        self._verification = verify_positions(accelerator.unwrap_model(self._model), config)
        self._kernels = proven_kernels(accelerator, self._model, self._optimizer, recipe, config)
        if parallel.sequence > 1:
            share_windows(self._loss, causal_lm(self._adapted), parallel, accelerator.device)
        if settings.router_jitter:
            add_router_jitter(self._adapted, settings.router_jitter)
        for monitor in monitors:
            if isinstance(monitor, WatchesModel):
                monitor.watch(self._adapted)

    @contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """The trained model, with its adapter if it has one, to be saved; all processes enter and leave together."""
        with self._together.whole(self._loss):
            yield self._adapted

    def run(self, hooks: TrainHooks, stop: StopRequest) -> None:
        """Train from the newest checkpoint (or from the start) to the last step.

        Raises:
            InterruptedRunError: a signal came to any process, or time is up; the last finished step is on disk.
            DivergedError: a loss or gradient that is not finite, as `train.non_finite` says.
        """
        with freed_memory_kept(self._accelerator.device):
            self._run(hooks, stop)

    def _run(self, hooks: TrainHooks, stop: StopRequest) -> None:
        first, messages = self._resume()
        probe = self._probe()
        hooks.on_start(
            TrainStart(
                num_trainable=num_trainable(self._adapted),
                num_parameters=num_parameters(self._adapted),
                trained=trained_parts(self._adapted, self._settings.moment_bytes),
                verification=self._verification,
                kernels=self._kernels,
                steps=self._settings.steps,
                resumed_step=first,
                messages=messages,
                probe=probe,
            )
        )
        every = self._settings.checkpoint_every or max(self._settings.steps // 10, 1)
        done = first
        while not self._evaluated_enough(done, hooks, stop) and done < self._settings.steps:
            with self._together.while_all_live():
                event = self._one_step(done, hooks)
                self._tell(event, hooks)
                done += 1
                stopping = stop.agree(this_launch())
                due = self._periodic is not None and self._periodic.due(done)
                if done % every == 0 or done == self._settings.steps or stopping or due:
                    self._save(done)
            if stopping and done < self._settings.steps:
                stop.check(f"step {done} of {self._settings.steps} is saved")
        self._take_best(done, hooks)

    def _evaluated_enough(self, step: int, hooks: TrainHooks, stop: StopRequest) -> bool:
        """Evaluate after `step` where that is due; whether training ends there. The checkpoint of it is on disk."""
        periodic = self._periodic
        if periodic is None or not periodic.due(step):
            return False
        line = periodic.evaluate(
            causal_lm(self._adapted),
            step,
            precision=self._accelerator.autocast(),
            check_stop=lambda: stop.check(f"step {step} and finished samples of its evaluation are saved"),
        )
        self._tell_line(EVALUATION, step, line)
        hooks.on_note(f"step {step}: {line['text']}")
        return periodic.finished

    def _take_best(self, last_step: int, hooks: TrainHooks) -> None:
        """End with the weights of the best step."""
        if self._periodic is None:
            return
        chosen = self._periodic.chosen(last_step)
        path = checkpoint_path(self._folder / "checkpoints", chosen.step)
        try:
            if chosen.step != last_step:
                set_trained_tensors(self._adapted, read_checkpoint(path).adapter, str(path))
        except ArtefactError as error:
            why = f"step {chosen.step} was better ({chosen.reason}), but its checkpoint is damaged: {error}"
            chosen = Chosen(last_step, last_step, why)
        self.chosen = chosen
        hooks.on_note(f"the weights of step {chosen.step} of {last_step} are kept: {chosen.reason}")

    def _tell(self, event: StepEvent, hooks: TrainHooks) -> None:
        metrics, is_main = event.metrics, self._accelerator.is_main_process
        if is_main:
            self._metrics.add_step(metrics)
        numbers = {key: value for key, value in metrics.to_json().items() if isinstance(value, int | float)}
        self._accelerator.log({k: v for k, v in numbers.items() if k not in ("step", "steps")}, step=metrics.step)
        hooks.on_step(metrics)
        for monitor in self._monitors:
            for line in monitor.after_step(event):
                self._tell_line(monitor.name, metrics.step, line)
                if "warning" in line:
                    hooks.on_note(f"step {metrics.step}: {line['warning']}")

    def _tell_line(self, name: str, step: int, line: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            self._metrics.add_monitor(name, step, line)
        numbers = {f"{name}/{key}": value for key, value in line.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=step)

    def _one_step(self, step: int, hooks: TrainHooks) -> StepEvent:
        settings = self._settings
        rate = learning_rate_at(step, settings.steps, settings.learning_rate, settings.warmup, settings.decay)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        started = time.perf_counter()
        cursor = Cursor(settings.seed, step * settings.windows_per_step)
        windows = self._windows.step_windows(cursor, settings.windows_per_step, self._together.share)
        for monitor in self._monitors:
            monitor.before_step(step + 1, windows)
        try:
            result = self._run_step(self._optimizer, windows)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory in training step {step + 1}",
                where="train",
                got=f"{settings.windows_per_device} x {self._windows.length} tokens in one pass",
                hint="Use train.windows_per_device=1, train.activation_checkpointing=true, train.memory.offload "
                "or skip-wise windows; `ctxext plan` says what each saves.",
            ) from error
        note = self._non_finite.judge(result, step + 1)
        if note is not None:
            hooks.on_note(note)
        seconds = time.perf_counter() - started
        metrics = StepMetrics(
            step=step + 1,
            steps=settings.steps,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            num_tokens=result.num_tokens,
            tokens_per_second=result.num_tokens / seconds,
            seconds=seconds,
            auxiliary_loss=result.auxiliary_loss,
            skipped=result.skipped,
        )
        return StepEvent(metrics, windows, self._adapted)

    def _run_step(self, optimizer: Any, windows: list[PackedWindow]) -> StepResult:
        return run_step(
            self._accelerator,
            self._model,
            optimizer,
            windows,
            self._settings.windows_per_device,
            self._settings.max_grad_norm,
            self._together.plan.sequence,
        )

    def _probe(self) -> Probe | None:
        if not self._settings.probe:
            return None
        prepared = Prepared(
            accelerator=self._accelerator,
            run=self._run_step,
            model=self._model,
            adapted=self._adapted,
            optimizer=self._optimizer,
            config=self._config,
            dtype=compute_dtype(self._adapted),
            parallel=self._together.plan,
        )
        probe = try_worst_case(prepared, self._recipe)
        if self._accelerator.is_main_process:
            write_json_atomic(self._folder / PROBE_NAME, probe.to_json())
        return probe

    def _resume(self) -> tuple[int, list[str]]:
        checkpoint, messages = newest_checkpoint(self._folder / "checkpoints")
        if checkpoint is None:
            self._keep_metrics_up_to(0)
            seed_process(self._accelerator, self._settings.seed)
            return 0, messages
        messages += self._check_same_run(checkpoint)
        set_trained_tensors(self._adapted, checkpoint.adapter, str(checkpoint.folder))
        set_optimizer_tensors(self._optimizer.optimizer, checkpoint.optimizer)
        if checkpoint.state.num_processes == self._identity.num_processes:
            set_random_state(self._accelerator, checkpoint.random_states)
        else:
            seed_process(self._accelerator, self._settings.seed)
        self._non_finite.in_a_row = checkpoint.state.skipped_in_a_row
        self._windows.restore(checkpoint.stream_state, checkpoint.state.step * self._settings.windows_per_step)
        for monitor in self._monitors:
            if monitor.name in checkpoint.monitors:
                monitor.restore(checkpoint.monitors[monitor.name])
        if self._periodic is not None:
            self._periodic.restore(checkpoint.state.step)
        self._keep_metrics_up_to(checkpoint.state.step)
        messages.append(f"resumed at step {checkpoint.state.step} of {self._settings.steps}")
        return checkpoint.state.step, messages

    def _check_same_run(self, checkpoint: Checkpoint) -> list[str]:
        """Refuse what is not the same training, or note it where that is allowed; what people should know."""
        stored, new = checkpoint.state, self._identity
        random_drawn = not nothing_drawn(checkpoint.random_states, self._settings.seed)
        found = stored.differences(new, random_drawn=random_drawn)
        if found:
            if self._on_inexact is None or is_fixed(found):
                raise other_run(checkpoint.folder, found)
            self._on_inexact(stored.step, found)
            return [f"inexact from step {stored.step} on: {', '.join(d.words() for d in found)}"]
        if stored.num_processes != new.num_processes:
            return [
                f"{new.num_processes} instead of {stored.num_processes} processes: no random numbers are drawn, so the "
                "training is the same but for the last bits of sums"
            ]
        return []

    def _keep_metrics_up_to(self, step: int) -> None:
        if self._accelerator.is_main_process:
            self._metrics.keep_up_to(step)

    def _save(self, step: int) -> None:
        states = random_states(self._accelerator)
        moments = optimizer_tensors(self._optimizer.optimizer)
        with self.whole_model() as model:
            adapter = adapter_tensors(model)
        if self._accelerator.is_main_process:
            save_checkpoint(
                self._folder / "checkpoints",
                replace(self._identity, step=step, skipped_in_a_row=self._non_finite.in_a_row),
                adapter,
                moments,
                states,
                self._settings.keep_checkpoints,
                self._windows.stream_state(),
                {monitor.name: monitor.state() for monitor in self._monitors},
                self._periodic.best.step if self._periodic is not None and self._periodic.best is not None else None,
            )
        self._accelerator.wait_for_everyone()
