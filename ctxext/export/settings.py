"""The same extension as settings of another program: flags, YAML lines or Python for the *unpatched* base model.

Every program is asked for in its own words, from what its source says it does with them (`SOURCES`). Where a program's
settings cannot express an extension, that is said with the reason instead of printing something close to it.
"""

from __future__ import annotations

import datetime
import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from ctxext.errors import UsageError, unknown_name

_CHECKED = datetime.date(2026, 11, 22)


@dataclass(frozen=True)
class Source:
    """Where a program's behaviour was read: address, version, day."""

    url: str
    version: str
    checked: datetime.date = _CHECKED


SOURCES: dict[str, Source] = {
    "vllm": Source("https://docs.vllm.ai/en/stable/features/context_extension/", "0.32.0"),
    "sglang": Source(
        "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/layers/rotary_embedding/factory.py",
        "0.5.23",
    ),
    "llamacpp": Source("https://github.com/ggml-org/llama.cpp/blob/b11434/src/llama-context.cpp", "b11434"),
    "axolotl": Source(
        "https://github.com/axolotl-ai-cloud/axolotl/blob/v0.19.0/src/axolotl/loaders/utils.py", "0.19.0"
    ),
    "llamafactory": Source(
        "https://github.com/hiyouga/LLaMA-Factory/blob/v0.9.5/src/llamafactory/model/model_utils/rope.py", "0.9.5"
    ),
    "transformers": Source(
        "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_rope_utils.py", "5.23.0"
    ),
}


@dataclass(frozen=True)
class Settings:
    """What to write into another program.

    Attributes:
        program: its key in `SOURCES`.
        kind: `flags` of a command line, `yaml` lines or `python`.
        text: the settings, ready to paste.
        notes: what to mind.
        source: where the program's behaviour was read.
    """

    program: str
    kind: Literal["flags", "yaml", "python"]
    text: str
    notes: tuple[str, ...]
    source: Source


def settings_lines(settings: Settings) -> list[str]:
    """The settings as they are pasted, then what to mind and where it was read."""
    return [
        *settings.text.splitlines(),
        "",
        *(f"- {note}" for note in settings.notes),
        f"source: {settings.source.url} ({settings.source.version}, checked {settings.source.checked.isoformat()})",
    ]


