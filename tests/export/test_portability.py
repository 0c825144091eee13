"""Portability verdicts agree with what the readers showed; the rules are dated, sourced and can all be reached."""

from __future__ import annotations

import copy
import datetime
import json
import math
import shlex
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from rich.console import Console

from ctxext.errors import ArtefactError, UnsupportedModelError
from ctxext.export.portability import (
    Form,
    PortabilityVerdict,
    Reader,
    Rule,
    load_rules,
    portability,
    portability_lines,
    portability_table,
    rope_facts,
)

ORIGINAL, TARGET, THETA = 4096, 16384, 10_000.0
FACTORS, SHORT = [1.0, 2.0, 3.0, 4.0], [1.0, 1.5, 2.0, 2.5]
FULL = {"rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ONE_RANGE = {"rope_type": "longrope", "rope_theta": THETA, "short_factor": FACTORS, "long_factor": FACTORS}
MAP = {**ONE_RANGE, "factor": 1.0, "original_max_position_embeddings": TARGET}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 80_000.0},
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
    "dynamic, length raised": {"rope_type": "dynamic", **FULL},
    "yarn": {"rope_type": "yarn", **FULL},
    "yarn, own attention factor": {"rope_type": "yarn", **FULL, "attention_factor": 1.0},
    "yarn, not truncated": {"rope_type": "yarn", **FULL, "truncate": False},
    "llama3": {"rope_type": "llama3", **FULL, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "one range, raised": {**ONE_RANGE, "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.2},
    "map": {**MAP, "attention_factor": 1.2},
    "map with mscale": {**MAP, "attention_factor": 1.2, "short_mscale": 1.2, "long_mscale": 1.2},
    "portable": MAP,
    "two ranges": {**ONE_RANGE, "short_factor": SHORT, "original_max_position_embeddings": ORIGINAL},
}


def config(name: str, *, both_forms: bool = True, model_type: str = "llama", **more: Any) -> dict[str, Any]:
    """A config.json with the named RoPE."""
    rope = copy.deepcopy(ROPES[name])
    result = {"model_type": model_type, "max_position_embeddings": TARGET, "head_dim": 8, "rope_parameters": rope}
    if both_forms:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        result |= {"rope_theta": rope["rope_theta"]}
        result["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    return {**result, **more}


def by_reader(config_json: dict[str, Any], **arguments: Any) -> dict[str, PortabilityVerdict]:
    return {item.reader: item for item in portability(config_json, **arguments)}


def verdicts(config_json: dict[str, Any]) -> dict[str, str]:
    return {reader: item.verdict for reader, item in by_reader(config_json).items()}


# Readers run for real on a Llama (SmolLM2): a prompt beyond the original length against transformers 5.
MEASURED = {
    "default": {"transformers4": "right", "llamacpp": "right", "vllm": "right", "mlx": "right"},
    "linear": {"transformers4": "right", "llamacpp": "right", "vllm": "right", "mlx": "right"},
    "yarn": {"transformers4": "right", "llamacpp": "right", "vllm": "right", "mlx": "right"},
    "map": {"transformers4": "right", "llamacpp": "wrong", "vllm": "wrong", "mlx": "wrong"},
    "map with mscale": {"vllm": "right"},
    "portable": {"transformers4": "right", "vllm": "right", "mlx": "right"},
    "yarn, own attention factor": {"llamacpp": "wrong", "vllm": "right", "mlx": "wrong"},
}


@pytest.mark.parametrize("name", MEASURED)
def test_verdicts_agree_with_what_the_readers_showed(name: str) -> None:
    found = by_reader(config(name))
    for reader, verdict in MEASURED[name].items():
        assert (found[reader].verdict, found[reader].evidence) == (verdict, "measured"), reader


READ_IN_SOURCE = {
    "default": {"sglang": "right", "exllama": "right"},
    "linear": {"sglang": "right", "exllama": "right"},
    "yarn": {"sglang": "right", "exllama": "right"},
    "yarn, own attention factor": {"sglang": "wrong", "exllama": "right", "transformers4": "right"},
    "yarn, not truncated": {
        "sglang": "right",
        "exllama": "right",
        "llamacpp": "wrong",
        "mlx": "wrong",
        "vllm": "right",
    },
    "llama3": dict.fromkeys(get_args(Reader), "right"),
    "one range, raised": {"sglang": "wrong", "exllama": "wrong"},
    "map": {"sglang": "wrong", "exllama": "wrong"},
    "map with mscale": {"sglang": "right"},
    "portable": {"sglang": "right", "exllama": "right", "llamacpp": "wrong"},
    "two ranges": {"vllm": "wrong", "sglang": "wrong", "mlx": "wrong", "exllama": "wrong", "transformers4": "wrong"},
    "dynamic, length raised": {
        **dict.fromkeys(("transformers5", "transformers4", "vllm", "sglang", "llamacpp", "mlx", "exllama"), "wrong")
    },
}


@pytest.mark.parametrize("name", READ_IN_SOURCE)
def test_verdicts_agree_with_the_readers_code(name: str) -> None:
    found = verdicts(config(name))
    assert {reader: found[reader] for reader in READ_IN_SOURCE[name]} == READ_IN_SOURCE[name]


def test_the_newer_form_alone_is_lost_on_transformers_4_and_mlx() -> None:
    found = by_reader(config("yarn", both_forms=False))
    wrong = {reader for reader, item in found.items() if item.verdict == "wrong"}
    assert wrong == {"transformers4", "mlx"}
    assert all("both forms" in str(found[reader].instead) for reader in wrong)
    assert found["exllama"].since == "0.0.17"
    assert [rule.until for rule in found["exllama"].older] == ["0.0.16"]


def test_the_older_form_alone_is_read_by_all() -> None:
    older = config("yarn")
    del older["rope_parameters"]
    assert set(verdicts(older).values()) == {"right"}


def test_an_older_version_that_was_wrong_is_named() -> None:
    found = by_reader(config("yarn, own attention factor"))["vllm"]
    assert (found.verdict, found.since) == ("right", "0.32.0")
    assert [(rule.until, rule.verdict) for rule in found.older] == [("0.25", "wrong")]


@pytest.mark.parametrize(("model_type", "reader"), [("mixtral", "mlx"), ("mixtral", "sglang"), ("stablelm", "mlx")])
def test_families_whose_scaling_is_ignored(model_type: str, reader: str) -> None:
    assert verdicts(config("yarn", model_type=model_type))[reader] == "wrong"
    assert verdicts(config("default", model_type=model_type))[reader] == "right"


def test_head_dim_left_open_stops_transformers_for_yarn() -> None:
    left_open = config("yarn", model_type="mixtral")
    del left_open["head_dim"]
    assert verdicts(left_open)["transformers5"] == "wrong"
    assert verdicts(config("yarn", model_type="mixtral"))["transformers5"] == "right"


def test_exllama_takes_the_factor_from_the_lengths() -> None:
    assert verdicts(config("yarn", max_position_embeddings=10_000))["exllama"] == "wrong"


def test_transformers_4_needs_two_ranges_original_length_outside_the_dict() -> None:
    assert verdicts(config("two ranges", original_max_position_embeddings=ORIGINAL))["transformers4"] == "right"


def test_transformers_4_needs_a_factor_for_the_portable_form() -> None:
    without = config("portable")
    for key in ("rope_parameters", "rope_scaling"):
        del without[key]["factor"]
    assert rope_facts(without).form == "longrope-portable"
    assert verdicts(without)["transformers4"] == "wrong"


def nested(model_type: str, rope: dict[str, Any], *, both_forms: bool) -> dict[str, Any]:
    groups = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": rope,
        "none": None,
    }
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    result = {"model_type": model_type, "max_position_embeddings": TARGET, "head_dim": 8, "rope_parameters": groups}
    return result | older if both_forms else result


def test_one_rope_per_layer_type() -> None:
    both = verdicts(nested("gemma3_text", ROPES["yarn"], both_forms=True))
    newer = verdicts(nested("gemma3_text", ROPES["yarn"], both_forms=False))
    assert (both["transformers4"], both["mlx"], both["exllama"], both["vllm"]) == ("right",) * 4
    assert (newer["transformers4"], newer["mlx"], newer["exllama"], newer["vllm"]) == ("wrong",) * 3 + ("right",)
    # The upstream bug: truncate is looked for outside the layer type's dict.
    assert verdicts(nested("olmo3", ROPES["yarn, not truncated"], both_forms=True))["transformers5"] == "wrong"
    assert rope_facts(nested("olmo3", ROPES["yarn"], both_forms=True)).nested


def test_a_multimodal_config_is_read_through_its_text_part() -> None:
    wrapped = {"model_type": "gemma3", "text_config": nested("gemma3_text", ROPES["yarn"], both_forms=True)}
    assert verdicts(wrapped) == verdicts(wrapped["text_config"])


def test_dynamic_with_the_length_left_alone_is_right_in_transformers_and_not_known_to_mlx() -> None:
    plain = config("dynamic, length raised", max_position_embeddings=ORIGINAL)
    found = verdicts(plain)
    assert (found["transformers5"], found["transformers4"], found["vllm"]) == ("right", "right", "wrong")
    assert found["mlx"] == "unknown"


def test_what_nobody_looked_up_is_unknown() -> None:
    found = by_reader(config("yarn", model_type="a_family_of_tomorrow"))
    assert {reader for reader, item in found.items() if item.verdict == "right"} == {"transformers5", "transformers4"}
    assert {item.verdict for reader, item in found.items() if not reader.startswith("transformers")} == {"unknown"}
    assert all(item.evidence is None for item in found.values() if item.verdict == "unknown")
    temperature = config("yarn", both_forms=False)
    temperature["rope_parameters"] |= {"mscale": 1.0, "mscale_all_dim": 0.7}
    assert rope_facts(temperature).form == "other"
    assert verdicts(temperature)["vllm"] == "unknown"


@pytest.mark.parametrize(
    ("name", "form", "attention_factor"),
    [
        ("default", "default", "derived"),
        ("yarn", "yarn", "derived"),
        ("yarn, own attention factor", "yarn", "own"),
        ("one range, raised", "longrope-one-range", "own"),
        ("map", "longrope-one-range", "own"),
        ("portable", "longrope-portable", "derived"),
        ("two ranges", "longrope-two-ranges", "derived"),
    ],
)
def test_facts(name: str, form: str, attention_factor: str) -> None:
    facts = rope_facts(config(name))
    assert (facts.form, facts.attention_factor) == (form, attention_factor)


def test_an_attention_factor_that_says_the_default_is_no_own_one() -> None:
    plain = config("yarn", both_forms=False)
    plain["rope_parameters"]["attention_factor"] = 0.1 * math.log(4.0) + 1.0
    assert rope_facts(plain).attention_factor == "derived"
    assert rope_facts(plain).attention_factor_written


def test_forms_that_contradict_each_other_are_an_error() -> None:
    for key, value in (("rope_theta", 5.0), ("rope_scaling", {"rope_type": "yarn", "factor": 2.0})):
        with pytest.raises(ArtefactError, match="contradict"):
            portability({**config("yarn"), key: value})


def test_a_config_without_rope_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no rotary positions"):
        portability({"model_type": "gpt2", "n_positions": 1024})


def test_adapter_flags_carry_this_checkpoints_numbers() -> None:
    found = by_reader(config("yarn"), adapter_rank=16)
    vllm = shlex.split(str(found["vllm"].adapter_flags))
    override = json.loads(vllm[vllm.index("--hf-overrides") + 1])
    assert override == {"rope_parameters": ROPES["yarn"], "max_position_embeddings": TARGET}
    assert vllm[vllm.index("--max-lora-rank") + 1] == "16"
    assert found["llamacpp"].adapter_flags == (
        f"--rope-scaling yarn --rope-scale 4 --yarn-orig-ctx {ORIGINAL} -c {TARGET} --lora ADAPTER.gguf"
    )
    assert "--json-model-override-args" in str(found["sglang"].adapter_flags)
    assert found["mlx"].adapter_flags is None
    assert "merge" in str(found["mlx"].adapter_note)


def test_adapter_flags_say_a_changed_theta_and_refuse_what_cannot_be_said() -> None:
    assert "--rope-freq-base 80000.0 " in str(by_reader(config("default"))["llamacpp"].adapter_flags)
    refused = by_reader(config("map"))["llamacpp"]
    assert refused.adapter_flags is None
    assert "rope_freqs" in str(refused.adapter_note)


def test_portability_leaves_its_argument_alone() -> None:
    given = config("map")
    before = copy.deepcopy(given)
    portability(given)
    assert given == before


def test_lines_and_table_name_every_reader() -> None:
    found = portability(config("yarn, own attention factor"))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(portability_table(found))
    table, lines = console.export_text(), "\n".join(portability_lines(found, adapter=True))
    for item in found:
        assert item.name in table
        assert f"{item.name} {item.version}: {item.verdict}" in lines
    assert "until 0.25: wrong" in lines


def test_rules_are_dated_and_say_what_to_do() -> None:
    book = load_rules()
    assert set(book.readers) == set(get_args(Reader))
    for rule in book.rules:
        assert datetime.date(2026, 1, 1) <= rule.checked <= datetime.date.today()
        assert rule.source.startswith("https://github.com/")
        if rule.verdict == "wrong":
            assert rule.consequence
            assert rule.instead or rule.until


def test_every_rule_can_be_reached() -> None:
    """No rule is hidden behind an earlier one of the same reader: each is the answer to some config."""
    book = load_rules()
    hidden = []
    for index, rule in enumerate(book.rules):
        if rule.until is not None:
            continue
        before = [other for other in book.rules[:index] if other.reader == rule.reader and other.until is None]
        if not any(rule.when.fits(facts) and not any(o.when.fits(facts) for o in before) for facts in all_facts()):
            hidden.append(rule.when.model_dump(exclude_none=True))
    assert hidden == []


def all_facts() -> list[Any]:
    """Facts of every form, family, way of writing and length that the rules tell apart."""
    if not _ALL_FACTS:
        families = {name for rule in load_rules().rules for name in rule.when.model_type or ["llama"]} | {"other"}
        for family in sorted(families):
            for name in ROPES:
                for both in (True, False):
                    flat = config(name, both_forms=both, model_type=family)
                    variants = [
                        flat,
                        {**flat, "max_position_embeddings": 10_000},
                        {**flat, "original_max_position_embeddings": ORIGINAL},
                        {key: value for key, value in flat.items() if key != "head_dim"},
                        {**flat, "rope_parameters": {**ROPES[name], "partial_rotary_factor": 0.5}},
                        nested(family, ROPES[name], both_forms=both),
                    ]
                    _ALL_FACTS.extend(rope_facts(variant) for variant in variants + without(flat))
    return _ALL_FACTS


_ALL_FACTS: list[Any] = []


def without(flat: dict[str, Any]) -> list[dict[str, Any]]:
    """The same config with one optional key left out of its RoPE dict."""
    shorter = []
    for key in ("factor", "attention_factor", "original_max_position_embeddings"):
        variant = copy.deepcopy(flat)
        for form in ("rope_parameters", "rope_scaling"):
            if isinstance(variant.get(form), dict):
                variant[form].pop(key, None)
        shorter.append(variant)
    return shorter


def test_every_form_has_a_rule_for_every_reader() -> None:
    """On a plain Llama with both forms nothing is unknown."""
    for name in ROPES:
        unknown = {reader for reader, verdict in verdicts(config(name)).items() if verdict == "unknown"}
        assert unknown == set(), name
    assert {rope_facts(config(name)).form for name in ROPES} == set(get_args(Form)) - {"other"}


@pytest.mark.parametrize(
    "bad",
    [
        {"verdict": "maybe"},
        {"evidence": "hearsay"},
        {"source": "a friend"},
        {"when": {"rope_typ": "yarn"}},
        {"when": {"form": ["yarrn"]}},
        {"surprise": 1},
    ],
)
def test_a_rule_with_a_typo_is_refused(bad: dict[str, Any]) -> None:
    good = {
        "reader": "vllm",
        "when": {"form": ["yarn"]},
        "verdict": "right",
        "source": "https://example.org",
        "checked": datetime.date(2026, 11, 22),
        "evidence": "source",
    }
    assert Rule.model_validate(good).verdict == "right"
    with pytest.raises(ValidationError):
        Rule.model_validate({**good, **bad})
