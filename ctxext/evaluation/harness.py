"""Other people's tasks: lm-evaluation-harness (EleutherAI/lm-evaluation-harness) run on our loaded model.

The harness gets the model object itself, so an extended RoPE is in effect whatever it would read from a config, and it
is verified first. It also gets the length that the model reaches: prompts that are longer lose their beginning there,
needle included, which the harness only logs and which is counted and said here.

Every asked task is stored when it is finished (`harness/`), so that a restart goes on behind it. `harness-results.json`
has what `lm_eval.simple_evaluate` returned; `harness-summary.json`, with intervals, is derived from it.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ctxext.errors import (
    ArtefactError,
    CtxextError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
    did_you_mean,
    first_line,
)
from ctxext.evaluation.answerer import model_identity
from ctxext.evaluation.backend import is_out_of_memory
from ctxext.evaluation.heatmap import Picture, drawing_style, render
from ctxext.evaluation.statistics import counted, mean_score
from ctxext.files import fingerprint, read_json, write_bytes_atomic, write_json_atomic
from ctxext.rope.verify import verify_positions

RESULTS_NAME = "harness-results.json"
SUMMARY_NAME = "harness-summary.json"
_INSTALL = "pip install 'ctxext[harness]'"
# RULER's tasks of the harness give this to lengths that a sample does not have.
_NOT_THIS_LENGTH = -1.0
# Normal quantile for scores without a bound, whose standard error is all the harness gives.
_TWO_SIDED_95 = 1.959964
# Parts of a result that are merged task by task; everything else is the same for all tasks of a run.
_BY_TASK = (
    *("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"),
    "task_hashes",
)


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task.

    Attributes:
        length_tokens: of tasks that score every length apart (RULER's).
        interval_95: Wilson's for scores between 0 and 1, else 1.96 standard errors of the harness; None without one.
        num_truncated: prompts that lost their beginning because the model does not reach that far.
        prompt_tokens: of the shortest and the longest prompt; RULER's tasks stay below the length in their name.
    """

    task: str
    metric: str
    length_tokens: int | None
    value: float
    interval_95: list[float] | None
    higher_is_better: bool | None
    num_samples: int
    num_truncated: int
    prompt_tokens: list[int] | None = None

    @property
    def label(self) -> str:
        """Task and metric, or task and length."""
        if self.length_tokens is not None:
            return f"{self.task}, {self.length_tokens:,} tokens"
        return f"{self.task}, {self.metric}"

    def sentence(self) -> str:
        """One line for people."""
        interval = "no interval"
        if self.interval_95 is not None:
            interval = f"95% interval {self.interval_95[0]:.3f} to {self.interval_95[1]:.3f}"
        cut = f"; {counted(self.num_truncated, 'prompt')} lost the beginning" if self.num_truncated else ""
        prompts = ""
        if self.prompt_tokens is not None:
            low, high = self.prompt_tokens
            prompts = f", prompts of {low:,}" + (f" to {high:,}" if high > low else "") + " tokens"
        return f"{self.label}: {self.value:.3f} ({interval}, {counted(self.num_samples, 'sample')}{prompts}{cut})"


@dataclass(frozen=True)
class HarnessSummary:
    """What `harness-summary.json` holds."""

    lm_eval: str
    scores: list[HarnessScore]

    def lines(self) -> list[str]:
        """For people: what ran, and a line for every score."""
        return [f"lm-evaluation-harness {self.lm_eval}:", *(f"  {score.sentence()}" for score in self.scores)]


