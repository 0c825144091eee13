"""`ctxext verify`: checksums, config and live positions of a checkpoint, an adapter or a run, and how it behaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from ctxext.errors import ArtefactError, PositionsNotInEffectError, UnsupportedModelError, UsageError
from ctxext.export.merge import safetensors_folder
from ctxext.export.portability import portability, portability_lines, portability_table
from ctxext.export.proof import probe_ids
from ctxext.export.readers import require_right, verdict_table, verify_readers
from ctxext.export.stored import FLOAT_TYPES, checkpoint_tensors
from ctxext.export.stream import row_scaling
from ctxext.files import MANIFEST_NAME, read_json, verify_manifest
from ctxext.model.load import ModelSource, load_config, load_model, load_tokenizer, resolve_source
from ctxext.model.probes import probe_model
from ctxext.rope.families import length_before_scaling, original_length, rope_groups, text_config
from ctxext.rope.methods import create_method
from ctxext.rope.patchers import apply_method
from ctxext.rope.portable import exported_form, fold_edits
from ctxext.rope.reference import RELATIVE_TOLERANCE, describe_positions, reference_tables
from ctxext.rope.verify import verify_positions
from ctxext.train.adapter import PROVENANCE_NAME, adapter_config, base_of, load_adapter, read_provenance

_TOKENIZER_CONFIG = "tokenizer_config.json"
_SAMPLED_ROWS = 8


@dataclass(frozen=True)
class _Loaded:
    """What is verified: the live model, the config it must follow, and where its tokenizer lies."""

    model: PreTrainedModel
    config: PreTrainedConfig
    tokenizer: ModelSource
    original_length: int
    target_length: int


def find_checkpoint(folder: Path) -> Path:
    """The folder that is meant: a run's merged checkpoint, else what it has trained, else the folder itself.

    Raises:
        ArtefactError: no such folder.
    """
    if not folder.is_dir():
        raise ArtefactError("folder not found", where=str(folder))
    for inside in ("merged", "adapter", "trained"):
        if (folder / inside).is_dir():
            return folder / inside
    return folder


def verify_checkpoint(folder: Path, against: str | None = None) -> Iterator[str]:
    """Check and tell, line by line.

    Args:
        against: a recipe or a plan.json whose positions the checkpoint must have.

    Raises:
        ArtefactError: something is missing, damaged, or not in effect.
    """
    folder = find_checkpoint(folder)
    if (folder / MANIFEST_NAME).is_file():
        manifest = verify_manifest(folder)
        yield f"{folder}: {len(manifest['files'])} files, all checksums hold"
    else:
        yield f"{folder}: no manifest, so damaged files would not be noticed"
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter:
        loaded, line = _load_adapter(folder)
        yield line
    else:
        loaded = _load_checkpoint(folder)
        yield from _check_settings(folder, loaded)
    if (folder / PROVENANCE_NAME).is_file():
        yield _check_origin(folder, loaded, is_adapter)
    yield f"config: {describe_positions(loaded.config)}"
    verification = verify_positions(loaded.model, loaded.config, loaded.target_length)
    yield verification.summary()
    if against is not None:
        yield _check_against(against, loaded)
    yield from _probe(loaded, folder)


def judge_portability(folder: Path) -> tuple[Table, list[str]]:
    """Who else reads the checkpoint right, as a table and as lines with what to do; runs nothing.

    Raises:
        ArtefactError: no config here.
    """
    folder = find_checkpoint(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    rank = read_json(folder / "adapter_config.json").get("r") if is_adapter else None
    verdicts = portability(read_json(folder / "config.json"), adapter_rank=rank)
    return portability_table(verdicts), list(portability_lines(verdicts, adapter=is_adapter))


def ask_readers(folder: Path, readers: list[str], create: bool, console: Console) -> None:
    """Run other programs on the checkpoint and compare what they compute; see `ctxext.export.readers`.

    Raises:
        PositionsNotInEffectError: a reader computes other positions, or could not be asked; the table is printed first.
        CtxextError: a reader is unknown or not installed.
    """
    names = [name.strip() for name in readers]
    verdicts = verify_readers(find_checkpoint(folder), names, create=create, report=lambda line: console.print(line))
    console.print(verdict_table(verdicts))
    require_right(folder, verdicts)


def _load_adapter(folder: Path) -> tuple[_Loaded, str]:
    config, provenance = adapter_config(folder), _origin(folder)
    source = base_of(provenance)
    model = load_model(source, config, dtype=torch.float32, device=torch.device("cpu"))
    load_adapter(folder, model)
    lengths = provenance["original_length"], provenance["target_length"]
    return _Loaded(model, config, source, *lengths), f"adapter complete, and made for its base {source.name}"


def _load_checkpoint(folder: Path) -> _Loaded:
    source = resolve_source(str(folder))
    config = load_config(source)
    if not getattr(text_config(config), "rope_parameters", None):
        raise UnsupportedModelError("the model has no rotary positions to verify", where=str(folder))
    model = load_model(source, config, dtype=torch.float32, device=torch.device("cpu"))
    before, target = length_before_scaling(config), original_length(config)
    if (folder / PROVENANCE_NAME).is_file():
        provenance = _origin(folder)
        before, target = provenance["original_length"], provenance["target_length"]
    return _Loaded(model, config, source, before, target)


def _check_settings(folder: Path, loaded: _Loaded) -> Iterator[str]:
    """Settings that make a checkpoint slow or wrong without touching its positions."""
    text = text_config(loaded.config)
    if getattr(text, "use_cache", True) is not True:
        raise ArtefactError(
            "the config switches the KV cache off, which makes generation slower by orders of magnitude",
            where=str(folder / "config.json"),
            got="use_cache: false",
            expected="use_cache: true",
        )
    if (folder / _TOKENIZER_CONFIG).is_file():
        limit = read_json(folder / _TOKENIZER_CONFIG).get("model_max_length")
        if isinstance(limit, int) and limit < loaded.target_length:
            raise ArtefactError(
                "the tokenizer cuts prompts below the length that the model reaches",
                where=f"{folder / _TOKENIZER_CONFIG}: model_max_length",
                got=limit,
                expected=str(loaded.target_length),
            )
        yield f"config and tokenizer agree on {loaded.target_length:,} positions; KV cache on"


def _check_origin(folder: Path, loaded: _Loaded, is_adapter: bool) -> str:
    """The positions are those that base, method and lengths in `ctxext.json` give, and not the base's own."""
    provenance = _origin(folder)
    source = base_of(provenance)
    asked = dict(provenance["method"])
    method = create_method(asked.pop("method"), **asked)
    base_config = load_config(source)
    expected = apply_method(base_config, method, provenance["target_length"], provenance.get("on_existing", "refuse"))
    extended, folded, reach = expected, dict[str | None, float](), original_length(expected)
    if not is_adapter:
        expected, folded = exported_form(expected, provenance.get("portable"))
    _require_same_tables(loaded.config, expected, str(folder / "config.json"), f"{source.name} with {method.method}")
    if original_length(loaded.config) != reach:
        raise ArtefactError(
            "the config reaches another length than the checkpoint was made for",
            where=f"{folder / 'config.json'}: max_position_embeddings",
            got=original_length(loaded.config),
            expected=str(reach),
        )
    if method.method != "none" and _same_tables(loaded.config, base_config) and method.method != "dynamic":
        raise PositionsNotInEffectError(
            "the checkpoint has the positions of its unscaled base", where=str(folder / "config.json")
        )
    if not provenance.get("trained", True):
        _check_untrained_weights(folder, source, extended, folded)
    trained = "" if provenance.get("trained", True) else ", not trained"
    lengths = f"{loaded.original_length:,} to {loaded.target_length:,} positions"
    return f"made from {source.name}: {method.method}, {lengths}{trained}"


