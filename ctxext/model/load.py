"""Load a model from the hub, a folder or a GGUF file, with its config extended before any weight is read."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from ctxext.errors import ArtefactError, CtxextError, UnsupportedModelError, UsageError, first_line, unknown_name
from ctxext.files import fingerprint, safe_join, sha256_bytes, shipped_directory
from ctxext.model.package import joined_file
from ctxext.rope.families import text_config

_PACKAGE_PREFIX = "package:"
_RECIPES_PREFIX = "recipes:"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json")
_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, resolved.

    Attributes:
        name: as the user wrote it; goes into artefacts, so that they name no path of this machine for packages.
        location: hub id or folder that transformers reads.
        gguf_file: file name inside `location` when the weights are a GGUF file.
        revision: hub revision.
    """

    name: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `from_pretrained`."""
        arguments: dict[str, Any] = {"trust_remote_code": False}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        if self.revision:
            arguments["revision"] = self.revision
        return arguments


def resolve_source(name: str, revision: str | None = None) -> ModelSource:
    """Find what `name` means: `recipes:NAME`, `package:NAME/FILE`, a GGUF file, a folder, or else a hub id.

    Raises:
        ArtefactError: the package or file is not there.
        UsageError: no model of that name ships with ctxext.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a NUL
        raise ArtefactError(f"not the name of a model ({first_line(error)})", where=name[:80]) from error
    if name.startswith(_RECIPES_PREFIX):
        path = _shipped_model(name)
    elif name.startswith(_PACKAGE_PREFIX):
        path = _package_file(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ArtefactError("GGUF file not found", where=name)
        return ModelSource(name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ArtefactError("the folder holds no config.json, so it is not a model", where=name)
        return ModelSource(name, str(path), revision=None)
    if name.startswith((_PACKAGE_PREFIX, "/", "./", "../", "~")) or name.count("/") > 1 or path.is_file():
        raise ArtefactError(
            "model not found",
            where=name,
            expected="a hub id, a folder with config.json, a .gguf file, package:NAME/FILE or recipes:NAME",
        )
    return ModelSource(name, name, revision=revision)


def short_name(source: str) -> str:
    """The last part of a source's name, fit for file names and titles: `recipes:tiny` is `tiny`."""
    plain = source.removeprefix(_PACKAGE_PREFIX).removeprefix(_RECIPES_PREFIX)
    return plain.rstrip("/").split("/")[-1].removesuffix(".gguf")


def _shipped_model(name: str) -> Path:
    """The folder of a model that ships with ctxext, in a wheel or in a source checkout."""
    recipes = shipped_directory("recipes")
    path = safe_join(recipes, name.removeprefix(_RECIPES_PREFIX))
    if not (path / "config.json").is_file():
        models = [found.parent.name for found in recipes.glob("*/config.json")]
        raise unknown_name("shipped model", name.removeprefix(_RECIPES_PREFIX), models)
    return path


def _package_file(name: str) -> Path:
    package, separator, inside = name.removeprefix(_PACKAGE_PREFIX).partition("/")
    if not separator or not inside:
        raise ArtefactError("a package source has the form package:NAME/FILE", where="model.source", got=name)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ArtefactError(
            "the Python package is not installed",
            where=name,
            got=package,
            hint=f"Install the distribution that provides '{package}'.",
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / inside).resolve()
    if path.is_relative_to(root) and not path.exists():
        path = joined_file(package, inside) or path
        if path.exists():
            return path
    if not path.is_relative_to(root) or not path.exists():
        raise ArtefactError("the package holds no such file", where=name, got=inside)
    return path


def weights_fingerprint(source: ModelSource, config: PreTrainedConfig) -> str:
    """Tells whether stored results still belong to these weights.

    Local files: names, sizes and a checksum of both ends of each (reading all of a 100 GB model would take minutes).
    Hub ids: the commit that the config came from.
    """
    folder = Path(source.location)
    if not folder.is_dir():
        return fingerprint([source.location, getattr(config, "_commit_hash", None) or source.revision])
    names = (
        [source.gguf_file] if source.gguf_file else [p.name for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES]
    )
    return fingerprint([_ends_of(folder / name) for name in sorted(names)])


def _ends_of(path: Path) -> list[str | int]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_SAMPLED_BYTES)
        stream.seek(max(size - _SAMPLED_BYTES, 0))
        return [path.name, size, sha256_bytes(start + stream.read(_SAMPLED_BYTES))]


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's config alone; no weights.

    Raises:
        ArtefactError: not reachable or not readable.
        UnsupportedModelError: it asks for code from the model's repository.
    """
    return plain_config(_read_config(source, _changed_at(source)))


def _changed_at(source: ModelSource) -> int | None:
    """When the file that holds the config was written; None on the hub."""
    path = Path(source.location, source.gguf_file or "config.json")
    return path.stat().st_mtime_ns if path.is_file() else None


# Reading a GGUF file's config takes seconds, for its vocabulary is read on the way, and a plan asks many times.
@lru_cache(maxsize=4)
def _read_config(source: ModelSource, changed_at: int | None) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.location, **source.arguments())
    except CtxextError:
        raise
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                "the model brings its own Python code, which ctxext does not run",
                where=source.name,
                hint="Use a model that transformers supports natively.",
            ) from error
        raise ArtefactError(f"could not read the model's config ({first_line(error)})", where=source.name) from error
    except Exception as error:  # transformers raises OSError, KeyError, struct errors ... for one thing: unreadable
        raise ArtefactError(
            f"could not read the model's config ({first_line(error)})",
            where=source.name,
            hint="Check the name, and the connection to the hub if it is a hub id.",
        ) from error
    return config


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without traces of the container that the weights came in (GGUF quantisation, machine paths)."""
    plain = copy.deepcopy(config)
    if _is_gguf(plain):
        del plain.quantization_config
    for attribute in ("_model_name_or_path",):
        plain.__dict__.pop(attribute, None)
    plain.name_or_path = ""
    return plain


def _is_gguf(config: PreTrainedConfig) -> bool:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method)) == "gguf"


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ArtefactError: missing or unreadable.
    """
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.location, **source.arguments())
    except Exception as error:  # as in load_config
        raise ArtefactError(f"could not read the model's tokenizer ({first_line(error)})", where=source.name) from error
    return tokenizer


def model_class(config: PreTrainedConfig) -> Any:
    """transformers' class of a causal language model.

    Raises:
        UnsupportedModelError: it has none for this config.
    """
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise UnsupportedModelError(
            "transformers has no causal language model of this kind", where=str(getattr(config, "model_type", "model"))
        ) from error
    return found[0] if isinstance(found, tuple) else found


def plain_attention(config: PreTrainedConfig) -> str:
    """The attention that computes a model right and as fast as transformers can: `sdpa`, or `eager` where it must be.

    PyTorch's has no soft cap and no sinks, and transformers refuses to load such models with it.
    """
    return "sdpa" if model_class(config)._supports_sdpa else "eager"


def load_model(
    source: ModelSource,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    quantisation: Any = None,
) -> PreTrainedModel:
    """Build the model from `config` (extended or not) and the source's weights, on `device`, in eval mode.

    Rotary frequencies stay float32 whatever `dtype` is. The config is copied, because loading mutates it.

    Args:
        attention: transformers' name of it; `plain_attention` when left out.
        device_map: spreads a model that is too large for `device`, as transformers' `from_pretrained` takes it; what no
            device has room for goes to disk, into a folder that is removed with the model.
        quantisation: transformers' config of how the weights are quantised while they are read onto `device`.

    Raises:
        ArtefactError: weights missing, truncated, or not all used.
    """
    try:
        with quiet(), _offload_folder(device_map) as (spread, keep):
            if quantisation is not None:
                spread |= {"quantization_config": quantisation, "device_map": {"": device}}
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.location,
                config=copy.deepcopy(config),
                dtype=dtype,
                attn_implementation=attention or plain_attention(config),
                output_loading_info=True,
                **spread,
                **source.arguments(),
            )
            keep(loaded[0])
    except CtxextError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors, OSError, RuntimeError ... for one thing: the weights cannot be read
        raise ArtefactError(f"could not load the model's weights ({first_line(error)})", where=source.name) from error
    model, report = loaded
    tied = bool(getattr(text_config(config), "tie_word_embeddings", False))
    missing = sorted(key for key in report["missing_keys"] if not (tied and key == "lm_head.weight"))
    if missing:
        raise ArtefactError(
            "the checkpoint lacks weights that the model needs",
            where=source.name,
            got=", ".join(missing[:3]),
        )
    if source.gguf_file:
        _forget_gguf(model)
    if device_map is None and quantisation is None:
        model.to(device)
    model.eval()
    ready: PreTrainedModel = model
    return ready


@contextmanager
def _offload_folder(device_map: Any) -> Iterator[tuple[dict[str, Any], Callable[[Any], None]]]:
    """Arguments of `from_pretrained` for a device map, and what ties the folder's life to the loaded model's."""
    if device_map is None:
        yield {}, lambda model: None
        return
    folder = tempfile.mkdtemp(prefix="ctxext-offload-")

    def keep(model: Any) -> None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)

    try:
        yield {"device_map": device_map, "offload_folder": folder}, keep
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _forget_gguf(model: PreTrainedModel) -> None:
    # The weights are dequantised already, yet transformers marks the model as quantised and refuses to save it.
    model.config = plain_config(model.config)
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if attribute in model.__dict__:
            delattr(model, attribute)


def choose_device() -> torch.device:
    """The accelerator that PyTorch sees, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(accelerator.type) if accelerator is not None else torch.device("cpu")


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a CUDA device that has it, float32 elsewhere (CPUs emulate bfloat16, mostly slowly).

    Raises:
        UsageError: an unknown name.
    """
    if asked == "float32":
        return torch.float32
    if asked == "bfloat16":
        return torch.bfloat16
    if asked != "auto":
        raise UsageError("unknown dtype", where="--dtype", got=asked, expected="auto, float32 or bfloat16")
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and peft's progress bars and warnings; what matters is checked and raised."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():  # GGUF conversion has a bar of its own
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
