"""Who else will read this checkpoint's positions right? Answered from its config alone, nothing is run.

Programs compute RoPE with code of their own: several ignore the newer config form, drop an explicit attention factor,
or take a per-dimension map for something else, all without a word. What each does is dated data with a source
(`portability_rules.yaml`); this module reads the facts that the rules ask about out of a `config.json` and looks up the
first rule that fits. What nobody looked up is `unknown`, never a guess.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from rich.markup import escape
from rich.table import Table

from ctxext.errors import ArtefactError, UnsupportedModelError
from ctxext.export.settings import SettingsRefusedError, settings_for

Form = Literal[
    "default",
    "linear",
    "dynamic",
    "yarn",
    "llama3",
    "longrope-portable",
    "longrope-one-range",
    "longrope-two-ranges",
    "other",
]
AttentionFactor = Literal["derived", "own"]
Verdict = Literal["right", "wrong", "unknown"]
Evidence = Literal["measured", "source", "thread"]
Reader = Literal["transformers5", "transformers4", "vllm", "sglang", "llamacpp", "mlx", "exllama"]

_FLAT_TYPES: tuple[Form, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
# transformers reads float32 from JSON text; what agrees to this does not differ in any reader.
_SAME_FACTOR = 1e-6


@dataclass(frozen=True)
class RopeFacts:
    """What the rules ask about a config.

    Attributes:
        model_type: of the language model's part.
        form: rope type; `longrope` split by whether it has one range or two, and one range by whether every reader
            derives the attention factor 1 for it (`longrope-portable`).
        nested: one RoPE per layer type. The other facts are then those of the layers that are scaled.
        newer_form: `rope_parameters` is there (transformers 5).
        older_form: top-level `rope_theta` (and `rope_scaling` when scaled) is there (transformers 4, mlx-lm).
        attention_factor: `own` when cos and sin are multiplied by something that a reader which ignores
            `attention_factor` would not derive from the other keys.
        attention_factor_written: the key is there, whatever it says.
        factor_written: the key `factor` is there.
        carries_mscale: `short_mscale` and `long_mscale` say the attention factor too (vLLM's and SGLang's names).
        truncate: the ends of YaRN's ramp are rounded to whole dimensions.
        length_raised: `max_position_embeddings` is above the original length.
        length_is_product: `max_position_embeddings` is the original length times the factor.
        top_level_original: `original_max_position_embeddings` stands outside the RoPE dict as well.
        partial_rotary: only a part of each head is rotated.
        partial_top_level: that part is (also) said outside the RoPE dict.
        head_dim_written: `head_dim` is there, so that no reader meets None.
    """

    model_type: str
    form: Form
    nested: bool
    newer_form: bool
    older_form: bool
    attention_factor: AttentionFactor
    attention_factor_written: bool
    factor_written: bool
    carries_mscale: bool
    truncate: bool
    length_raised: bool
    length_is_product: bool
    top_level_original: bool
    partial_rotary: bool
    partial_top_level: bool
    head_dim_written: bool


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _https(value: str) -> str:
    if not value.startswith("https://"):
        raise ValueError(f"a source is an https address, not {value!r}")
    return value


class Condition(_Strict):
    """Which configs a rule speaks of: every field that is given must fit; a list means any of these."""

    model_type: list[str] | None = None
    not_model_type: list[str] | None = None
    form: list[Form] | None = None
    nested: bool | None = None
    newer_form: bool | None = None
    older_form: bool | None = None
    attention_factor: AttentionFactor | None = None
    attention_factor_written: bool | None = None
    factor_written: bool | None = None
    carries_mscale: bool | None = None
    truncate: bool | None = None
    length_raised: bool | None = None
    length_is_product: bool | None = None
    top_level_original: bool | None = None
    partial_rotary: bool | None = None
    partial_top_level: bool | None = None
    head_dim_written: bool | None = None

    def fits(self, facts: RopeFacts) -> bool:
        """Whether `facts` fulfil everything that is given."""
        for name in type(self).model_fields:
            wanted = getattr(self, name)
            if wanted is None:
                continue
            if name == "not_model_type":
                if facts.model_type in wanted:
                    return False
                continue
            fact = getattr(facts, name)
            if fact not in wanted if isinstance(wanted, list) else fact != wanted:
                return False
        return True


class Rule(_Strict):
    """What one reader does with the configs that fit `when`.

    Attributes:
        since: the oldest version seen to do so; None when only the checked one was looked at.
        until: the newest version seen to do so, for what a later version does otherwise; None for what holds today.
        consequence: what happens, where it is not simply right.
        instead: what to do about it.
        source: where it can be read.
        checked: the day it was looked up.
        evidence: `measured` (the reader was run), `source` (its code was read), `thread` (said in an issue or PR).
    """

    reader: Reader
    when: Condition
    verdict: Verdict
    since: str | None = None
    until: str | None = None
    consequence: str | None = None
    instead: str | None = None
    source: Annotated[str, AfterValidator(_https)]
    checked: datetime.date
    evidence: Evidence


class ReaderInfo(_Strict):
    """A program that reads checkpoints: its name, the version that was looked at, its rope code."""

    name: str
    version: str
    source: Annotated[str, AfterValidator(_https)]
    checked: datetime.date
    adapter_note: str | None = None


class RuleBook(_Strict):
    """Everything that `portability_rules.yaml` says."""

    readers: dict[Reader, ReaderInfo]
    rules: list[Rule] = Field(min_length=1)


@dataclass(frozen=True)
class PortabilityVerdict:
    """One reader's line.

    Attributes:
        reader, name: its key and its name for people.
        version: the version that the verdict is about.
        verdict: `right`, `wrong` or `unknown`.
        since: the oldest version known to do so, None when only `version` was looked at.
        consequence: what happens where it is not right, or what to mind where it is.
        instead: what to do.
        evidence, source, checked: how it is known, where it can be read, when that was looked up.
        adapter_flags: what the reader needs to serve the unmerged adapter over its unpatched base; None: it cannot.
        adapter_note: why not, or what else that takes.
        older: what older versions did otherwise.
    """

    reader: str
    name: str
    version: str
    verdict: Verdict
    since: str | None
    consequence: str | None
    instead: str | None
    evidence: Evidence | None
    source: str
    checked: datetime.date
    adapter_flags: str | None
    adapter_note: str | None
    older: tuple[Rule, ...]


@cache
def load_rules() -> RuleBook:
    """The rules that ship with ctxext, validated."""
    text = resources.files("ctxext.export").joinpath("portability_rules.yaml").read_text(encoding="utf-8")
    return RuleBook.model_validate(yaml.safe_load(text))


def portability(config_json: Mapping[str, Any], *, adapter_rank: int | None = None) -> list[PortabilityVerdict]:
    """One verdict per reader for a checkpoint with this `config.json`; nothing is run or loaded.

    Args:
        config_json: the parsed file; of a multimodal model its text part is looked at.
        adapter_rank: LoRA rank for the flags that serve an unmerged adapter; `RANK` stands there when left out.

    Raises:
        UnsupportedModelError: the config shows no RoPE.
        ArtefactError: its older and its newer form contradict each other.
    """
    book, facts = load_rules(), rope_facts(config_json)
    verdicts = []
    for reader, info in book.readers.items():
        fitting = [rule for rule in book.rules if rule.reader == reader and rule.when.fits(facts)]
        rule = next((rule for rule in fitting if rule.until is None), None)
        flags, note = _adapter_flags(reader, info, config_json, facts, adapter_rank)
        verdicts.append(
            PortabilityVerdict(
                reader=reader,
                name=info.name,
                version=info.version,
                verdict=rule.verdict if rule else "unknown",
                since=rule.since if rule else None,
                consequence=rule.consequence if rule else "nobody has looked up this combination",
                instead=rule.instead
                if rule
                else "compare its log-probabilities with transformers before relying on it",
                evidence=rule.evidence if rule else None,
                source=rule.source if rule else info.source,
                checked=rule.checked if rule else info.checked,
                adapter_flags=flags,
                adapter_note=note,
                older=tuple(rule for rule in fitting if rule.until is not None),
            )
        )
    return verdicts


def rope_facts(config_json: Mapping[str, Any]) -> RopeFacts:
    """What the rules ask about, read out of a parsed `config.json`.

    Raises:
        UnsupportedModelError: the config shows no RoPE.
        ArtefactError: its older and its newer form contradict each other.
    """
    config = _text_part(config_json)
    newer = config.get("rope_parameters") or None
    groups = _groups(newer) if newer else {}
    nested = None not in groups and bool(groups)
    rope = _scaled_group(groups) if groups else _from_older_form(config)
    form, attention = _form_and_attention(rope, config, mixed=len(_distinct_scaled(groups)) > 1)
    original = _original_length(rope, config)
    longest, factor = config.get("max_position_embeddings"), rope.get("factor")
    older = _has_older_form(config, rope)
    if newer and older:
        _check_forms_agree(config, rope)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct", 1.0)))
    return RopeFacts(
        model_type=str(config.get("model_type", "unknown")),
        form=form,
        nested=nested,
        newer_form=newer is not None,
        older_form=older,
        attention_factor=attention,
        attention_factor_written=rope.get("attention_factor") is not None,
        factor_written=factor is not None,
        carries_mscale=_carries_mscale(rope, config),
        truncate=bool(rope.get("truncate", True)),
        length_raised=_is_number(longest) and _is_number(original) and longest > original,
        length_is_product=all(map(_is_number, (longest, original, factor)))
        and math.isclose(float(longest or 0), float(original) * float(factor or 0), rel_tol=_SAME_FACTOR),
        top_level_original=config.get("original_max_position_embeddings") is not None,
        partial_rotary=_is_number(partial) and partial != 1.0,
        partial_top_level=any(key in config for key in ("partial_rotary_factor", "rotary_pct")),
        head_dim_written=isinstance(config.get("head_dim"), int),
    )


def _carries_mscale(rope: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    factor = _attention_factor(rope, config)
    return all(
        _is_number(value) and math.isclose(float(value or 0), factor, rel_tol=_SAME_FACTOR)
        for value in (rope.get("short_mscale"), rope.get("long_mscale"))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text_part(config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config_json.get("text_config")
    return text if isinstance(text, Mapping) else config_json


def _groups(parameters: Mapping[str, Any]) -> dict[str | None, dict[str, Any]]:
    """RoPE dicts by layer type; the key None for a flat one. NoPE layers (None) are left out."""
    nested: dict[str | None, dict[str, Any]] = {
        str(key): dict(value) for key, value in parameters.items() if isinstance(value, Mapping)
    }
    return nested or {None: dict(parameters)}


def _distinct_scaled(groups: Mapping[str | None, dict[str, Any]]) -> list[dict[str, Any]]:
    distinct: list[dict[str, Any]] = []
    for group in groups.values():
        if _rope_type(group) != "default" and group not in distinct:
            distinct.append(group)
    return distinct


def _scaled_group(groups: Mapping[str | None, dict[str, Any]]) -> dict[str, Any]:
    scaled = _distinct_scaled(groups)
    return scaled[0] if scaled else groups.get("full_attention", next(iter(groups.values())))


def _rope_type(rope: Mapping[str, Any]) -> str:
    name = str(rope.get("rope_type", rope.get("type", "default")))
    return "longrope" if name == "su" else name


def _from_older_form(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling")
    theta = config.get("rope_theta", config.get("rotary_emb_base"))
    if scaling is None and theta is None:
        raise UnsupportedModelError(
            "the config shows no rotary positions, so there is nothing that another program could misread",
            where=f"{config.get('model_type', 'config.json')}.rope_parameters",
        )
    return {**(dict(scaling) if isinstance(scaling, Mapping) else {}), "rope_theta": theta}


def _has_older_form(config: Mapping[str, Any], rope: Mapping[str, Any]) -> bool:
    if config.get("rope_theta", config.get("rotary_emb_base")) is None:
        return False
    return _rope_type(rope) == "default" or isinstance(config.get("rope_scaling"), Mapping)


def _check_forms_agree(config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    scaling = dict(config.get("rope_scaling") or {})
    older = {**scaling, "rope_theta": config.get("rope_theta", config.get("rotary_emb_base"))}
    if _rope_type(older) != _rope_type(rope):
        different = ["rope_type"]
    else:
        different = [key for key in sorted(set(older) & set(rope)) if key != "type" and older[key] != rope[key]]
    if different:
        key = different[0]
        raise ArtefactError(
            "the two forms of the RoPE config contradict each other, so old and new readers rotate differently",
            where=f"config.json: {key}",
            got=f"rope_parameters {rope.get(key)!r}, rope_theta and rope_scaling {older.get(key)!r}",
            hint="Write the checkpoint again with ctxext.",
        )


def _original_length(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    # transformers gives the top-level key priority (Phi-3).
    return config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")


def _derived_attention_factor(rope: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """What a reader that knows no `attention_factor` multiplies cos and sin by."""
    if _rope_type(rope) == "yarn":
        factor = float(rope.get("factor") or 1.0)
        return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    if _rope_type(rope) == "longrope":
        original = float(_original_length(rope, config) or config.get("max_position_embeddings") or 1)
        ratio = float(config.get("max_position_embeddings") or original) / original
        return math.sqrt(1.0 + math.log(ratio) / math.log(original)) if ratio > 1.0 else 1.0
    return 1.0


def _attention_factor(rope: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """What transformers 5, whose reading is the meaning of a config, multiplies cos and sin by."""
    given = rope.get("attention_factor")
    if _rope_type(rope) not in ("yarn", "longrope"):
        return 1.0
    if given is not None:
        return float(given)
    if _rope_type(rope) == "longrope" and rope.get("factor") is not None:
        factor, original = float(rope["factor"]), float(_original_length(rope, config) or 1)
        return math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 and original > 1.0 else 1.0
    return _derived_attention_factor(rope, config)


def _form_and_attention(
    rope: Mapping[str, Any], config: Mapping[str, Any], *, mixed: bool
) -> tuple[Form, AttentionFactor]:
    factor = _attention_factor(rope, config)
    own = not math.isclose(factor, _derived_attention_factor(rope, config), rel_tol=_SAME_FACTOR)
    attention: AttentionFactor = "own" if own else "derived"
    rope_type = _rope_type(rope)
    # A softmax temperature of its own (mscale: multi-head latent attention) and multimodal sections are other stories.
    if mixed or any(rope.get(key) for key in ("mscale", "mscale_all_dim", "mrope_section", "llama_4_scaling_beta")):
        return "other", attention
    if rope_type == "longrope":
        if rope.get("short_factor") != rope.get("long_factor"):
            return "longrope-two-ranges", attention
        raised = float(config.get("max_position_embeddings") or 0) > float(_original_length(rope, config) or 0)
        portable = not raised and math.isclose(factor, 1.0, rel_tol=_SAME_FACTOR)
        return ("longrope-portable" if portable else "longrope-one-range"), attention
    return next((form for form in _FLAT_TYPES if form == rope_type), "other"), attention


# How to load an adapter over its unpatched base. transformers takes the extended config from the adapter's own folder;
# the other readers take it as settings (their name in `settings_for`), followed by what loads the adapter.
_FROM_ADAPTER_FOLDER = (
    "model = AutoModelForCausalLM.from_pretrained('BASE', config=AutoConfig.from_pretrained('ADAPTER'))\n"
    "model = PeftModel.from_pretrained(model, 'ADAPTER')"
)
_LORA_FLAGS = {
    "vllm": "--enable-lora --max-lora-rank {rank} --lora-modules NAME=ADAPTER",
    "sglang": "--enable-lora --max-lora-rank {rank} --lora-paths NAME=ADAPTER",
    "llamacpp": "--lora ADAPTER.gguf",
}
_FOLDED_NOTE = "of a merged portable checkpoint this leaves out the attention factor that its weights may carry"


def _adapter_flags(
    reader: str, info: ReaderInfo, config_json: Mapping[str, Any], facts: RopeFacts, rank: int | None
) -> tuple[str | None, str | None]:
    notes = [info.adapter_note] if info.adapter_note else []
    if reader.startswith("transformers"):
        return _FROM_ADAPTER_FOLDER, "; ".join(notes) or None
    if reader not in _LORA_FLAGS:
        return None, "; ".join(notes) or None
    config = _text_part(config_json)
    rope = config.get("rope_parameters") or _from_older_form(config)
    group = _scaled_group(_groups(rope))
    longest = int(config.get("max_position_embeddings") or 0)
    original, theta = int(_original_length(group, config) or longest), float(group.get("rope_theta") or 10_000.0)
    try:
        settings = settings_for(reader, rope, original_length=original, target_length=longest, base_theta=theta)
    except SettingsRefusedError as refusal:
        return None, refusal.reason
    if facts.form == "longrope-portable":
        notes.append(_FOLDED_NOTE)
    if facts.form == "default" and reader == "llamacpp":
        # The base's own theta is not in this config, so the new one is always said.
        return f"--rope-freq-base {theta!r} {settings.text} {_LORA_FLAGS[reader]}", "; ".join(notes) or None
    return f"{settings.text} {_LORA_FLAGS[reader].format(rank=rank or 'RANK')}", "; ".join(notes) or None


def portability_lines(verdicts: list[PortabilityVerdict], *, adapter: bool = False) -> list[str]:
    """Plain lines for a log or a model card; with `adapter`, the flags that serve the unmerged adapter as well."""
    lines = []
    for item in verdicts:
        lines.append(f"{item.name} {item.version}: {item.verdict} ({_how_known(item)})")
        lines += [f"  {text}" for text in (item.consequence, item.instead) if text]
        lines += [f"  until {rule.until}: {rule.verdict}, {rule.consequence} ({rule.source})" for rule in item.older]
        lines.append(f"  source: {item.source} (checked {item.checked.isoformat()})")
        if adapter:
            text = item.adapter_flags or "no flags"
            lines += [
                f"  unmerged adapter: {line}" if index == 0 else f"    {line}"
                for index, line in enumerate(text.splitlines())
            ]
            lines += [f"    {item.adapter_note}"] if item.adapter_note else []
    return lines


def portability_table(verdicts: list[PortabilityVerdict]) -> Table:
    """The same for the terminal: reader, verdict, since when, what to mind."""
    table = Table(title="who reads these positions right", title_justify="left")
    table.add_column("reader", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("known by")
    table.add_column("what to mind", overflow="fold")
    colours = {"right": "green", "wrong": "red", "unknown": "yellow"}
    for item in verdicts:
        notes = [text for text in (item.consequence, item.instead) if text]
        notes += [f"until {rule.until}: {rule.verdict}, {rule.consequence}" for rule in item.older]
        table.add_row(
            f"{escape(item.name)} {escape(item.version)}",
            f"[{colours[item.verdict]}]{item.verdict}[/]",
            escape(_how_known(item)),
            escape(". ".join(notes)),
        )
    return table


def _how_known(item: PortabilityVerdict) -> str:
    if item.evidence is None:
        return "not looked up"
    words = {"measured": "measured", "source": "its source", "thread": "its issues"}[item.evidence]
    return f"{words}, since {item.since}" if item.since else words
