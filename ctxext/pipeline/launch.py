"""One command, several processes: `ctxext extend` and `ctxext train` start one for every visible GPU by themselves.

The processes are started and watched by PyTorch's elastic agent (what torchrun is made of), inside this process: when
one of them ends badly the others are ended too, so nothing waits for ever. Signals are passed on to every process once,
and then only waited for: the agent's own way gives them 30 seconds, and a step with its checkpoint may need more.
Accelerate's launcher is not used because on a CPU it silently starts one process however many are asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from ctxext.errors import ResourceError, UsageError
from ctxext.recipe.schema import Recipe

# Any of them says that a launcher has started this process (torchrun and Accelerate; Slurm is asked separately).
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_POLL_SECONDS = 0.5
_PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def join_launch(environment: MutableMapping[str, str]) -> None:
    """Recognise processes that `srun` or `mpirun` has started: the former get torch's variables, others are refused.

    Raises:
        UsageError: several processes were started and nothing says where they meet.
    """
    if any(name in environment for name in _LAUNCHED):
        return
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    others = [name for name in _OTHER_LAUNCHERS if tasks == 1 and int(environment.get(name, "1")) > 1]
    if tasks == 1 and not others:
        return
    if others or not {"MASTER_ADDR", "MASTER_PORT"} <= set(environment):
        raise UsageError(
            "several processes were started, and nothing says where they meet",
            where=others[0] if others else "SLURM_STEP_NUM_TASKS",
            got=environment[others[0]] if others else tasks,
            expected="MASTER_ADDR and MASTER_PORT (with srun), or torchrun",
            hint="With srun: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1) "
            "MASTER_PORT=29500.",
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = str(tasks)


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether this process is one that a launcher started."""
    return any(name in environment for name in _LAUNCHED)


def processes_to_start(recipe: Recipe, asked: int | None) -> int:
    """How many processes a command starts; 1 for none.

    Args:
        asked: `--num-processes`.

    Raises:
        UsageError: option, recipe and launcher disagree.
        ResourceError: more processes than devices.
    """
    said = recipe.parallel.processes
    if asked is not None and said not in ("auto", asked):
        raise UsageError(
            "--num-processes contradicts the recipe",
            where="parallel.processes",
            got=asked,
            expected=str(said),
            hint="Leave one of them out.",
        )
    wanted = asked if asked is not None else None if said == "auto" else said
    if is_launched(os.environ):
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if wanted not in (None, launched):
            raise UsageError(
                "the launcher started another number of processes than was asked for",
                where="WORLD_SIZE",
                got=launched,
                expected=str(wanted),
            )
        _require_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return 1
    if wanted is not None:
        _require_devices(wanted)
        return wanted
    return max(visible_devices(), 1)


def visible_devices() -> int:
    """CUDA (or ROCm) devices that this process may use; 0 without any."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _require_devices(processes: int) -> None:
    devices = visible_devices()
    if devices and processes > devices:
        raise ResourceError(
            "more processes than visible devices on this machine",
            where="parallel.processes",
            got=processes,
            expected=f"at most {devices}",
            hint="Over several machines, start one torchrun (or srun) on each.",
        )


def visible_recipe(recipe: Recipe) -> Recipe:
    """The recipe as this machine would run it, for a plan: `processes: auto` is its visible devices."""
    elsewhere = recipe.train.memory.device_gib is not None
    if recipe.parallel.processes != "auto" or is_launched(os.environ) or elsewhere:
        return recipe
    return with_processes(recipe, max(visible_devices(), 1))


def with_processes(recipe: Recipe, processes: int) -> Recipe:
    """The recipe with a definite number of processes."""
    parallel = recipe.parallel.model_copy(update={"processes": processes})
    return recipe.model_copy(update={"parallel": parallel})


def check_plans(recipe: Recipe) -> None:
    """Plan everything that a command would run, so that what is refused is refused before processes start.

    Raises:
        CtxextError: whatever the plan refuses.
    """
    from ctxext.pipeline.extend import planned
    from ctxext.pipeline.stages import stages_of

    for own in [stage.plannable for stage in stages_of(recipe)] if recipe.stages is not None else [recipe]:
        planned(own)


def run_in_processes(processes: int, arguments: Sequence[str]) -> int:
    """Run `ctxext ARGUMENTS` in so many processes on this machine, and return the exit code of the first that failed.

    Raises:
        ResourceError: one of the processes was killed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it reports is reported here
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=_POLL_SECONDS,
        signals_to_handle="SIGQUIT",
    )
    with _signals_passed_on():
        try:
            elastic_launch(config, sys.executable)("-m", "ctxext.cli", *arguments)
        except ChildFailedError as error:
            return _exit_code(error.failures)
    return 0


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """SIGTERM and SIGINT go to every process that was started, and this one goes on waiting for them."""
    import psutil  # type: ignore[import-untyped]

    me = psutil.Process()

    def pass_on(number: int, frame: Any) -> None:
        for child in me.children():
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(failures: Mapping[int, Any]) -> int:
    """Of the process that failed first; the agent ends the others, by SIGTERM and half a minute later by SIGKILL.

    Raises:
        ResourceError: it was killed from outside.
    """

    def order(item: tuple[int, Any]) -> tuple[int, int]:
        code = item[1].exitcode
        return item[1].timestamp, 0 if code < 0 and code != -signal.SIGTERM else 1 if code > 0 else 2

    rank, first = min(failures.items(), key=order)
    if first.exitcode > 0:
        return int(first.exitcode)
    raise ResourceError(
        f"process {rank} was killed ({signal.Signals(-first.exitcode).name}), and the others were ended with it",
        where=f"process {rank}",
        hint="Often the machine's memory ran out. The same command goes on from the last checkpoint.",
    )
