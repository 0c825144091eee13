"""What a report says about a training, from the lines that it wrote, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ctxext.evaluation.heatmap import Picture
from ctxext.evaluation.training_curves import Line, attention_heatmap, long_range_share, training_curves

_KNOWN = ("spikes", "attention", "throughput", "evaluation")
_GIB = 2**30


@dataclass(frozen=True)
class TrainingRecord:
    """One training's lines.

    Attributes:
        steps: of `metrics.jsonl`.
        monitors: their lines, by name.
        checkpoint: which step's weights were kept, and why; None where the last step's were, as always.
    """

    steps: Sequence[Line]
    monitors: Mapping[str, Sequence[Line]]
    checkpoint: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SpikeRow:
    """A spike and what became of it."""

    step: int
    height: float
    cause: str
    outcome: str


@dataclass(frozen=True)
class TrainingView:
    """The page's section.

    Attributes:
        facts: name and value.
        evaluations: lines of the evaluations during training.
        others: monitors that have no place of their own: name, figure, first and last value.
    """

    facts: list[tuple[str, str]]
    spikes: list[SpikeRow]
    warnings: list[str]
    evaluations: list[Line]
    others: list[tuple[str, str, str, str]]
    pictures: dict[str, Picture] = field(default_factory=dict)


def training_view(record: TrainingRecord) -> TrainingView | None:
    """Everything that the page shows; None without a step."""
    if not record.steps:
        return None
    spikes = record.monitors.get("spikes", [])
    evaluations = record.monitors.get("evaluation", [])
    pictures = {
        "training_curves": training_curves(record.steps, [s for s in spikes if s["event"] == "spike"], evaluations)
    }
    looks = [look for look in record.monitors.get("attention", []) if look["entropy_bits"]]
    if looks:
        pictures["attention_entropy"] = attention_heatmap(looks[0], looks[-1])
        share = long_range_share(looks[0], looks[-1])
        if share is not None:
            pictures["long_range_share"] = share
    return TrainingView(
        facts=[*_step_facts(record), *_machine_facts(record.monitors.get("throughput", [])), *_attention_facts(looks)],
        spikes=_spike_rows(spikes),
        warnings=_warnings(record.monitors),
        evaluations=list(evaluations),
        others=_others(record.monitors),
        pictures=pictures,
    )


def _step_facts(record: TrainingRecord) -> list[tuple[str, str]]:
    steps = record.steps
    losses = [line["loss"] for line in steps if line.get("loss") is not None]
    facts = [("steps", f"{len(steps):,}"), ("target tokens", f"{sum(line['num_tokens'] for line in steps):,}")]
    if losses:
        ends = max(1, len(losses) // 10)
        first, last = sum(losses[:ends]) / ends, sum(losses[-ends:]) / ends
        facts.append(("loss, first and last tenth", f"{first:.3f} → {last:.3f}"))
    skipped = [line["step"] for line in steps if line.get("skipped")]
    if skipped:
        facts.append(("skipped steps (not finite)", ", ".join(map(str, skipped))))
    facts.append(("tokens a second, median", f"{median(line['tokens_per_second'] for line in steps):,.0f}"))
    if record.checkpoint is not None:
        kept = record.checkpoint
        facts.append(("weights kept", f"those of step {kept['step']} of {kept['last_step']}: {kept['reason']}"))
    return facts


def _machine_facts(lines: Sequence[Line]) -> list[tuple[str, str]]:
    if not lines:
        return []
    source = next((line["speed_source"] for line in lines if "speed_source" in line), "")
    used = median(line["utilization"] for line in lines)
    facts = [("model FLOPs utilisation, median", f"{used:.1%}" + (f" of the {source}" if source else ""))]
    peaks = [line["peak_bytes"] for line in lines if line.get("peak_bytes")]
    if peaks:
        facts.append(("memory peak", f"{max(peaks) / _GIB:.2f} GiB"))
    return facts


def _attention_facts(looks: Sequence[Line]) -> list[tuple[str, str]]:
    if not looks:
        return []
    first, last = looks[0], looks[-1]
    num_heads = sum(len(heads) for heads in last["entropy_bits"])
    facts = [
        (
            "mean attention entropy, first and last look",
            f"{first['mean_entropy_bits']:.2f} → {last['mean_entropy_bits']:.2f} bits (healthy models: 2 to 4)",
        ),
        (
            f"heads of {num_heads} near 0 bits, near log2(n)",
            f"{first['num_collapsed']} → {last['num_collapsed']}, {first['num_uniform']} → {last['num_uniform']}",
        ),
    ]
    if "beyond_original_share" in first and "beyond_original_share" in last:
        shares = f"{first['beyond_original_share']:.1%} → {last['beyond_original_share']:.1%}"
        facts.append((f"attention beyond {first['beyond_original_tokens']:,} tokens", shares))
    return facts


def _spike_rows(lines: Sequence[Line]) -> list[SpikeRow]:
    ends = {line["spike_step"]: line for line in lines if line["event"] != "spike"}
    rows = []
    for line in lines:
        if line["event"] != "spike":
            continue
        end = ends.get(line["step"])
        if end is None:
            outcome, height = "not yet back at the end", line["height"]
        else:
            came_back = end["event"] == "recovered"
            outcome = f"back after {end['after_steps']} steps" if came_back else "not back within 200 steps"
            height = end["height"]
        rows.append(SpikeRow(line["step"], height, line["detail"], outcome))
    return rows


def _warnings(monitors: Mapping[str, Sequence[Line]]) -> list[str]:
    return [
        f"Step {line['step']}: {line['warning']}."
        for name, lines in monitors.items()
        for line in lines
        if "warning" in line and name != "spikes"
    ]


def _others(monitors: Mapping[str, Sequence[Line]]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, lines in monitors.items():
        if name in _KNOWN:
            continue
        keys = [key for key, value in lines[-1].items() if isinstance(value, int | float) and key != "step"]
        for key in keys:
            values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
            rows.append((name, key.replace("_", " "), f"{values[0]:.4g}", f"{values[-1]:.4g}"))
    return rows
