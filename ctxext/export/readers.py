"""Proof by the readers themselves: does another program compute the positions that the checkpoint asks for?

Readers have ignored, dropped, squared and inverted RoPE's attention factor, each without a word (mlx-lm issue 1507,
exllamav3 issue 259, sglang issue 22711, llama.cpp issue 17945, vLLM issue 48351), and a prompt within the original
length may not show it. So each reader scores a longer one, and its log-probabilities are compared with those of
transformers 5 and with what transformers 5 computes when it makes these mistakes on purpose: the verdict is the
nearest of them. Where right and unscaled agree too well on the prompt to be told apart, the verdict says that instead.
"""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape
from rich.table import Table

from ctxext.data import words
from ctxext.data.boundaries import encode_plain
from ctxext.errors import ArtefactError, CtxextError, PositionsNotInEffectError, UsageError
from ctxext.evaluation.haystack import SEPARATOR, load_haystack
from ctxext.export.reader_environments import (
    Answer,
    Environment,
    Question,
    Reader,
    ask,
    create_environment,
    find_environment,
    reader_named,
)
from ctxext.export.slicing import layers_that_show_everything, slice_layers
from ctxext.export.stored import checkpoint_tensors
from ctxext.files import read_json
from ctxext.model.load import load_config, load_model, load_tokenizer, resolve_source
from ctxext.rope.families import rope_groups, text_config
from ctxext.train.adapter import PROVENANCE_NAME

Scores = npt.NDArray[np.float64]
Report = Callable[[str], None]

RIGHT = "right"
IGNORES = "ignores the scaling"
DEFAULT_THETA = "reads theta as 10000"
DROPS = "drops the attention factor"
SQUARES = "squares the attention factor"
INVERTS = "inverts the attention factor"
OWN_FACTOR = "derives an attention factor of its own"
DIFFERS = "differs"
CANNOT_TELL = "cannot tell"
FAILED = "failed"
NOT_ASKED = "not asked"

# Mean difference over the scored tokens that still counts as rounding. Measured in float32 on SmolLM2-135M, 1,500
# tokens: 0 to 3e-5 for every reader that is right, 0.03 to 2 for the mistakes above.
NOISE_FLOOR = 1e-3
# What is to be told apart must differ by this many noise floors.
_MARGIN = 4.0