class SettingsRefusedError(UsageError):
    """A program whose settings cannot express the extension; `reason` says why."""

    def __init__(self, program: str, reason: str, *, hint: str | None = None) -> None:
        self.program = program
        self.reason = reason
        super().__init__(
            f"{program} cannot be given this extension by its settings: {reason}", where="--for", hint=hint
        )


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `settings_for`, with what several programs ask about them."""

    parameters: dict[str, Any]
    original_length: int
    target_length: int
    base_theta: float

    @property
    def nested(self) -> bool:
        return any(isinstance(value, Mapping) for value in self.parameters.values())

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The RoPE dict of every group of layers that rotates."""
        if not self.nested:
            return [self.parameters]
        return [dict(value) for value in self.parameters.values() if isinstance(value, Mapping)]

    def uses(self, rope_type: str) -> bool:
        return any(group.get("rope_type", "default") == rope_type for group in self.groups)

    def rewritten(self, rewrite: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """The RoPE dict with every group's dict rewritten."""
        if not self.nested:
            return rewrite(dict(self.parameters))
        return {
            key: rewrite(dict(value)) if isinstance(value, Mapping) else value for key, value in self.parameters.items()
        }


def settings_for(
    program: str,
    extended_rope_parameters: Mapping[str, Any],
    original_length: int,
    target_length: int,
    base_theta: float,
) -> Settings:
    """The settings that give `program` this extension of an unpatched base model.

    Args:
        program: one of `SOURCES`.
        extended_rope_parameters: the extended config's `rope_parameters`, flat or one dict per layer type.
        original_length: positions the base model was trained for.
        target_length: positions the extended model reaches.
        base_theta: `rope_theta` of the base model.

    Raises:
        UsageError: unknown program.
        SettingsRefusedError: the program's settings cannot express it.
    """
    if program not in _WRITERS:
        raise unknown_name("program", program, _WRITERS, where="--for")
    return _WRITERS[program](_Wanted(dict(extended_rope_parameters), original_length, target_length, base_theta))


def _overrides(wanted: _Wanted, rewrite: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    overrides = {"rope_parameters": wanted.rewritten(rewrite), "max_position_embeddings": wanted.target_length}
    return shlex.quote(json.dumps(overrides))


def _one_range(rope: Mapping[str, Any]) -> bool:
    return rope.get("rope_type") == "longrope" and rope.get("short_factor") == rope.get("long_factor")


def _attention_factor(rope: Mapping[str, Any], wanted: _Wanted) -> float:
    """What transformers multiplies cos and sin by for this dict."""
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    rope_type = rope.get("rope_type")
    if rope_type == "yarn":
        return _default_yarn_factor(rope)
    if rope_type == "longrope":
        original = float(rope.get("original_max_position_embeddings") or wanted.original_length)
        factor = float(rope.get("factor") or wanted.target_length / original)
        return math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return 1.0


def _default_yarn_factor(rope: Mapping[str, Any]) -> float:
    return 0.1 * math.log(float(rope["factor"])) + 1.0


def _has_own_yarn_factor(rope: Mapping[str, Any]) -> bool:
    given = rope.get("attention_factor")
    return given is not None and not math.isclose(float(given), _default_yarn_factor(rope), rel_tol=1e-6)


def _with_mscale(rope: dict[str, Any], wanted: _Wanted) -> dict[str, Any]:
    """A longrope dict for vLLM and SGLang, which take the attention factor from keys of their own.

    One range is written with its original length at the maximum: SGLang looks up the wrong row for the first position
    past the original length, and vLLM limits the default context to it. The frequencies do not depend on it.
    """
    factor = _attention_factor(rope, wanted)
    rope = {**rope, "short_mscale": factor, "long_mscale": factor}
    if _one_range(rope):
        rope |= {
            "original_max_position_embeddings": wanted.target_length,
            "factor": 1.0,
            "attention_factor": factor,
        }
    return rope


def _refuse_dynamic(program: str, wanted: _Wanted, reason: str) -> None:
    if wanted.uses("dynamic"):
        raise SettingsRefusedError(program, reason, hint="Choose yarn or linear, which every program reads.")


_PORTABLE_NOTE = (
    "for the base model's own weights; a checkpoint written with --portable needs no settings, and with these its "
    "attention factor would be applied twice"
)
_MULTIMODAL_NOTE = 'a multimodal model takes both keys inside {"text_config": {...}}'


def _vllm(wanted: _Wanted) -> Settings:
    _refuse_dynamic(
        "vllm",
        wanted,
        "vLLM computes `dynamic` once, for the length max_position_embeddings, not for the length of each prompt",
    )

    def rewrite(rope: dict[str, Any]) -> dict[str, Any]:
        return _with_mscale(rope, wanted) if rope.get("rope_type") == "longrope" else rope

    notes = [
        _MULTIMODAL_NOTE,
        "vLLM up to 0.10.2 documents `rope_theta` and `rope_scaling` in place of `rope_parameters`",
    ]
    if wanted.uses("yarn") and any(_has_own_yarn_factor(rope) for rope in wanted.groups if "factor" in rope):
        notes.append("vLLM up to 0.25 ignored attention_factor (https://github.com/vllm-project/vllm/pull/48351)")
    if wanted.uses("longrope"):
        notes.append(_PORTABLE_NOTE)
    if any(rope.get("rope_type") == "longrope" and not _one_range(rope) for rope in wanted.groups):
        notes.append(
            f"once --max-model-len is above {wanted.original_length}, vLLM rotates short prompts by long_factor too"
        )
    text = f"--hf-overrides {_overrides(wanted, rewrite)} --max-model-len {wanted.target_length}"
    return Settings("vllm", "flags", text, tuple(notes), SOURCES["vllm"])


def _sglang(wanted: _Wanted) -> Settings:
    _refuse_dynamic(
        "sglang",
        wanted,
        "SGLang computes `dynamic` once, for max_position_embeddings times the factor, not for each prompt's length",
    )
    if any(rope.get("rope_type") == "longrope" and not _one_range(rope) for rope in wanted.groups):
        raise SettingsRefusedError(
            "sglang",
            "it chooses between short_factor and long_factor once per batch, so prompts change each other",
            hint="Serve with vLLM or transformers, or use one range.",
        )
    if wanted.nested:
        raise SettingsRefusedError(
            "sglang", "its models handle one RoPE per layer type each in their own way, which was not looked up"
        )

    def rewrite(rope: dict[str, Any]) -> dict[str, Any]:
        if rope.get("rope_type") == "longrope":
            return _with_mscale(rope, wanted)
        if rope.get("rope_type") == "yarn" and _has_own_yarn_factor(rope):
            # SGLang drops attention_factor and multiplies its own default by attn_factor.
            own = float(rope.pop("attention_factor"))
            return {**rope, "attn_factor": own / _default_yarn_factor(rope)}
        return rope

    notes = [_MULTIMODAL_NOTE]
    if not wanted.uses("default"):
        notes.append(
            "SGLang 0.5.23 passes no scaling to RoPE for Mixtral, Gemma, Gemma 2, OLMo, Phi and StableLM: it is ignored"
        )
    if wanted.uses("longrope"):
        notes.append(_PORTABLE_NOTE)
    text = f"--json-model-override-args {_overrides(wanted, rewrite)} --context-length {wanted.target_length}"
    return Settings("sglang", "flags", text, tuple(notes), SOURCES["sglang"])


_GGUF_HINT = "`ctxext patch`, then `ctxext export --gguf`, puts the frequencies into the file, and no flag is needed."


def _llamacpp(wanted: _Wanted) -> Settings:
    if wanted.nested:
        raise SettingsRefusedError(
            "llamacpp", "its RoPE flags cannot tell one layer type from another", hint=_GGUF_HINT
        )
    rope = wanted.parameters
    rope_type = str(rope.get("rope_type", "default"))
    flags: list[str] = []
    if rope_type in ("linear", "yarn"):
        flags += ["--rope-scaling", rope_type, "--rope-scale", _number(rope["factor"])]
    elif rope_type != "default":
        reasons = {
            "dynamic": "it has no dynamic scaling",
            "llama3": "--rope-scaling takes none, linear or yarn; Llama 3's map is read from the file alone",
            "longrope": "a map of frequencies is read from the file (rope_freqs.weight), no flag takes one",
        }
        raise SettingsRefusedError(
            "llamacpp", reasons.get(rope_type, f"--rope-scaling knows no {rope_type}"), hint=_GGUF_HINT
        )
    notes = ["for a GGUF of the base model"]
    if rope_type == "yarn":
        _refuse_yarn_extras(rope)
        flags += ["--yarn-orig-ctx", str(rope.get("original_max_position_embeddings") or wanted.original_length)]
        for key, flag, default in (("beta_fast", "--yarn-beta-fast", 32.0), ("beta_slow", "--yarn-beta-slow", 1.0)):
            if rope.get(key) is not None and float(rope[key]) != default:
                flags += [flag, _number(rope[key])]
    else:
        notes.append(
            f"llama-server caps the context at the file's context_length: add --override-kv "
            f"llama.context_length=int:{wanted.target_length} (with the file's architecture for llama)"
        )
    theta = float(rope.get("rope_theta") or wanted.base_theta)
    if theta != wanted.base_theta:
        flags += ["--rope-freq-base", _number(theta)]
    flags += ["-c", str(wanted.target_length)]
    return Settings("llamacpp", "flags", " ".join(flags), tuple(notes), SOURCES["llamacpp"])


def _refuse_yarn_extras(rope: Mapping[str, Any]) -> None:
    if _has_own_yarn_factor(rope):
        raise SettingsRefusedError(
            "llamacpp",
            "it derives YaRN's attention factor from the scale; --yarn-attn-factor and the file's key are overwritten",
            hint=_GGUF_HINT,
        )
    if not rope.get("truncate", True):
        raise SettingsRefusedError(
            "llamacpp", "it always rounds the ends of YaRN's ramp to whole dimensions (truncate)", hint=_GGUF_HINT
        )


def _number(value: Any) -> str:
    """Shortest text that reads back as the same number."""
    return repr(int(value)) if float(value).is_integer() else repr(float(value))


def _axolotl(wanted: _Wanted) -> Settings:
    _refuse_dynamic("axolotl", wanted, "frequencies that follow each sequence's length cannot be trained")
    lines = {
        "sequence_len": wanted.target_length,
        "overrides_of_model_config": {
            "max_position_embeddings": wanted.target_length,
            "rope_parameters": wanted.rewritten(lambda rope: rope),
        },
    }
    notes = (
        "axolotl sets each key on the config before the model is built; its documentation says `rope_scaling`, which "
        "in transformers 5 replaces the whole dict and loses rope_theta",
        "sequence_len may be shorter when the windows are",
    )
    return Settings("axolotl", "yaml", _yaml(lines), notes, SOURCES["axolotl"])


def _llamafactory(wanted: _Wanted) -> Settings:
    program, rope = "llamafactory", wanted.parameters
    if wanted.nested:
        raise SettingsRefusedError(program, "it writes one flat RoPE dict, and this model has one per layer type")
    rope_type = str(rope.get("rope_type", "default"))
    if rope_type == "dynamic":
        raise SettingsRefusedError(
            program,
            "it raises max_position_embeddings, which `dynamic` takes for the original length: nothing is scaled",
        )
    if rope_type not in ("linear", "yarn", "llama3"):
        raise SettingsRefusedError(
            program,
            "its rope_scaling is linear, dynamic, yarn or llama3, without theta or factors of your own",
            hint="Train on a folder that `ctxext patch` wrote: it needs no setting.",
        )
    factor = float(rope["factor"])
    length_factor = math.ceil(wanted.target_length / wanted.original_length)
    if factor != length_factor:
        raise SettingsRefusedError(
            program,
            f"it takes the factor from the lengths, rounded up to {length_factor}, and this extension's is {factor:g}",
            hint="Choose a target length that is a whole multiple of the original one.",
        )
    others = _unlike_llamafactory(rope)
    if others:
        raise SettingsRefusedError(program, f"it sets {', '.join(others)} itself, to the default value")
    notes = (
        "with transformers 4 (4.55 to 4.57): it assigns config.rope_scaling, which in transformers 5 replaces the "
        "whole dict and loses rope_theta, and a fractional max_position_embeddings",
        f"cutoff_len decides the factor; anything other than {wanted.target_length} (rounded up to a multiple of "
        f"{wanted.original_length}) gives another one, and chatting without it always gives 2",
        "its vLLM engine refuses rope_scaling",
    )
    lines = {"rope_scaling": rope_type, "cutoff_len": wanted.target_length}
    return Settings(program, "yaml", _yaml(lines), notes, SOURCES[program])


def _unlike_llamafactory(rope: Mapping[str, Any]) -> list[str]:
    """Keys whose value LLaMA-Factory would not write; it leaves out what has a default in transformers."""
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    unlike = [key for key, default in defaults.items() if rope.get(key, default) != default]
    if rope.get("rope_type") == "yarn" and _has_own_yarn_factor(rope):
        unlike.append("attention_factor")
    return unlike


def _transformers(wanted: _Wanted) -> Settings:
    dynamic = wanted.uses("dynamic")
    length = wanted.original_length if dynamic else wanted.target_length
    text = "\n".join(
        (
            "from transformers import AutoConfig, AutoModelForCausalLM",
            "",
            "config = AutoConfig.from_pretrained('MODEL')",
            "text_config = config.get_text_config()",
            f"text_config.rope_parameters = {wanted.parameters!r}",
            f"text_config.max_position_embeddings = {length}",
            "model = AutoModelForCausalLM.from_pretrained('MODEL', config=config)",
        )
    )
    notes = [
        "transformers 5; the config must be complete before the model is built, editing model.config later does nothing"
    ]
    if dynamic:
        notes.append("`dynamic` takes max_position_embeddings for the original length, so it is not raised")
    if not wanted.nested:
        scaling = {key: value for key, value in wanted.parameters.items() if key != "rope_theta"}
        older = "None" if wanted.uses("default") else repr(scaling)
        notes.append(
            f"transformers 4: text_config.rope_theta = {wanted.parameters.get('rope_theta', wanted.base_theta)!r}; "
            f"text_config.rope_scaling = {older}"
        )
    return Settings("transformers", "python", text, tuple(notes), SOURCES["transformers"])


def _yaml(lines: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(lines), sort_keys=False, default_flow_style=None, width=100)
    return text.rstrip("\n")


_WRITERS: dict[str, Callable[[_Wanted], Settings]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llamacpp": _llamacpp,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "transformers": _transformers,
}