def _origin(folder: Path) -> dict[str, Any]:
    """`ctxext.json`, with everything in it that is compared here.

    Raises:
        ArtefactError: something is missing or of another kind.
    """
    provenance = read_provenance(folder)
    base, method = provenance["base"], provenance.get("method")
    lengths = (provenance.get("original_length"), provenance["target_length"])
    if not (
        isinstance(base, dict)
        and isinstance(base.get("source"), str)
        and isinstance(method, dict)
        and isinstance(method.get("method"), str)
        and all(isinstance(length, int) for length in lengths)
    ):
        raise ArtefactError(
            "ctxext.json is incomplete",
            where=str(folder / PROVENANCE_NAME),
            expected="base.source, method, original_length and target_length",
        )
    return provenance


def _check_untrained_weights(folder: Path, source: ModelSource, extended: Any, folded: dict[str | None, float]) -> None:
    """The weights are the base's, but for the attention factor that is folded into them: a sample of every tensor.

    Raises:
        ArtefactError: a tensor is missing or differs.
    """
    if source.gguf_file or not Path(source.location).is_dir():
        return  # a GGUF file's weights were converted; a hub model's are not fetched for this
    base, mine = checkpoint_tensors(safetensors_folder(source)), checkpoint_tensors(folder)
    edits = fold_edits(extended, base.tensors, folded)
    for name, info in base.tensors.items():
        if info.dtype not in FLOAT_TYPES or not info.num_bytes:
            continue
        count = min(_SAMPLED_ROWS, info.num_rows) if len(info.shape) > 1 else info.num_rows
        expected = base.read(name, 0, count)
        if name in edits:
            edit = row_scaling(edits[name], info.num_rows).function if len(info.shape) > 1 else None
            rows = expected.float()
            expected = (edit(rows, 0) if edit else edits[name](rows)).to(expected.dtype)
        found = mine.tensors.get(name)
        if found is None or found.shape != info.shape or not torch.equal(mine.read(name, 0, count), expected):
            raise ArtefactError(
                "the weights are not the base's, although nothing was trained",
                where=f"{folder}: {name}",
                expected=f"those of {source.name}" + (", attention factor folded in" if name in edits else ""),
            )