@dataclass(frozen=True)
class ReaderVerdict:
    """What one reader made of one checkpoint; differences are of log-probabilities (nats), over the scored tokens.

    Attributes:
        reader: as on the command line.
        version: of the reader's package.
        verdict: `right`, the mistake it makes, `differs`, `cannot tell`, `failed`, or `not asked` when the checkpoint
            cannot be brought into a form that the reader opens.
        detail: what a person should know besides, or "".
        mean_difference, largest_difference: to transformers 5; None when the reader failed.
        unscaled_mean, unscaled_largest: what the scaling is worth on this prompt, transformers 5 with it against
            transformers 5 without it; None when the unscaled model is not known.
        num_tokens: length of the prompt.
        num_scored: how many of its last tokens were compared.
        num_layers, of_layers: layers that were asked, and layers that the checkpoint has.
        seconds: what the answer took, starting the reader not included.
    """

    reader: str
    version: str
    verdict: str
    detail: str
    mean_difference: float | None
    largest_difference: float | None
    unscaled_mean: float | None
    unscaled_largest: float | None
    num_tokens: int
    num_scored: int
    num_layers: int
    of_layers: int
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the reader was seen to compute these positions."""
        return self.verdict == RIGHT

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """One checkpoint, the prompt that readers are asked about, and what they could answer.

    Attributes:
        folder: the checkpoint, or a slice of its layers.
        scratch: where a GGUF of it may be written.
        ids: the prompt.
        expected: log-probabilities of the last tokens by transformers 5: `right`, and every mistake that would show.
        num_layers, of_layers: layers of `folder`, and of the checkpoint.
    """

    folder: Path
    scratch: Path
    ids: tuple[int, ...]
    expected: Mapping[str, Scores]
    num_layers: int
    of_layers: int

    @property
    def num_scored(self) -> int:
        return len(self.expected[RIGHT])


def verify_readers(
    checkpoint: Path,
    readers: Sequence[str],
    *,
    create: bool = False,
    num_tokens: int | None = None,
    num_scored: int = 50,
    num_layers: int | None = None,
    original_length: int | None = None,
    timeout_seconds: float = 1800.0,
    report: Report = lambda line: None,
) -> list[ReaderVerdict]:
    """Ask each reader about `checkpoint`, a plain Hugging Face folder with safetensors and a tokenizer.

    Args:
        readers: names out of `READERS`.
        create: make environments that are not there.
        num_tokens: length of the prompt; by default a quarter longer than the original length, at least 256 tokens.
        num_scored: how many of the last tokens are compared.
        num_layers: ask about the first layers only. By default the whole model where that takes a reader about a
            minute, else as few layers as show every layer type, at least two.
        original_length: where neither `ctxext.json` nor the config knows it.
        report: called with one line before every long step.

    Raises:
        UsageError: an unknown reader, or a prompt length not between original and target length.
        ArtefactError: an environment is missing, or the checkpoint cannot be read or does not know its lengths.
        ResourceError: an environment could not be created.
    """
    chosen = [reader_named(name) for name in dict.fromkeys(readers)]
    if not chosen:
        raise UsageError("no reader was named", where="--readers")
    length = prompt_length(checkpoint, num_tokens, original_length)
    environments = [create_environment(r, None, report) if create else find_environment(r) for r in chosen]
    trials: dict[int, Trial] = {}
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="ctxext-readers-") as scratch:
        for environment in environments:
            layers = num_layers or layers_for(environment.reader, checkpoint, length)
            if layers not in trials:
                report(f"scoring {length} tokens with transformers 5 ({layers} layers), right and wrong on purpose")
                trials[layers] = prepare_trial(checkpoint, Path(scratch), length, num_scored, layers)
            report(f"asking {environment.reader.title} {environment.version}")
            verdicts += ask_about(environment, [trials[layers]], timeout_seconds)
    return verdicts


def prompt_length(checkpoint: Path, num_tokens: int | None = None, original_length: int | None = None) -> int:
    """The prompt length to use, checked: above the original length and below what the checkpoint reaches.

    Raises:
        UsageError: the asked length is not between the two.
        ArtefactError: no checkpoint, or its original length is not known.
    """
    if not (checkpoint / "config.json").is_file():
        raise ArtefactError("the folder holds no config.json, so it is not a model", where=str(checkpoint))
    config = load_config(resolve_source(str(checkpoint)))
    target = int(text_config(config).max_position_embeddings)
    original = original_length or _original_length(checkpoint, config)
    if original is None or original >= target:
        raise ArtefactError(
            "the checkpoint does not say which length it was extended from",
            where=str(checkpoint),
            got=None if original is None else original,
            expected=f"'original_length' below {target} in {PROVENANCE_NAME}",
            hint="Give it with --original-length.",
        )
    length = num_tokens or min(target - 1, original + max(256, original // 4))
    if not original < length < target:  # one position stays free: vLLM and llama.cpp generate a token
        raise UsageError(
            "the prompt must be longer than the original length and shorter than the target length",
            where="num_tokens",
            got=length,
            expected=f"{original + 1} to {target - 1}",
        )
    return length


def _original_length(checkpoint: Path, config: Any) -> int | None:
    if (checkpoint / PROVENANCE_NAME).is_file():
        length = read_json(checkpoint / PROVENANCE_NAME).get("original_length")
        if isinstance(length, int):
            return length
    lengths = [group.get("original_max_position_embeddings") for group in rope_groups(config).values()]
    return min((int(length) for length in lengths if length), default=None)


def layers_for(reader: Reader, checkpoint: Path, num_tokens: int) -> int:
    """How many layers to ask this reader about: all when that takes about a minute, else those that show everything."""
    text = text_config(load_config(resolve_source(str(checkpoint))))
    weights = checkpoint_tensors(checkpoint)
    parameters = sum(math.prod(info.shape) for info in weights.tensors.values())
    whole = parameters * num_tokens <= reader.whole_work
    return int(text.num_hidden_layers) if whole else layers_that_show_everything(text)


def prompt_ids(checkpoint: Path, num_tokens: int) -> tuple[int, ...]:
    """English prose as token ids: this Python's documentation topics, or plain words for a vocabulary of words only."""
    tokenizer = load_tokenizer(resolve_source(str(checkpoint)))
    documents: Iterator[str] = iter(load_haystack("python-docs").documents or ())
    ids: list[int] = []
    number = 0
    while len(ids) < num_tokens:
        text = next(documents, None) or words.document(f"readers {number}")
        piece = encode_plain(tokenizer, text + SEPARATOR)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in piece:
            piece = encode_plain(tokenizer, words.document(f"readers {number}"))
        ids += piece
        number += 1
    return tuple(ids[:num_tokens])


