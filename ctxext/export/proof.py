"""Proof that a merged checkpoint is base + adapter with the positions its config says.

By samples, always after a streamed merge: rows of every merged tensor against float64 arithmetic, bytes of every other
tensor against the base, and the rotary modules built alone from the config that was written. By logits, where the model
fits into memory: the checkpoint is read back as any stock program would, and compared with base + adapter on positions
up to the target length, because a merge that lost its RoPE looks right at short ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ctxext.data import words
from ctxext.data.boundaries import encode_plain
from ctxext.errors import ArtefactError
from ctxext.export.stored import StoredWeights, TensorInfo, checkpoint_tensors, open_source, read_range, read_tensor
from ctxext.model.expert_choices import Choice, ChoiceDifference, choices_recorded, compare_choices
from ctxext.model.load import quiet
from ctxext.rope.verify import RopeVerification, verify_positions

# Largest logit differences allowed, relative to the largest logit. Measured on SmolLM2-135M with a trained adapter, on
# text at positions up to 16,384. Lost or doubled RoPE scaling shows 0.006 to 0.13.
#
# Computed in float32, base + adapter against weights that were rounded once to this dtype: 3e-6, 7e-4, 6e-3 (with an
# adapter of noise 7e-6, 3.5e-3, 6e-3).
ROUNDED_WEIGHTS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}
# Computed in this dtype, merged against unmerged: 3e-6, 3e-3, 2e-2 (noise: 7e-6, 1.3e-2, 4.4e-2). In half precision
# this says little, so what is read back is also compared with the merged model in memory, which has the same weights.
COMPUTED = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 1e-1}
SAME_WEIGHTS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
# The same limits times this hold for the scores by which tokens are sent to experts, relative to the largest score:
# most are a softmax, which turns an absolute error of its logits into a relative one. Measured on tiny random models of
# ten classes, rounded once to bfloat16: 3e-3 to 1e-2, their logits 5e-3 to 2e-2.
SCORES_FACTOR = 4.0
# The model in float32, one mapped file of its weights, and what a forward pass needs.
MEMORY_FACTOR = 1.5
_PROBE_TOKENS = 48
# Text, not arbitrary ids: on noise the trained model amplifies float32 rounding to 4e-3, which would hide real faults.
_PROBE_TEXT = (
    "A ship that leaves the harbour at dawn carries more than its cargo: it carries the names of all who loaded it. "
    "The clerk writes them down twice, once for the owner and once for the sea, and nobody has ever asked him why."
)
_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ""),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
_SAMPLED_ROWS = 8
_SAMPLED_BYTES = 1 << 16
# Rounding of a float32 sum of `rank` products, relative to the largest number in the block.
_SUM_ROUNDING = 4e-6


@dataclass(frozen=True)
class MergeProof:
    """What comparing the merged checkpoint with base + adapter showed.

    Attributes:
        folder: of the merged checkpoint.
        largest_logit_difference: between base + adapter and what was read back; None when no logits were compared.
        verification: of the positions that the written config gives.
        choices: of experts, which were the same while logits were compared; None in dense models.
        way: how it was merged, and why not otherwise.
        num_merged_tensors, num_other_tensors: compared by samples; 0 after a merge in memory.
        quantised: how far it is from what was trained, where the base was quantised for training.
        warnings: what else a user must know.
    """

    folder: Path
    largest_logit_difference: float | None
    verification: RopeVerification
    choices: ChoiceDifference | None = None
    way: str = "merged in memory"
    num_merged_tensors: int = 0
    num_other_tensors: int = 0
    quantised: str | None = None
    warnings: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Lines for people: how it was merged, what was compared, positions, warnings."""
        lines = [self.way]
        if self.num_merged_tensors:
            lines.append(
                f"sampled rows of all {self.num_merged_tensors} merged tensors are base + adapter, rounded once; "
                f"samples of the other {self.num_other_tensors} tensors are the base's"
            )
        lines.append(
            "no logits compared, which needs memory for the whole model in float32"
            if self.largest_logit_difference is None
            else self.comparison("base + adapter")
        )
        lines += [self.verification.summary(), *([self.quantised] if self.quantised else [])]
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]

    def comparison(self, expected: str) -> str:
        """What was compared, for people; `expected` names what with."""
        text = (
            f"merged checkpoint read back by stock transformers: largest logit difference to {expected} "
            f"{self.largest_logit_difference:.1e}"
        )
        return text if self.choices is None else f"{text}, {self.choices.words()}"


