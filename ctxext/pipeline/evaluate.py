"""`ctxext eval`: one model, one suite, one folder of samples and pictures."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ctxext.errors import UnsupportedModelError, UsageError
from ctxext.evaluation.conclusions import Arm
from ctxext.evaluation.report import ReportFacts, write_report
from ctxext.evaluation.run import evaluate_arm
from ctxext.evaluation.store import load_samples
from ctxext.evaluation.suite import Suite, load_suite, resolve_samples
from ctxext.evaluation.tables import score_of
from ctxext.files import read_json, write_json_atomic
from ctxext.model.load import (
    ModelSource,
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    resolve_source,
    short_name,
    weights_fingerprint,
)
from ctxext.model.windowed import attention_for
from ctxext.pipeline.reporter import Reporter
from ctxext.pipeline.run_folder import environment_facts
from ctxext.rope.families import length_before_scaling, text_config
from ctxext.rope.verify import verify_positions
from ctxext.train.adapter import PROVENANCE_NAME, read_provenance
from ctxext.train.signals import StopRequest

FACTS_NAME = "evaluation.json"


def evaluate_model(
    name: str,
    *,
    suite: str,
    output: str | None,
    revision: str | None,
    dtype: str,
    reporter: Reporter,
    beyond_reach: bool = False,
) -> Path:
    """Evaluate a model as it is and return the page.

    Args:
        beyond_reach: also ask prompts longer than the model reaches, to see it fail there.

    Raises:
        CtxextError: model or suite missing, a length out of reach of the haystack, an output folder of something else.
    """
    device = choose_device()
    chosen_dtype = choose_dtype(dtype, device)
    asked = load_suite(suite)
    source = resolve_source(name, revision)
    config = load_config(source)
    text = text_config(config)
    original, reach = _lengths(source, text)
    if not beyond_reach:
        _require_reach(asked, original, reach, source.name)
    stem = short_name(source.name)
    folder = Path(output) if output else Path("runs") / f"eval-{stem}-{Path(suite).stem}"
    attention = attention_for(config, device)
    model = load_model(source, config, dtype=chosen_dtype, device=device, attention=attention)
    try:
        reporter.info(verify_positions(model, config).summary())
    except UnsupportedModelError as error:  # evaluating needs no RoPE; a RoPE that differs from its config is an error
        reporter.info(f"positions not verified: {error}")
    environment = environment_facts(str(device), str(model.dtype).removeprefix("torch."))
    with StopRequest() as stop:
        evaluate_arm(
            model,
            load_tokenizer(source),
            asked,
            folder=folder,
            title=source.name,
            original_length=original,
            target_length=reach,
            weights={"source": source.name, "fingerprint": weights_fingerprint(source, config)},
            facts={"arm": "base", "environment": environment},
            reporter=reporter,
            check_stop=lambda: stop.check("finished samples are saved"),
        )
    facts = ReportFacts(
        title=f"{stem}: retrieval by position",
        model=source.name,
        method="as it is",
        original_length=original,
        target_length=reach,
        windows="none (nothing was trained)",
        suite={"name": suite, **asked.model_dump(mode="json")},
        plan_id="-",
        environment=environment,
    )
    write_json_atomic(folder / FACTS_NAME, asdict(facts))
    return report_evaluation(folder, reporter)


def report_evaluation(folder: Path, reporter: Reporter) -> Path:
    """Draw everything again and return the page; for several tasks, which have a page each, their folder.

    Raises:
        ArtefactError: no such folder.
    """
    facts, (arm,) = gather_evaluation(folder)
    tasks = sorted({sample.task for sample in arm.samples})
    if len(tasks) == 1:
        return write_report(folder / "report", facts, [arm])
    for task in tasks:
        samples = [sample for sample in arm.samples if sample.task == task]
        lengths = sorted({sample.length_tokens for sample in samples})
        scores = [(length, score_of(s for s in samples if s.length_tokens == length)) for length in lengths]
        text = ", ".join(f"{score.text()} at {length:,}" for length, score in scores if score is not None)
        reporter.info(f"{task}: {text or 'no scored sample'}")
        title = f"{facts.title}: {task}"
        write_report(folder / "report" / task, replace(facts, title=title), [replace(arm, samples=samples)])
    return folder / "report"


def gather_evaluation(folder: Path) -> tuple[ReportFacts, list[Arm]]:
    """What a report shows, from a folder that `evaluate_model` has finished.

    Raises:
        ArtefactError: no such folder.
    """
    facts = ReportFacts(**read_json(folder / FACTS_NAME))
    suite = Suite.model_validate({key: value for key, value in facts.suite.items() if key != "name"})
    wanted = {sample.sample_id for sample in resolve_samples(suite, facts.original_length, facts.target_length)}
    samples = [sample for sample in load_samples(folder) if sample.sample_id in wanted]
    label = short_name(facts.model)
    return facts, [Arm("base", label, recorded=False, samples=samples, run=read_json(folder / "run.json"))]


def _require_reach(suite: Suite, original_length: int, reach: int, model: str) -> None:
    """Refuse prompts that end, with their answers, beyond the positions that the model has.

    Raises:
        UsageError: the longest one does.
    """
    longest = max(sample.cell.length_tokens for sample in resolve_samples(suite, original_length, reach))
    if longest + suite.num_answer_tokens > reach:
        raise UsageError(
            f"the suite's longest prompt and its answer take {longest + suite.num_answer_tokens:,} positions "
            f"({longest:,} + {suite.num_answer_tokens})",
            where=model,
            expected=f"at most {reach:,}, which this model reaches",
            hint="Use shorter lengths, extend the model, or give --beyond-reach to see it fail there.",
        )


def _lengths(source: ModelSource, text: Any) -> tuple[int, int]:
    """The length before extension and the positions that the model reaches.

    From ctxext.json where there is one (dynamic scaling and portable checkpoints hide one of them), else the config.
    """
    folder = Path(source.location)
    if (folder / PROVENANCE_NAME).is_file():
        provenance = read_provenance(folder)
        return int(provenance["original_length"]), int(provenance["target_length"])
    reach = int(text.max_position_embeddings)
    return (length_before_scaling(text) if getattr(text, "rope_parameters", None) else reach), reach