def prepare_trial(checkpoint: Path, scratch: Path, num_tokens: int, num_scored: int, num_layers: int) -> Trial:
    """Slice the checkpoint where fewer layers are asked, and let transformers 5 score the prompt in all readings.

    Raises:
        ArtefactError: the checkpoint cannot be read, or its layers cannot be taken apart.
    """
    total = int(text_config(load_config(resolve_source(str(checkpoint)))).num_hidden_layers)
    folder = checkpoint
    if num_layers < total:
        folder = slice_layers(checkpoint, scratch / f"{checkpoint.name}-{num_layers}-layers", num_layers)
    ids = prompt_ids(checkpoint, num_tokens)
    return Trial(folder, scratch, ids, _score_all_readings(folder, ids, num_scored), num_layers, total)


def _score_all_readings(folder: Path, ids: Sequence[int], num_scored: int) -> dict[str, Scores]:
    source = resolve_source(str(folder))
    config = load_config(source)
    model = load_model(source, config, dtype=torch.float32, device=torch.device("cpu"))
    scores = {RIGHT: log_probs(model, ids, num_scored)}
    for mistake, wrong in wrong_readings(config, _base_thetas(folder, config)).items():
        with _positions_of(model, wrong):
            scores[mistake] = log_probs(model, ids, num_scored)
    return scores


def log_probs(model: Any, ids: Sequence[int], num_scored: int) -> Scores:
    """Log-probabilities of the last `num_scored` ids, each after all ids before it; shape [num_scored]."""
    # Without this, a long prompt's logits alone can take many GB.
    keep = {"logits_to_keep": num_scored} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False, **keep).logits[0, -num_scored:]
        table = torch.log_softmax(logits.double(), dim=-1)
        return np.asarray(table.gather(1, torch.tensor(ids[-num_scored:])[:, None])[:, 0].numpy())


def _base_thetas(folder: Path, config: Any) -> dict[str | None, float]:
    """By layer type, where theta may be all that was changed: the base model's, out of its config if that is there."""
    if any(group.get("rope_type", "default") != "default" for group in rope_groups(config).values()):
        return {}
    try:
        base = read_json(folder / PROVENANCE_NAME)["base"]
        base_config = load_config(resolve_source(str(base["source"]), base.get("revision")))
        return {key: float(group["rope_theta"]) for key, group in rope_groups(base_config).items()}
    except (CtxextError, KeyError, TypeError):
        return {}


def wrong_readings(config: Any, base_thetas: Mapping[str | None, float] = MappingProxyType({})) -> dict[str, Any]:
    """Configs that compute what a program with one of the known mistakes would.

    Only those that change anything, and of two that compute the same the first. `base_thetas` by layer type: of the
    base model, where they differ from the config's.
    """
    groups = rope_groups(config)
    readings: dict[str, dict[str | None, dict[str, Any]]] = {
        IGNORES: {key: _unscaled(group, base_thetas.get(key)) for key, group in groups.items()},
        DEFAULT_THETA: {key: _unscaled(group, 10000.0) for key, group in groups.items()},
        **{
            mistake: {key: _with_factor(group, config, mistake) for key, group in groups.items()}
            for mistake in (DROPS, SQUARES, INVERTS, OWN_FACTOR)
        },
    }
    different: list[Any] = [groups]
    changed = {}
    for mistake, wrong in readings.items():
        if wrong not in different:
            different.append(wrong)
            changed[mistake] = wrong
    return {mistake: _with_groups(config, wrong) for mistake, wrong in changed.items()}