def parse_tasks(text: str) -> list[str]:
    """Task names from `a,b`, each once.

    Raises:
        UsageError: no name at all.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError("no task is named", where="--harness", expected="TASK[,TASK...], e.g. niah_single_1,hellaswag")
    return names


def require_harness() -> str:
    """The installed version of lm-evaluation-harness.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(
            "lm-evaluation-harness is not installed", where="--harness", hint=f"Install it with: {_INSTALL}"
        ) from error


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    folder: Path,
    *,
    reach: int,
    weights: dict[str, Any],
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    batch_size: int | str = 1,
    apply_chat_template: bool = False,
    inform: Callable[[str], None] = lambda text: None,
    check_stop: Callable[[], None] = lambda: None,
) -> HarnessSummary:
    """Run tasks of lm-evaluation-harness on a loaded model; tasks that are stored in `folder` are not run again.

    Args:
        tasks: names as the harness knows them (tasks, groups, tags), or .yaml files of tasks in its format, which may
            name Python functions of their own that the harness then runs.
        reach: positions that the model has.
        weights: what identifies the weights; stored tasks of other weights or positions are run again.
        lengths: of tasks that generate their prompts (RULER's); the harness's own choice when left out.
        limit: samples a task; all when left out.
        batch_size: of the harness; more than one pads on the left, which attention for sliding windows refuses.
        check_stop: called between tasks; raises where a signal asked to stop.

    Raises:
        UsageError: the harness is not installed, an unknown task, or a length out of reach.
        ArtefactError: a task that cannot be loaded or run (most fetch their data from the hub).
        PositionsNotInEffectError: the model's rotary modules are not what its config says.
        ResourceError: out of memory.
    """
    version = require_harness()
    if too_long := [length for length in lengths or () if length > reach]:
        raise UsageError(
            "the harness would cut the beginning of longer prompts",
            where="--lengths",
            got=max(too_long),
            expected=f"at most {reach:,}, which this model reaches",
        )
    inform(_verified(model))
    names = {task: _name_of(task) for task in tasks}
    with _quieter(), tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(tokenizer, Path(scratch))
        options = {"tokenizer": scratch, **({"max_seq_lengths": list(lengths)} if lengths else {})}
        manager = _task_manager(tasks, options)
        _require_known(names.values(), manager)
        identity = fingerprint(
            {
                "weights": weights,
                **model_identity(model),
                **{"lm_eval": version, "lengths": list(lengths or ()), "limit": limit, "reach": reach},
                "apply_chat_template": apply_chat_template,
            }
        )
        runner = _runner(model, tokenizer, manager, reach, limit, batch_size, apply_chat_template)
        for task, name in names.items():
            stored = _stored_at(folder, name)
            if stored.is_file() and read_json(stored).get("identity_hash") == identity:
                inform(f"{name}: stored already")
                continue
            inform(f"{name}: asked through lm-evaluation-harness {version}")
            _store(stored, identity, runner(task, name), tokenizer, reach)
            check_stop()
    return summarise(folder, list(names.values()), version)


def _stored_at(folder: Path, name: str) -> Path:
    """Where a task's results lie."""
    return folder / "harness" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"


def summarise(folder: Path, names: Sequence[str], version: str) -> HarnessSummary:
    """Derive `harness-results.json`, the summary and the picture from the stored tasks.

    Args:
        names: of the tasks.
    """
    merged: dict[str, Any] = {}
    scores: list[HarnessScore] = []
    for name in names:
        stored = read_json(_stored_at(folder, name))
        for key, value in stored["results"].items():
            if key in _BY_TASK and isinstance(value, dict):
                merged.setdefault(key, {}).update(value)
            else:
                merged.setdefault(key, value)
        scores += [score for score in scores_of(stored) if score not in scores]
    write_json_atomic(folder / RESULTS_NAME, merged)
    summary = HarnessSummary(version, scores)
    write_json_atomic(folder / SUMMARY_NAME, asdict(summary))
    if scores:
        picture = score_picture(scores)
        write_bytes_atomic(folder / "harness.png", picture.png)
        write_bytes_atomic(folder / "harness.svg", picture.svg)
    return summary


def load_summary(folder: Path) -> HarnessSummary | None:
    """The stored summary; None where the harness did not run.

    Raises:
        ArtefactError: a file that is none.
    """
    path = folder / SUMMARY_NAME
    if not path.is_file():
        return None
    stored = read_json(path)
    try:
        return HarnessSummary(stored["lm_eval"], [HarnessScore(**score) for score in stored["scores"]])
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"not a summary of lm-evaluation-harness ({error})", where=str(path)) from error


