"""Samples of models whose behaviour is known: an oracle, a blind one, one with a hole, one that is blind at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ctxext.evaluation.conclusions import Arm, ArmName
from ctxext.evaluation.store import SampleResult

Answers = Callable[[SampleResult], float]
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)


def oracle(sample: SampleResult) -> float:
    """Always right."""
    return 1.0


def blind(sample: SampleResult) -> float:
    """Always wrong."""
    return 0.0


def hole(sample: SampleResult) -> float:
    """Wrong in the middle."""
    return float(sample.depth != 0.5)


def tail_blind(sample: SampleResult) -> float:
    """Wrong in the last tenth of the positions."""
    return float(sample.needle_position < 0.9 * sample.length_tokens)


def limited(tokens: int) -> Answers:
    """Right up to a length."""
    return lambda sample: float(sample.length_tokens <= tokens)


def grid(
    answers: Answers,
    lengths: Iterable[int] = (1024, 2048, 4096),
    *,
    depths: Iterable[float] = DEPTHS,
    per_cell: int = 5,
    shared: bool = False,
    loss: float = 2.0,
    task: str = "needle",
) -> list[SampleResult]:
    """A needle grid.

    Args:
        shared: one haystack and one needle for all depths of an index, instead of one each.
    """
    samples = []
    for length in lengths:
        for depth in depths:
            for index in range(per_cell):
                place = f"{length}/{depth:.4f}/{index}"
                unasked = SampleResult(
                    sample_id=f"{task}/{place}",
                    task=task,
                    length_tokens=length,
                    depth=depth,
                    index=index,
                    status="ok",
                    needle_position=round(depth * length),
                    haystack_sha256=f"haystack {length}/{index}" if shared else f"haystack {place}",
                    prompt_sha256=f"prompt {task}/{place}",
                    key=f"key {index}" if shared else f"key {place}",
                    expected="1234567",
                    metric="number_match/1",
                    loss_blocks=[loss] * 4,
                    loss_block_tokens=length // 4,
                )
                samples.append(replace(unasked, score=answers(unasked)))
    return samples


def arm(name: ArmName, samples: list[SampleResult], *, recorded: bool = False) -> Arm:
    """An arm of these samples."""
    run = {"identity": {"weights": {"source": "tiny"}, "seed": 0, "max_new_tokens": 8}, "identity_hash": name}
    return Arm(name, f"label of {name}", recorded, samples, run)