@dataclass(frozen=True)
class LoraTarget:
    """One linear layer's adapter: the merged weight is W + scaling * (B @ A).

    Attributes:
        file: the adapter's tensors.
        a, b: where A [rank, in] and B [out, rank] lie in it.
        scaling: as peft computes it from rank, alpha and their patterns.
    """

    file: Path
    a: TensorInfo
    b: TensorInfo
    scaling: float


@dataclass(frozen=True)
class WholeTarget:
    """A tensor that was trained whole: the merged weight is the trained one, rounded.

    Attributes:
        file: the adapter's tensors.
        trained: where it lies in the file.
    """

    file: Path
    trained: TensorInfo


MergeTarget = LoraTarget | WholeTarget


def probe_ids(tokenizer: Any) -> list[int]:
    """Token ids of a fixed text that the tokenizer knows."""
    ids = encode_plain(tokenizer, _PROBE_TEXT)
    if tokenizer.unk_token_id in ids:
        ids = encode_plain(tokenizer, words.document("probe"))
    return ids[:_PROBE_TOKENS]


@dataclass(frozen=True)
class Probed:
    """A model's answer to the probe.

    Attributes:
        logits: [1, S, V].
        choices: of experts that the model made, or would have made; none in dense models.
    """

    logits: Tensor
    choices: Sequence[Choice] = ()


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' answers to the probe are apart.

    Attributes:
        largest: of their logits.
        choices: of experts; None in dense models.
    """

    largest: float
    choices: ChoiceDifference | None


def probe_logits(model: Any, ids: list[int], target_length: int) -> Tensor:
    """Logits [1, S, V] of `ids`, the second half of which sits at the end of the target range."""
    return probe(model, ids, target_length).logits


def probe(model: Any, ids: list[int], target_length: int, like: Probed | None = None) -> Probed:
    """Logits of `ids`, the second half of which sits at the end of the target range.

    Args:
        like: of another model, whose choices of experts are repeated.
    """
    half = len(ids) // 2
    positions = torch.cat([torch.arange(half), torch.arange(target_length - len(ids) + half, target_length)])
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode(), choices_recorded(model, like.choices if like else ()) as choices:
        output = model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=positions[None].to(device),
            # All ones: without a mask transformers would take the jump for a document boundary.
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
            use_cache=False,
        )
    return Probed(output.logits.float().cpu(), choices)


def read_back(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a checkpoint as any stock program would: by folder name alone."""
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    model.to(device)
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def check_logits(actual: Probed, expected: Probed, tolerance: float, folder: Path) -> LogitDifference:
    """The largest difference between the merged checkpoint's logits and the expected ones.

    Args:
        actual: with the expected one's choices of experts repeated.

    Raises:
        ArtefactError: it is more than rounding, or the scores for experts differ by more.
    """
    difference = float((actual.logits - expected.logits).abs().max())
    allowed = tolerance * float(expected.logits.abs().max())
    if not difference <= allowed:
        raise ArtefactError(
            "the merged checkpoint does not give the logits of base + adapter",
            where=str(folder),
            got=difference,
            expected=f"a largest difference of {allowed:.2g}",
            hint="Please report this.",
        )
    choices = compare_choices(actual.choices, expected.choices)
    if choices is not None and not choices.largest_score <= SCORES_FACTOR * tolerance:
        raise ArtefactError(
            "the merged checkpoint does not send tokens to the experts of base + adapter",
            where=str(folder),
            got=choices.words(),
            expected=f"scores that differ by at most {SCORES_FACTOR * tolerance:.2g} of the largest",
            hint="Please report this.",
        )
    return LogitDifference(difference, choices)