def scores_of(stored: dict[str, Any]) -> list[HarnessScore]:
    """The scores of one stored task (or group of tasks), with intervals from its samples."""
    results = stored["results"]
    higher = results.get("higher_is_better", {})
    scores = []
    for task, samples in stored["samples"].items():
        for key, value in results["results"].get(task, {}).items():
            metric, _, selection = key.partition(",")
            if not selection or metric.endswith("_stderr") or not _is_number(value):
                continue
            length = int(metric) if metric.isdigit() else None
            absent = _NOT_THIS_LENGTH if length is not None else None
            answered = [s for s in samples if s["filter"] == selection and s["scores"].get(metric, absent) != absent]
            if length is not None and not answered:
                continue  # a length that was not asked
            scores.append(
                HarnessScore(
                    task=task,
                    metric=metric if selection == "none" else key,
                    length_tokens=length,
                    value=float(value),
                    interval_95=_interval(
                        [s["scores"].get(metric) for s in answered],
                        float(value),
                        results["results"][task].get(f"{metric}_stderr,{selection}"),
                    ),
                    higher_is_better=higher.get(task, {}).get(metric),
                    num_samples=len(answered),
                    num_truncated=sum(s["truncated"] for s in answered),
                    prompt_tokens=_ends([s["prompt_tokens"] for s in answered]),
                )
            )
    return scores


def score_picture(scores: Sequence[HarnessScore]) -> Picture:
    """Scores between 0 and 1 as points with their intervals, a line each; others are named with their value."""
    with drawing_style():
        figure = Figure(figsize=(4.9, 0.9 + 0.34 * len(scores)), layout="constrained")
        axis = figure.subplots()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#e6eaef", linewidth=0.8)
        axis.set_axisbelow(True)
        for place, score in enumerate(scores):
            if not 0 <= score.value <= 1:
                axis.text(0.5, place, f"{score.value:.3g}", ha="center", va="center", fontsize=8)
                continue
            low, high = score.interval_95 or [score.value, score.value]
            axis.plot([max(low, 0), min(high, 1)], [place, place], color="#0072b2", linewidth=1.4)
            axis.plot([score.value], [place], color="#0072b2", marker="D", markersize=5, linestyle="none")
        axis.set_xlim(-0.03, 1.03)
        axis.set_ylim(len(scores) - 0.5, -0.5)
        axis.set_yticks(range(len(scores)), [f"{score.label}\nn = {score.num_samples}" for score in scores], fontsize=7)
        axis.set_xlabel("score; lines: 95% intervals")
        axis.set_title("lm-evaluation-harness", loc="left", fontsize=11, fontweight="bold")
        return render(figure)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer for the tasks that size their prompts, which load one by its name and trust what it names.

    So nothing in the folder names code of a model repository.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        write_json_atomic(path, {key: value for key, value in read_json(path).items() if key != "auto_map"})


def _verified(model: Any) -> str:
    """What is known about the model's positions, in words; a RoPE that is not what the config says is an error."""
    try:
        return verify_positions(model, model.config).summary()
    except UnsupportedModelError as error:
        return f"positions not verified: {error}"