def _unscaled(group: Mapping[str, Any], theta: float | None) -> dict[str, Any]:
    kept = {key: group[key] for key in ("partial_rotary_factor",) if key in group}
    return {**kept, "rope_type": "default", "rope_theta": theta or group["rope_theta"]}


def _with_factor(group: Mapping[str, Any], config: Any, mistake: str) -> dict[str, Any]:
    """The group with the attention factor that this mistake gives; unchanged where there is none to get wrong."""
    derived = _derived_factor(group, int(text_config(config).max_position_embeddings))
    factor = group.get("attention_factor") or derived
    if derived is None or factor is None:
        return dict(group)
    wrong = {DROPS: 1.0, SQUARES: factor**2, INVERTS: 1.0 / factor, OWN_FACTOR: derived}[mistake]
    return dict(group) if math.isclose(wrong, factor, rel_tol=1e-6) else {**group, "attention_factor": wrong}


def _derived_factor(group: Mapping[str, Any], maximum: int) -> float | None:
    """What a program derives that does not look at `attention_factor`; None for types without one."""
    original = int(group.get("original_max_position_embeddings") or maximum)
    if group.get("rope_type") == "yarn":
        return 0.1 * math.log(group["factor"]) + 1.0 if group["factor"] > 1 else 1.0
    if group.get("rope_type") == "longrope":
        ratio = maximum / original
        return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return None


def _with_groups(config: Any, groups: Mapping[str | None, dict[str, Any]]) -> Any:
    changed = copy.deepcopy(config)
    text: Any = text_config(changed)
    if None in groups:
        text.rope_parameters = groups[None]
    else:
        text.rope_parameters = {**text.rope_parameters, **groups}
    return changed


@contextmanager
def _positions_of(model: torch.nn.Module, config: Any) -> Iterator[None]:
    """The model with rotary modules built from another config."""
    own = {
        name: module
        for name, module in model.named_modules()
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False))
    }
    try:
        for name, module in own.items():
            rotary: Any = type(module)
            model.set_submodule(name, rotary(config=text_config(config)))
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def ask_about(environment: Environment, trials: Sequence[Trial], timeout_seconds: float) -> list[ReaderVerdict]:
    """Put all trials to one reader in one process. A reader that fails gets a verdict that says so."""
    models = [_model_for(environment.reader, trial) for trial in trials]
    questions = [
        Question(model, trial.ids, trial.num_scored)
        for model, trial in zip(models, trials, strict=True)
        if isinstance(model, Path)
    ]
    answers = iter(ask(environment, questions, timeout_seconds=timeout_seconds) if questions else ())
    return [
        judge(environment, trial, next(answers) if isinstance(model, Path) else model)
        for model, trial in zip(models, trials, strict=True)
    ]


def _model_for(reader: Reader, trial: Trial) -> Path | str:
    """What the reader opens, or why there is nothing for it to open."""
    if not reader.reads_gguf:
        return trial.folder.absolute()
    from ctxext.export.gguf import export_gguf

    path = trial.scratch / f"{trial.folder.name}-{trial.num_layers}.gguf"
    try:
        export_gguf(trial.folder, path, dtype="float32")
    except CtxextError as error:
        return error.sentence()
    return path


def judge(environment: Environment, trial: Trial, answer: Answer | str) -> ReaderVerdict:
    """The verdict on one answer, or on the reason why there was nothing to ask about."""
    right = trial.expected[RIGHT]
    unscaled = trial.expected.get(IGNORES)
    observed = None
    if isinstance(answer, str):
        verdict, detail = NOT_ASKED, answer
    elif answer.log_probs is None:
        verdict, detail = FAILED, answer.error or ""
    else:
        observed = np.asarray(answer.log_probs)
        verdict, detail = classify(observed, trial.expected)
    return ReaderVerdict(
        reader=environment.reader.name,
        version=environment.version,
        verdict=verdict,
        detail=detail,
        mean_difference=None if observed is None else _mean(observed, right),
        largest_difference=None if observed is None else float(np.max(np.abs(observed - right))),
        unscaled_mean=None if unscaled is None else _mean(unscaled, right),
        unscaled_largest=None if unscaled is None else float(np.max(np.abs(unscaled - right))),
        num_tokens=len(trial.ids),
        num_scored=trial.num_scored,
        num_layers=trial.num_layers,
        of_layers=trial.of_layers,
        seconds=0.0 if isinstance(answer, str) else round(answer.seconds, 2),
    )


