"""`ctxext eval MODEL --harness TASK`: tasks of lm-evaluation-harness on a model that this process has verified."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctxext.errors import UsageError
from ctxext.evaluation.harness import evaluate_harness, parse_tasks, require_harness
from ctxext.evaluation.selection import parse_lengths
from ctxext.model.load import choose_device, choose_dtype, load_model, load_tokenizer, short_name
from ctxext.pipeline.arms import ArmSpec, open_arm
from ctxext.pipeline.reporter import Reporter
from ctxext.train.signals import StopRequest


def evaluate_with_harness(
    name: str,
    *,
    tasks: str,
    output: str | None,
    revision: str | None,
    dtype: str,
    lengths: str | None,
    limit: int | None,
    batch_size: str,
    apply_chat_template: bool,
    reporter: Reporter,
) -> Path:
    """Run tasks of lm-evaluation-harness on a model and return the folder of the results.

    Args:
        lengths: prompt tokens for tasks that ask for them.
        batch_size: a number; `auto` is one prompt at a time.

    Raises:
        CtxextError: the harness is not installed, no such task, a model that cannot be loaded.
    """
    names = parse_tasks(tasks)
    require_harness()  # before minutes of loading
    device = choose_device()
    arm = open_arm(ArmSpec("base"), model=name, revision=revision)
    if arm.adapter is not None:
        raise UsageError("the harness takes whole checkpoints", where=name, hint="Merge first: ctxext merge.")
    folder = Path(output) if output else Path("runs") / f"harness-{short_name(arm.source.name)}"
    # The harness pads its batches, which the attention for sliding windows refuses.
    model = load_model(arm.source, arm.config, dtype=choose_dtype(dtype, device), device=device)
    with StopRequest() as stop:
        summary = evaluate_harness(
            model,
            load_tokenizer(arm.source),
            names,
            folder,
            reach=arm.reach,
            weights=arm.identity(),
            lengths=_tokens(lengths),
            limit=limit,
            batch_size=1 if batch_size == "auto" else batch_size,
            apply_chat_template=apply_chat_template,
            inform=reporter.info,
            check_stop=lambda: stop.check("finished tasks are saved"),
        )
    for line in summary.lines():
        reporter.info(line)
    return folder


def _tokens(lengths: str | None) -> Sequence[int] | None:
    if lengths is None:
        return None
    found = parse_lengths(lengths)
    tokens = [length for length in found if isinstance(length, int)]
    if len(tokens) < len(found):
        raise UsageError("the harness takes lengths in tokens", where="--lengths", got=lengths)
    return tokens