def _check_against(name: str, loaded: _Loaded) -> str:
    """The positions are those of a recipe or of a plan.json."""
    if name.endswith(".json"):
        plan = read_json(Path(name))
        if not isinstance(plan, dict) or "rope_parameters" not in plan:
            raise UsageError("not a plan.json", where="--against", got=name, expected="a recipe or a run's plan.json")
        source, expected = plan["model"], load_config(resolve_source(plan["model"]))
        text = text_config(expected)
        text.rope_parameters, text.max_position_embeddings = plan["rope_parameters"], plan["target_length"]
    else:
        from ctxext.pipeline.recipes import recipe_of

        recipe = recipe_of(name, [], None, None)
        source = recipe.model.source
        expected = apply_method(
            load_config(resolve_source(source, recipe.model.revision)),
            recipe.rope,
            recipe.target_length,
            recipe.on_existing,
        )
    if not _same_tables(loaded.config, expected):
        expected, _ = exported_form(expected, True)
    _require_same_tables(loaded.config, expected, "--against", name)
    return f"positions are those of {name}"


def _same_tables(one: Any, other: Any) -> bool:
    mine, theirs = reference_tables(one), reference_tables(other)
    return mine.keys() == theirs.keys() and all(
        table.inv_freq.shape == theirs[group].inv_freq.shape
        and bool((abs(table.inv_freq - theirs[group].inv_freq) <= RELATIVE_TOLERANCE * theirs[group].inv_freq).all())
        and abs(table.attention_factor - theirs[group].attention_factor) < 1e-6
        for group, table in mine.items()
    )


def _require_same_tables(config: Any, expected: Any, where: str, what: str) -> None:
    if not _same_tables(config, expected):
        raise PositionsNotInEffectError(
            f"the checkpoint has other positions than {what}",
            where=where,
            got=describe_positions(config),
            expected=describe_positions(expected),
        )


def _probe(loaded: _Loaded, folder: Path) -> Iterator[str]:
    """Behavioural probes up to the target length; the first that fails is an error."""
    types = {parameters.get("rope_type", "default") for parameters in rope_groups(loaded.config).values()}
    fixed = "dynamic" not in types and all(
        table.short_inv_freq is None for table in reference_tables(loaded.config).values()
    )
    if not fixed:
        yield "frequencies follow the sequence's length: shifted positions and cached decoding differ by design"
    ids = probe_ids(load_tokenizer(loaded.tokenizer))
    for probe in probe_model(loaded.model, ids, loaded.original_length, loaded.target_length, fixed=fixed):
        if not probe.holds:
            raise ArtefactError(
                f"the model does not behave as one with working positions ({probe.name})",
                where=str(folder),
                got=probe.figure,
                expected=probe.accepted,
            )
        yield probe.line()
