"""`lora.start_from`: training goes on from an adapter that is there already, which must be one that the recipe means.

Everything that decides what an adapter's numbers stand for is compared before any weight is loaded: layers, ranks,
scaling, variant, and for adapters of ctxext the base's fingerprint. Positions may differ, as in a curriculum, and are
said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ctxext.errors import ArtefactError, UsageError
from ctxext.files import read_json, sha256_file, verify_manifest
from ctxext.model.parts import causal_lm, plain_name
from ctxext.model.trained import ADAPTER_WEIGHTS, PEFT_PREFIX, set_trained_tensors, trained_tensors
from ctxext.model.whole import whole_parameters
from ctxext.recipe.adaptation import LoraBlock

_T = TypeVar("_T")

_CONFIG = "adapter_config.json"
_PROVENANCE = "ctxext.json"
# Starting values of LoRA that leave the base's weights alone; the others (PiSSA, LoftQ ...) subtract something.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Start:
    """An adapter that training starts from.

    Attributes:
        sha256: of its weights: what a plan depends on, wherever the folder lies.
        notes: what a user must know about it.
    """

    folder: Path
    sha256: str
    notes: list[str]


def find_start(lora: LoraBlock) -> Path:
    """The adapter folder that `lora.start_from` names: itself, or that of a run.

    Raises:
        ArtefactError: there is none, or its weights are no safetensors.
    """
    assert lora.start_from is not None
    named = Path(lora.start_from).expanduser()
    folder = next((path for path in (named, named / "adapter") if (path / _CONFIG).is_file()), None)
    if folder is None:
        raise ArtefactError(
            "no adapter here (a folder with adapter_config.json, or a run that trained one)",
            where="lora.start_from",
            got=str(named),
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ArtefactError(
            "the adapter's weights are not stored as safetensors",
            where="lora.start_from",
            got=str(folder),
            expected=ADAPTER_WEIGHTS,
            hint="Pickled weights can run code: load the adapter with peft once, and save_pretrained.",
        )
    return folder


def check_start(adapted: Any, lora: LoraBlock, *, base: str, fingerprint: str, positions: str) -> Start:
    """Compare the named adapter with what the recipe would train; only headers and configs are read.

    Args:
        adapted: the model as `adapt` makes it; may lie on the meta device.
        base: name of the recipe's model.
        fingerprint: of its weights.
        positions: the recipe's, in words.

    Raises:
        UsageError: the recipe asks for an adapter of another kind; everything that differs is listed.
        ArtefactError: no adapter, a damaged one, or one for other weights.
    """
    folder = find_start(lora)
    stored = read_json(folder / _CONFIG)
    _refuse_other_kind(stored, lora, folder)
    expected = {name: tuple(tensor.shape) for name, tensor in trained_tensors(adapted).items()}
    found = _without_aliases(_shapes(folder / ADAPTER_WEIGHTS), adapted)
    if found != expected:
        differing = sorted({name for name, _ in found.items() ^ expected.items()})
        name = differing[0]
        raise UsageError(
            f"the adapter has other weights than the recipe's block lora asks for ({len(differing)} differ)",
            where="lora.start_from",
            got=f"{name} {list(found[name]) if name in found else 'missing'}",
            expected=str(list(expected[name])) if name in expected else "no such weight",
            hint="lora.targets, routers, experts and embeddings_and_norms must be those that it was trained with.",
        )
    return Start(folder, sha256_file(folder / ADAPTER_WEIGHTS), _notes(folder, stored, base, fingerprint, positions))


def start_from(adapted: Any, lora: LoraBlock) -> None:
    """Put the adapter that `lora.start_from` names, if any, into a model that `adapt` has made trainable.

    Raises:
        ArtefactError: it does not fit.
    """
    if lora.start_from is None:
        return
    folder = find_start(lora)
    try:
        stored = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"could not read the tensors ({error})", where=str(folder / ADAPTER_WEIGHTS)) from error
    set_trained_tensors(adapted, _without_aliases(stored, adapted), str(folder))


def _refuse_other_kind(stored: dict[str, Any], lora: LoraBlock, folder: Path) -> None:
    pairs = {
        "rank": (lora.rank, stored.get("r")),
        "alpha": (lora.alpha, stored.get("lora_alpha")),
        "rank_stabilized": (lora.rank_stabilized, bool(stored.get("use_rslora"))),
        "weight_decomposed": (lora.weight_decomposed, bool(stored.get("use_dora"))),
    }
    problems = [f"lora.{key} is {asked}, the adapter's {has}" for key, (asked, has) in pairs.items() if asked != has]
    if stored.get("peft_type") != "LORA":
        problems = [f"it is of peft's kind {stored.get('peft_type')}, not LoRA"]
    for key in ("rank_pattern", "alpha_pattern"):
        if stored.get(key):
            problems.append(f"its {key} makes layers differ, which a recipe cannot say")
    if stored.get("init_lora_weights", True) not in _PLAIN_STARTS:
        problems.append(f"it has changed its base at the start ({stored['init_lora_weights']})")
    if stored.get("bias", "none") != "none" or stored.get("lora_bias"):
        problems.append("it trains biases, which a recipe cannot say")
    if problems:
        raise UsageError(
            "the adapter is not one that the recipe's block lora describes: " + "; ".join(problems),
            where="lora.start_from",
            got=str(folder),
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"could not read the tensors ({error})", where=str(path)) from error


def _without_aliases(stored: dict[str, _T], adapted: Any) -> dict[str, _T]:
    """Without the second name of a tied weight, under which peft wants it as well."""
    own = whole_parameters(adapted)
    trained = {id(parameter) for parameter in own.values()}
    aliases = {
        PEFT_PREFIX + plain_name(name)
        for name, parameter in causal_lm(adapted).named_parameters(remove_duplicate=False)
        if id(parameter) in trained and plain_name(name) not in own
    }
    return {name: value for name, value in stored.items() if name not in aliases}


def _notes(folder: Path, stored: dict[str, Any], base: str, fingerprint: str, positions: str) -> list[str]:
    if not (folder / _PROVENANCE).is_file():
        made_for = stored.get("base_model_name_or_path") or "a base that it does not name"
        return [
            "training starts from an adapter that ctxext did not write: it says nothing of positions, and was made for "
            f"{made_for} (here: {base})"
        ]
    verify_manifest(folder)
    provenance = read_json(folder / _PROVENANCE)
    expected = provenance["base"].get("fingerprint")
    if expected not in (None, fingerprint):
        raise ArtefactError(
            "the adapter was trained on other weights than the recipe's model",
            where="lora.start_from",
            got=f"{provenance['base']['source']} ({expected})",
            expected=f"{base} ({fingerprint})",
        )
    method = provenance.get("method", {}).get("method", "unknown positions")
    return [
        f"training starts from an adapter that was trained with {method} to {provenance['target_length']:,} positions; "
        f"here: {positions}"
    ]
