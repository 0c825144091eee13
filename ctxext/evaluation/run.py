"""Evaluate one arm: a backend, a suite and a folder in; stored samples out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from ctxext.evaluation.backend import Backend, Work
from ctxext.evaluation.engine import Builder, EngineReport, evaluate_samples
from ctxext.evaluation.perplexity import measure_perplexity
from ctxext.evaluation.prompt import prompt_identity, suite_builder
from ctxext.evaluation.results import write_results
from ctxext.evaluation.sharding import Processes, this_launch
from ctxext.evaluation.store import SampleResult, SampleStore, load_samples
from ctxext.evaluation.suite import Sample, Suite, resolve_samples
from ctxext.files import write_json_atomic


class EvaluationReporter(Protocol):
    """Shows an evaluation while it runs."""

    def evaluation(self, title: str, samples: list[Sample]) -> AbstractContextManager[Callable[[SampleResult], None]]:
        """Yields the function to call with every finished sample."""

    def info(self, text: str) -> None:
        """One line for people."""


def evaluation_identity(suite: Suite, backend: Backend, weights: dict[str, Any]) -> dict[str, Any]:
    """What determines the answers: the suite's prompts, the weights, the positions."""
    return {"weights": weights, **backend.identity(), **prompt_identity(suite)}


def evaluate_arm(
    backend: Backend,
    suite: Suite,
    *,
    folder: Path,
    title: str,
    original_length: int,
    target_length: int,
    weights: dict[str, Any],
    facts: dict[str, Any],
    reporter: EvaluationReporter,
    check_stop: Callable[[], None],
    samples: list[Sample] | None = None,
) -> list[SampleResult]:
    """Answer every sample of `suite` that is not stored in `folder` yet, then measure the perplexity it asks for.

    Args:
        samples: those to answer, when they are not all of the suite's.
        weights: what identifies the weights (source, plan, arm); stored samples of other weights are refused.
        facts: further facts for `run.json`.
        check_stop: called between samples; raises where a signal asked to stop.

    Raises:
        ArtefactError: the folder belongs to another evaluation.
        UsageError: a length that the haystack or the task cannot serve.
    """
    grid = {"suite": suite.model_dump(mode="json"), "original_length": original_length, "target_length": target_length}
    results = evaluate_prompts(
        backend,
        suite_builder(suite, backend.tokenizer),
        resolve_samples(suite, original_length, target_length) if samples is None else samples,
        suite,
        folder=folder,
        title=title,
        identity=evaluation_identity(suite, backend, weights),
        facts={**facts, **grid},
        reporter=reporter,
        check_stop=check_stop,
    )
    if suite.perplexity and this_launch().is_main:
        for text in measure_perplexity(
            backend,
            suite,
            folder,
            original_length=original_length,
            target_length=target_length,
            weights=weights,
            check_stop=check_stop,
        ):
            reporter.info(f"{title}: {text.sentence()}")
    return results


def evaluate_prompts(
    backend: Backend,
    builder: Builder,
    samples: list[Sample],
    suite: Suite,
    *,
    folder: Path,
    title: str,
    identity: dict[str, Any],
    facts: dict[str, Any],
    reporter: EvaluationReporter,
    check_stop: Callable[[], None],
) -> list[SampleResult]:
    """Answer every sample that is not stored in `folder` yet, in all processes that were launched; only one tells.

    Args:
        builder: makes the prompts of `samples`.
        suite: says whether losses are measured.
        identity: what determines the answers; stored samples of something else are refused.
        facts: further facts for `run.json`.

    Returns:
        The results of `samples` in every process, those of the others included.

    Raises:
        ArtefactError: the folder belongs to another evaluation.
        ResourceError: another process ended before its share was done.
    """
    processes = this_launch()
    samples = processes.from_main(lambda: samples)  # a choice by measured time differs from process to process
    store = _open_store(folder, identity, facts, processes)
    showing = reporter.evaluation(title, samples) if processes.is_main else nullcontext(_tell_nobody)
    with showing as on_sample:
        told: set[str] = set()

        def tell(results: Iterable[SampleResult]) -> None:
            for result in results:
                if result.sample_id not in told:
                    told.add(result.sample_id)
                    on_sample(result)

        def look() -> None:
            if processes.is_main:
                tell(store.news())
            check_stop()

        def finished(result: SampleResult) -> None:
            tell([result])
            look()

        report = evaluate_samples(backend, builder, suite, samples, store, finished, processes)
        processes.wait(look)
        if processes.is_main and processes.count > 1:
            store.gather()
            write_results(folder)
            tell(store.results[sample.sample_id] for sample in samples)
    reports = processes.gathered(report)  # behind this all samples are in one place
    if processes.is_main:
        _tell_report(_joined(reports), folder, reporter)
    stored = store.results if processes.is_main else {result.sample_id: result for result in load_samples(folder)}
    wanted = {sample.sample_id for sample in samples}
    return [result for result in stored.values() if result.sample_id in wanted]


def _open_store(folder: Path, identity: dict[str, Any], facts: dict[str, Any], processes: Processes) -> SampleStore:
    """The main process makes the folder and takes over what others left; all begin with the same samples."""
    if not processes.is_main:
        processes.wait()
    store = SampleStore(folder, identity, facts, processes.index)
    if processes.is_main:
        store.gather()
        processes.wait()
    processes.wait()
    return store


def _joined(reports: Sequence[EngineReport]) -> EngineReport:
    """One report of all processes: their work added up, the rest from the first that did any."""
    works = [asdict(report.work) for report in reports]
    work = Work(**{key: sum(each[key] for each in works) for key in works[0]})
    working = [report for report in reports if report.self_check is not None]
    return replace((working or list(reports))[0], work=work, num_processes=max(len(working), 1))


def _tell_report(report: EngineReport, folder: Path, reporter: EvaluationReporter) -> None:
    if report.self_check is None:
        return
    write_json_atomic(folder / "engine.json", asdict(report))
    reporter.info(report.self_check.summary())
    reporter.info(f"attention kernels: {', '.join(report.kernels) or 'plain matrix products'}")
    if report.plain_reason:
        reporter.info(f"prompts that begin alike were answered apart: {report.plain_reason}")


def _tell_nobody(result: SampleResult) -> None:
    """Processes other than the main one show nothing."""
