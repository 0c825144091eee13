"""Evaluate one arm: a model, a suite and a folder in; stored samples out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ctxext.evaluation.engine import Answerer, evaluate_samples
from ctxext.evaluation.prompt import prompt_identity, suite_builder
from ctxext.evaluation.store import SampleResult, SampleStore
from ctxext.evaluation.suite import Sample, Suite, resolve_samples
from ctxext.files import write_json_atomic
from ctxext.rope.families import text_config


class EvaluationReporter(Protocol):
    """Shows an evaluation while it runs."""

    def evaluation(self, title: str, samples: list[Sample]) -> AbstractContextManager[Callable[[SampleResult], None]]:
        """Yields the function to call with every finished sample."""

    def info(self, text: str) -> None:
        """One line for people."""


def suite_identity(suite: Suite) -> dict[str, Any]:
    """What of a suite determines the answers. The grid does not: a wider grid reuses the samples it shares."""
    return prompt_identity(suite)


def evaluation_identity(suite: Suite, model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """What determines the answers: the suite's prompts, the weights, the positions."""
    return {
        "weights": weights,
        "rope_parameters": getattr(text_config(model.config), "rope_parameters", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        **suite_identity(suite),
    }


def evaluate_arm(
    model: Any,
    tokenizer: Any,
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
) -> list[SampleResult]:
    """Answer every sample of `suite` that is not stored in `folder` yet.

    Args:
        weights: what identifies the weights (source, plan, arm); stored samples of other weights are refused.
        facts: further facts for `run.json`.
        check_stop: called between samples; raises where a signal asked to stop.

    Raises:
        ArtefactError: the folder belongs to another evaluation.
        UsageError: a length that the haystack or the task cannot serve.
    """
    samples = resolve_samples(suite, original_length, target_length)
    builder = suite_builder(suite, tokenizer)
    store = SampleStore(folder, evaluation_identity(suite, model, weights), facts)
    with reporter.evaluation(title, samples) as on_sample:

        def finished(result: SampleResult) -> None:
            on_sample(result)
            check_stop()

        report = evaluate_samples(Answerer(model, tokenizer), builder, suite, samples, store, finished)
    if report.self_check is not None:
        write_json_atomic(folder / "engine.json", asdict(report))
        reporter.info(report.self_check.summary())
        reporter.info(f"attention kernels: {', '.join(report.kernels) or 'plain matrix products'}")
        if report.plain_reason:
            reporter.info(f"prompts that begin alike were answered one by one: {report.plain_reason}")
    wanted = {sample.sample_id for sample in samples}
    return [result for result in store.results.values() if result.sample_id in wanted]