def classify(observed: Scores, expected: Mapping[str, Scores], floor: float = NOISE_FLOOR) -> tuple[str, str]:
    """Verdict and detail for a reader's scores, given what `right` and each mistake would score.

    `right` needs agreement within the noise floor, and mistakes that are far enough from right to be seen. A mistake
    is named also from farther off, when it is by far the nearest.
    """
    if not np.isfinite(observed).all():
        return DIFFERS, "the reader gave numbers that are not finite"
    right = expected[RIGHT]
    worth = {name: _mean(scores, right) for name, scores in expected.items() if name != RIGHT}
    deciding = IGNORES if IGNORES in worth else min(worth, key=lambda name: worth[name], default=None)
    if deciding is None or not worth[deciding] > _MARGIN * floor:
        what = f"is worth {worth[deciding]:.1e}" if deciding else "has no known mistake"
        return CANNOT_TELL, f"on this prompt '{deciding}' {what}; at least {_MARGIN * floor:.0e} decides"
    distances = {name: _mean(observed, scores) for name, scores in expected.items()}
    nearest = min(distances, key=lambda name: distances[name])
    if nearest == RIGHT and distances[RIGHT] <= floor:
        unseen = [name for name, value in worth.items() if not value > _MARGIN * floor]
        return RIGHT, f"too small to be seen here: {', '.join(unseen)}" if unseen else ""
    others = [_mean(expected[nearest], scores) for name, scores in expected.items() if name != nearest]
    if nearest != RIGHT and distances[nearest] <= max(floor, min(others) / _MARGIN):
        return nearest, "" if distances[nearest] <= floor else f"within {distances[nearest]:.1e}"
    return DIFFERS, f"by {distances[RIGHT]:.2g} on average; nearest is '{nearest}', at {distances[nearest]:.2g}"


def _mean(one: Scores, other: Scores) -> float:
    return float(np.mean(np.abs(one - other)))


def require_right(checkpoint: Path, verdicts: Sequence[ReaderVerdict]) -> None:
    """Refuse a checkpoint that some reader was not seen to read right.

    Raises:
        PositionsNotInEffectError: with every reader that is not right, and why.
    """
    if others := [f"{v.reader} {v.version} {v.verdict}" for v in verdicts if not v.is_right]:
        raise PositionsNotInEffectError(
            "not every reader was seen to compute this checkpoint's positions",
            where=str(checkpoint),
            got="; ".join(others),
            hint="`ctxext patch --portable` writes a form that all of them read right.",
        )


def verdict_table(verdicts: Sequence[ReaderVerdict]) -> Table:
    """The verdicts for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("reader", "version", "verdict", "difference: mean", "largest", "scaling is worth", "asked about"):
        table.add_column(title, overflow="fold")
    for verdict in verdicts:
        style = "green" if verdict.is_right else "yellow" if verdict.verdict in (CANNOT_TELL, NOT_ASKED) else "red"
        detail = f"\n[dim]{escape(verdict.detail)}[/dim]" if verdict.detail else ""
        table.add_row(
            verdict.reader,
            verdict.version,
            f"[{style}]{verdict.verdict}[/{style}]{detail}",
            short_number(verdict.mean_difference),
            short_number(verdict.largest_difference),
            short_number(verdict.unscaled_mean),
            f"{verdict.num_tokens} tokens, {verdict.num_layers} of {verdict.of_layers} layers",
        )
    return table


def short_number(value: float | None) -> str:
    """A difference for people: `0.52`, `2e-05`, or a dash."""
    return "-" if value is None else f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3g}"