def available_memory() -> int:
    """Bytes of main memory that can still be had, a container's limit included."""
    available = int(psutil.virtual_memory().available)
    for folder, limit, used, prefix in _CONTROL_GROUPS:
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Cached files count as used, yet the kernel gives them up when memory is asked for.
            left += sum(int(statistics[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        except (OSError, ValueError, KeyError):  # no such controller, or "max"
            continue
        available = min(available, left)
    return max(available, 0)


def device_for_logits(num_parameters: int, preferred: torch.device) -> torch.device | None:
    """Where base + adapter, and after it the merged model, can be held in float32; None when nowhere."""
    needed = int(num_parameters * 4 * MEMORY_FACTOR)
    if available_memory() < needed:
        return None
    if preferred.type != "cpu" and torch.accelerator.get_memory_info(preferred)[0] < needed:
        return torch.device("cpu")
    return preferred


def prove_by_samples(
    folder: Path, base: StoredWeights, targets: Mapping[str, MergeTarget], config: Any, destination: Path
) -> MergeProof:
    """Compare samples of every tensor in `folder` with what it must hold; little memory, whatever the model's size.

    Args:
        folder: the merged checkpoint, complete but for its manifest.
        base: the weights it was made from.
        targets: what was merged, by tensor name.
        config: the extended one, which the written one must mean.
        destination: what errors and the proof name.

    Raises:
        ArtefactError: a tensor differs.
        PositionsNotInEffectError: the written config gives other positions.
    """
    merged = checkpoint_tensors(folder)
    if merged.shards != base.shards:
        raise ArtefactError("the merged files have other headers than the base's", where=str(destination))
    for file in merged.shards:
        if os.path.samefile(merged.folder / file, base.folder / file):
            continue
        # Read through safetensors itself, the way that every other program will.
        with safe_open(merged.folder / file, "pt") as mine, safe_open(base.folder / file, "pt") as theirs:
            for name in merged.shards[file].keys() & targets.keys():
                _check_rows(mine.get_slice(name), theirs.get_slice(name), targets[name], f"{destination}: {name}")
    others = [name for name in merged.tensors if name not in targets]
    for name in others:
        if _ends(merged, name) != _ends(base, name):
            raise ArtefactError(
                "a tensor that no adapter touches differs from the base's", where=f"{destination}: {name}"
            )
    written = AutoConfig.from_pretrained(folder)
    verification = verify_positions(with_real_rotary_modules(written), config)
    return MergeProof(destination, None, verification, num_merged_tensors=len(targets), num_other_tensors=len(others))


def _check_rows(merged: Any, base: Any, target: MergeTarget, where: str) -> None:
    num_rows = merged.get_shape()[0]
    for first in {0, max(0, num_rows // 2 - _SAMPLED_ROWS), max(0, num_rows - _SAMPLED_ROWS)}:
        rows = slice(first, min(first + _SAMPLED_ROWS, num_rows))
        expected = _expected_rows(base[rows].double(), target, first)
        stored = merged[rows]
        kind = torch.finfo(stored.dtype)
        allowed = (
            expected.abs() * (kind.eps / 2) * 1.01
            + expected.abs().max() * _SUM_ROUNDING
            + kind.smallest_normal * kind.eps
        )
        error = (stored.double() - expected).abs()
        if not bool((error <= allowed).all()):
            raise ArtefactError(
                "a merged tensor is not base + adapter",
                where=where,
                got=float(error.max()),
                expected=f"at most {float(allowed.max()):.2g}",
                hint="Please report this.",
            )


def _expected_rows(base: Tensor, target: MergeTarget, first: int) -> Tensor:
    """Rows `first`, `first + 1`, ... in float64."""
    if isinstance(target, WholeTarget):
        return read_tensor(target.file, target.trained, first, len(base)).double()
    a = read_tensor(target.file, target.a).double()
    b = read_tensor(target.file, target.b, first, len(base)).double()
    return base + target.scaling * (b @ a)


def _ends(weights: StoredWeights, name: str) -> tuple[bytes, bytes]:
    info, path = weights.tensors[name], weights.folder / weights.file_of[name]
    count = min(_SAMPLED_BYTES, info.num_bytes)
    first, last = bytearray(count), bytearray(count)
    with open_source(path) as stream:
        read_range(stream, path, info.start, memoryview(first))
        read_range(stream, path, info.end - count, memoryview(last))
    return bytes(first), bytes(last)


def meta_model(config: Any) -> PreTrainedModel:
    """The architecture without weights: every parameter on the meta device."""
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.eval()
    return model


def with_real_rotary_modules(config: Any) -> PreTrainedModel:
    """A model without weights whose rotary modules are real: enough to verify positions."""
    model = meta_model(config)
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            with torch.no_grad():
                model._init_weights(module)  # what from_pretrained calls for buffers that no file holds
    return model