def _runner(
    model: Any,
    tokenizer: Any,
    manager: Any,
    reach: int,
    limit: int | None,
    batch_size: int | str,
    apply_chat_template: bool,
) -> Callable[[str, str], dict[str, Any]]:
    """Runs one task and returns what `simple_evaluate` returned."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # A copy, because the harness gives the tokenizer a padding token.
    wrapped = HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        backend="causal",
        max_length=reach,
        batch_size=batch_size,
    )

    def run(task: str, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] | None = simple_evaluate(
                wrapped,
                tasks=[name],
                limit=limit,
                batch_size=batch_size,
                task_manager=manager,
                apply_chat_template=apply_chat_template,
                confirm_run_unsafe_code=False,
            )
        except CtxextError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise ResourceError(
                    "not enough memory for the harness's batches", where=f"--harness {task}", hint="Use --batch-size 1."
                ) from error
            # A task is other people's code and data: anything can come out of it.
            raise ArtefactError(
                f"lm-evaluation-harness could not run the task ({first_line(error)})",
                where=f"--harness {task}",
                hint="Most tasks fetch their data from the hub, and some need extra packages: see the task's README.",
            ) from error
        if found is None:
            raise ArtefactError("lm-evaluation-harness returned no results", where=f"--harness {task}")
        return found

    return run


def _store(path: Path, identity: str, found: dict[str, Any], tokenizer: Any, reach: int) -> None:
    """Write one finished task: its results, and of every sample what scores and checks need, without the prompt."""
    samples = {
        task: [_sample(sample, found, task, tokenizer, reach) for sample in rows]
        for task, rows in found.get("samples", {}).items()
    }
    results = {key: value for key, value in found.items() if key != "samples"}
    write_json_atomic(path, {"identity_hash": identity, "results": _plain(results), "samples": _plain(samples)})


def _sample(sample: dict[str, Any], found: dict[str, Any], task: str, tokenizer: Any, reach: int) -> dict[str, Any]:
    requests = sample["arguments"]
    room = reach - _answer_tokens(found, task, requests)
    longest = max((len(tokenizer(str(request[0])).input_ids) for request in requests), default=0)
    return {
        "doc_id": sample["doc_id"],
        "filter": sample["filter"],
        "prompt_hash": sample["prompt_hash"],
        "prompt_tokens": longest,
        "truncated": longest > room,
        "target": sample["target"],
        "answers": sample["filtered_resps"],
        "scores": {metric: sample[metric] for metric in sample["metrics"]},
    }


def _answer_tokens(found: dict[str, Any], task: str, requests: Sequence[Any]) -> int:
    """Room that the harness keeps free behind a prompt: its answer budget, 256 where a task names none."""
    if found.get("configs", {}).get(task, {}).get("output_type") != "generate_until":
        return 0
    budgets = [request[1].get("max_gen_toks", 256) for request in requests if isinstance(request[1], dict)]
    return max(budgets, default=256)


def _interval(values: Sequence[Any], value: float, stderr: Any) -> list[float] | None:
    scores = [float(one) for one in values if _is_number(one)]
    if scores and len(scores) == len(values) and all(0 <= one <= 1 for one in scores):
        found = mean_score(scores, range(len(scores)))
        if math.isclose(found.value, value, abs_tol=1e-6):  # some metrics are more than a mean of their samples
            return [round(found.low, 6), round(found.high, 6)]
    if not _is_number(stderr):
        return None
    return [round(value - _TWO_SIDED_95 * float(stderr), 6), round(value + _TWO_SIDED_95 * float(stderr), 6)]


def _ends(values: Sequence[int]) -> list[int] | None:
    return [min(values), max(values)] if values else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """JSON values only; functions and other objects of the harness by their name, as the harness itself writes them."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy number
        return _plain(value.item())
    return getattr(value, "__name__", None) or str(value)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _name_of(task: str) -> str:
    """The name of a task; of a file, the one it gives itself.

    Raises:
        ArtefactError: no such file, or a file without a name.
    """
    if not _is_file(task):
        return task
    try:
        text = Path(task).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"could not read the task file ({error})", where=task) from error
    # Not parsed as YAML: these files name functions by a tag that only the harness knows.
    named = re.search(r"^(?:task|group|tag):[ \t]*['\"]?([^\s'\"#]+)", text, re.MULTILINE)
    if named is None:
        raise ArtefactError("the task file gives no task name", where=task, expected="a line 'task: NAME'")
    return named[1]


def _task_manager(tasks: Sequence[str], options: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if _is_file(task)]
    # Its own 13,000 tasks take seconds to index; files need them only where they group tasks by name.
    with_own = len(files) < len(tasks) or any(
        re.search("^group:", path.read_text(encoding="utf-8"), re.MULTILINE) for path in files
    )
    folders = sorted({str(path.parent) for path in files})
    return TaskManager(include_path=folders or None, include_defaults=with_own, metadata=options)


def _require_known(names: Iterable[str], manager: Any) -> None:
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            raise UsageError(
                "lm-evaluation-harness knows no such task",
                where="--harness",
                got=name,
                expected=f"one of {len(known):,} tasks and groups, or a .yaml file",
                hint=f"Did you mean '{near}'?" if near else "`lm-eval ls tasks` lists them.",
            )


@contextmanager
def _quieter() -> Iterator[None]:
    """The harness logs a page a task; errors stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
