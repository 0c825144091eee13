"""The model card of a merged or patched checkpoint: what it is, what was measured, and no claim beyond that.

Every number comes from what the run folder holds already; the before/after table and the conclusions are those of the
report (`report/summary.json`), so that card and report cannot disagree. A card is public: values of the recipe are
escaped, paths of this machine are cut down to file names, and what other people's runs showed is marked as theirs.

The card and its pictures stay outside the manifest, which vouches for weights, config and tokenizer: people edit model
cards, and an edited sentence is not a damaged checkpoint. A comment at the end of a card tells whether that happened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from gguf import GGUFReader
from huggingface_hub import EvalResult, ModelCardData, hf_hub_download, metadata_load

from ctxext.errors import ArtefactError, CtxextError
from ctxext.evaluation.arms import ARM_FOLDERS, CONTROL_TASK
from ctxext.evaluation.cells import length_label
from ctxext.export.markdown import Markdown, code, escape, fenced
from ctxext.export.placement import SCALE_KEY, TRAINED_ON_KEY
from ctxext.files import (
    MANIFEST_NAME,
    read_json,
    sha256_bytes,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from ctxext.model.load import ModelSource, resolve_source, short_name
from ctxext.recipe.data import SourceBlock
from ctxext.recipe.load import parse_document, validate_document
from ctxext.recipe.schema import Recipe
from ctxext.rope.methods import METHODS
from ctxext.train.adapter import PROVENANCE_NAME, read_provenance
from ctxext.train.inexact import trained_inexactly

CARD_NAME = "README.md"
PICTURES = "heatmap-*.png"
# What was read in training, in the run folder.
DATA_NAME = "data.json"

_ARM_ORDER = ("base", "extended", "control", "untrained")
_HUB = "https://huggingface.co"
_OWN_LICENCE = "apache-2.0"
_LICENCE_KEYS = ("license", "license_name", "license_link")
_REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LOCAL_PATH = re.compile(r"(?:/|~|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)")
_PACKAGED_DATASETS = ("json", "parquet", "csv", "text", "arrow")
_FILES_OF_THE_MAKER = {"text": "text files", "code": "code repositories", "tokens": "tokenised files"}
_EDIT_MARK = re.compile(r"<!-- ctxext card ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class Base:
    """The base model as the public may know it.

    Attributes:
        words: a phrase that names it, without a path of this machine.
        hub_id: when it came from the hub.
        licence: the front matter's licence keys; empty when not known.
    """

    words: Markdown
    hub_id: str | None = None
    revision: str | None = None
    licence: dict[str, str] = field(default_factory=dict)


def write_card(run_folder: Path, *, replace_edited: bool = False) -> Path:
    """Write `README.md` and the heatmaps of a finished run into its merged checkpoint; returns the card's path.

    Raises:
        ArtefactError: no run, nothing merged or reported yet, a report older than its samples, or a card that somebody
            has edited.
    """
    merged = run_folder / "merged"
    if not merged.is_dir():
        raise ArtefactError("the run has no merged checkpoint yet", where=str(run_folder), hint="Finish the run first.")
    _refuse_edited(merged, replace_edited)
    recipe = _recipe(run_folder)
    provenance = _provenance(merged)
    summary = _summary(run_folder, provenance)
    base = describe_base(provenance["base"])
    body = _render(
        base=base,
        provenance=provenance,
        config=read_json(merged / "config.json"),
        run=_run_values(run_folder, recipe, summary),
    )
    pictures = {
        f"{_picture(row)}.png": (run_folder / "report" / f"{_picture(row)}.png").read_bytes()
        for row in _pictured(summary)
    }
    front = _front_matter(base, provenance, relation="finetune", recipe=recipe, summary=summary)
    return _write(merged, front + body, pictures)


def write_patch_card(checkpoint: Path, *, replace_edited: bool = False) -> Path:
    """Write the short card of a checkpoint whose RoPE was rewritten without training; returns its path.

    Raises:
        ArtefactError: the checkpoint was not made by ctxext, or was trained, or somebody has edited its card.
    """
    provenance = _provenance(checkpoint)
    if "plan_id" in provenance:
        raise ArtefactError(
            "the checkpoint was trained, so its card needs the run folder it came from",
            where=str(checkpoint),
            hint="Name the run folder instead, or write a README.md of your own.",
        )
    _refuse_edited(checkpoint, replace_edited)
    base = describe_base(provenance["base"])
    body = _render(base=base, provenance=provenance, config=read_json(checkpoint / "config.json"), run=None)
    # No relation: the hub knows finetune, adapter, merge and quantized, and these weights are none of them.
    return _write(checkpoint, _front_matter(base, provenance, relation=None) + body, {})


def is_edited(checkpoint: Path) -> bool:
    """Whether the checkpoint has a card that is not, or no longer, as ctxext wrote it."""
    path = checkpoint / CARD_NAME
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    mark = _EDIT_MARK.search(text)
    return mark is None or mark[1] != sha256_bytes(text[: mark.start()].encode())


def describe_base(base: Mapping[str, Any]) -> Base:
    """The base of a provenance file, fit for publication; its licence from its own card or GGUF metadata if known."""
    name, revision = str(base["source"]), base.get("revision")
    source: ModelSource | None = None
    with suppress(CtxextError):  # a package or folder that has gone since: then only its name is known
        source = resolve_source(name, revision)
    if name.startswith("recipes:"):
        words = Markdown(f"{code(short_name(name))}, a demonstration model that ships with ctxext")
        return Base(words, licence={"license": _OWN_LICENCE})
    licence = _licence(source) if source else {}
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        return Base(Markdown(f"{code(inside)} from the Python package {code(package)}"), licence=licence)
    if source is not None and source.location == name and not Path(name).exists() and is_repo_id(name):
        at = f", revision {code(revision)}" if revision else ""
        return Base(Markdown(f"[{escape(name)}]({_HUB}/{name}){at}"), name, revision, licence)
    kind = "GGUF file" if name.endswith(".gguf") else "folder"
    return Base(Markdown(f"{code(_file_name(name))}, a local {kind}"), licence=licence)


def public_values(value: Any) -> Any:
    """Recipe values without what only means something on this machine: local paths become file names."""
    if isinstance(value, dict):
        return {key: public_values(item) for key, item in value.items() if key != "output_dir"}
    if isinstance(value, list):
        return [public_values(item) for item in value]
    return _file_name(value) if isinstance(value, str) and _LOCAL_PATH.match(value) else value


def _file_name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def is_repo_id(name: str) -> bool:
    """Whether the hub takes this as the name of a repository, with or without its owner."""
    return bool(_REPO_ID.fullmatch(name)) and not re.search(r"--|\.\.|\.git$", name)


def _licence(source: ModelSource) -> dict[str, str]:
    if source.gguf_file:
        return _gguf_licence(Path(source.location) / source.gguf_file)
    local = Path(source.location) / CARD_NAME
    card: str | Path | None = local if local.is_file() else None
    if card is None and not Path(source.location).is_dir():
        with suppress(Exception):  # offline, gone, gated ...: the card then says that the licence is not known
            card = hf_hub_download(source.location, CARD_NAME, revision=source.revision, etag_timeout=5)
    if card is None:
        return {}
    try:
        facts = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: facts[key] for key in _LICENCE_KEYS if isinstance(facts.get(key), str)} if "license" in facts else {}


def _gguf_licence(path: Path) -> dict[str, str]:
    try:
        entry = GGUFReader(path).get_field("general.license")
        name = str(entry.contents()).lower() if entry else ""
    except (OSError, ValueError, KeyError, IndexError):
        return {}
    return {"license": name} if _LICENCE_ID.fullmatch(name) else {}


def _provenance(checkpoint: Path) -> dict[str, Any]:
    provenance = read_provenance(checkpoint)
    method, lengths = provenance.get("method"), [provenance.get(key) for key in ("original_length", "target_length")]
    if not isinstance(method, dict) or "method" not in method or not all(type(length) is int for length in lengths):
        raise ArtefactError(
            "the file does not say which method was used between which lengths", where=str(checkpoint / PROVENANCE_NAME)
        )
    return provenance


def _recipe(run_folder: Path) -> Recipe:
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise ArtefactError("not a run folder (it has no recipe.yaml)", where=str(run_folder))
    return validate_document(parse_document(path.read_text(encoding="utf-8"), str(path)), Recipe)


def _summary(run_folder: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The report's content, checked against the samples and the checkpoint that it is about to describe."""
    path = run_folder / "report" / "summary.json"
    redo = "Draw it again with `ctxext report RUN`."
    if not path.is_file():
        raise ArtefactError("the run has no report to take the card's numbers from", where=str(run_folder), hint=redo)
    summary: dict[str, Any] = read_json(path)
    if summary["facts"]["plan_id"] != provenance.get("plan_id"):
        raise ArtefactError(
            "the report belongs to another plan than the merged checkpoint",
            where=str(path),
            got=summary["facts"]["plan_id"],
            expected=str(provenance.get("plan_id")),
        )
    for row in _live_rows(summary):
        results = run_folder / "eval" / ARM_FOLDERS.get(row["arm"], row["arm"]) / "results.json"
        shown = {length: (share["num_right"], share["num_samples"]) for length, share in row["lengths"].items()}
        if _counts(read_json(results)) != shown:
            raise ArtefactError("the report is older than the samples", where=str(results), hint=redo)
        if not (path.parent / f"{_picture(row)}.png").is_file():
            raise ArtefactError("the report lacks the heatmap of an arm", where=str(path.parent), hint=redo)
    return summary


def _counts(results: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Right and scored samples of each length, from the cells of a `results.json`."""
    counts: dict[str, tuple[int, int]] = {}
    configs = results.get("configs", {})
    controls = {name for name, task in configs.items() if task["metadata"].get("task", name) == CONTROL_TASK}
    for cell in results.get("cells", []):
        if cell["num_samples"] and cell["task"] not in controls:
            right, scored = counts.get(str(cell["length_tokens"]), (0, 0))
            counts[str(cell["length_tokens"])] = right + cell["num_right"], scored + cell["num_samples"]
    return counts


def _live_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [row for row in summary["table"] if not row["recorded"]]
    return sorted(rows, key=lambda row: _ARM_ORDER.index(row["arm"]))


def _main_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The arm whose weights the checkpoint holds; without a rewrite (`rope.method: none`) that is the control arm."""
    rows = {row["arm"]: row for row in _live_rows(summary)}
    for name in ("extended", "control"):
        if name in rows:
            return rows[name]
    raise ArtefactError("the trained model has not been evaluated in this run", where="report/summary.json")


def _longest(row: Mapping[str, Any]) -> int:
    return max((int(length) for length, share in row["lengths"].items() if share["num_samples"]), default=0)


def _pictured(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in _live_rows(summary) if row["arm"] != "untrained"]


def _picture(row: Mapping[str, Any]) -> str:
    return f"heatmap-{row['arm']}"


def _run_values(run_folder: Path, recipe: Recipe, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the template says about training and evaluation."""
    plan, environment = read_json(run_folder / "plan.json"), read_json(run_folder / "environment.json")
    rows, main = _live_rows(summary), _main_row(summary)
    lengths = sorted({int(length) for row in rows for length in row["lengths"]})
    live = [
        # "Your run" tells it from the recorded one beside it; on the hub there is no such reader.
        {**s, "lead": s["lead"].replace("Your run, before and after", "Before and after")}
        for s in summary["statements"]
        if not s["recorded"]
    ]
    by_topic = {topic: [s for s in live if s["topic"] == topic] for topic in ("extension", "before_after", "inside")}
    cost = [s for s in live if s["topic"] == "short_loss" and s["numbers"].get("arm") == main["arm"]]
    return {
        "recipe": recipe,
        "trained": _trained(recipe),
        "recipe_text": yaml.safe_dump(
            public_values(recipe.model_dump(mode="json", exclude_none=True)), sort_keys=False
        ),
        "plan": plan,
        "suite": public_values(plan["suite"]),
        "environment": environment,
        "sources": describe_sources(recipe.data.sources),
        "contamination": _contamination(run_folder),
        "retrieval_note": summary["retrieval_note"],
        "rows": rows,
        "pictured": _pictured(summary),
        "main": main,
        "arms": {row["arm"] for row in rows},
        "lengths": lengths,
        "loss_length": next((row["loss_length_tokens"] for row in rows if row["loss_length_tokens"]), None),
        "longest": _longest(main),
        "num_haystacks": main["num_haystacks"],
        "statements": by_topic,
        "cost": cost,
        "degenerate": _degenerate(live),
        "recorded": [s for s in summary["statements"] if s["recorded"] and s["topic"] == "extension"],
        "recorded_name": recipe.evaluation.recorded,
        "picture": _picture,
    }


def _trained(recipe: Recipe) -> dict[str, str]:
    """What training changed: its name, in a sentence, and what goes beside plain LoRA."""
    merged = "which are merged into this checkpoint"
    names = {
        "lora": ("LoRA", f"LoRA weights, {merged}"),
        "qlora": ("QLoRA", f"LoRA weights against the base model in 4 bits, {merged}, whose weights are not quantised"),
        "full": ("Full fine-tuning", "every weight"),
    }
    lora = recipe.lora
    variants = {
        "rank-stabilised (rsLoRA)": lora.rank_stabilized,
        "weight-decomposed (DoRA)": lora.weight_decomposed,
        "embeddings and norms trained whole": lora.embeddings_and_norms,
    }
    name, what = names[recipe.adaptation]
    return {"name": name, "what": what, "beside": ", ".join(words for words, asked in variants.items() if asked)}


def _contamination(run_folder: Path) -> str | None:
    """Whether training text held what was asked; None for runs that did not look."""
    path = run_folder / DATA_NAME
    return str(read_json(path)["contamination"]["sentence"]) if path.is_file() else None


def _degenerate(statements: Iterable[Mapping[str, Any]]) -> list[str]:
    counted = [arm for s in statements if s["topic"] == "degenerate" for arm in s["numbers"]["arms"]]
    return [f"{arm['arm']} {arm['count']} of {arm['of']}" for arm in counted if arm["count"] and not arm["recorded"]]


def describe_sources(sources: Sequence[SourceBlock]) -> list[Markdown]:
    """Each source of training text in words, with its share when there are several."""
    total = sum(source.weight for source in sources)
    share = "" if len(sources) == 1 else " ({:.0%} of the documents' tokens)"
    return [Markdown(_source_words(source) + share.format(source.weight / total)) for source in sources]


def _source_words(source: SourceBlock) -> Markdown:
    if source.kind == "python-stdlib":
        return Markdown("docstrings and sources of Python's standard library, without its documentation topics")
    if source.kind == "python-docs":
        return Markdown("the documentation topics of Python")
    if source.kind == "generated-words":
        return Markdown("generated sentences of common words")
    files = ", ".join(code(_file_name(path)) for path in source.paths)
    if source.kind in _FILES_OF_THE_MAKER:
        return Markdown(f"{_FILES_OF_THE_MAKER[source.kind]} of the maker: {files}")
    if source.name is None or source.name in _PACKAGED_DATASETS or not is_repo_id(source.name):
        return Markdown(f"local data files: {files}" if files else "local data files")
    link = f"[{escape(source.name)}]({_HUB}/datasets/{source.name})"
    at = f", revision {code(source.revision)}" if source.revision else ""
    return Markdown(f"the dataset {link}, split {code(source.split)}{at}")


def _front_matter(
    base: Base,
    provenance: Mapping[str, Any],
    *,
    relation: str | None,
    recipe: Recipe | None = None,
    summary: Mapping[str, Any] | None = None,
) -> str:
    """The YAML block that the hub reads; values are plain strings and numbers, dumped safely."""
    method = str(provenance["method"]["method"])
    datasets = [
        source.name
        for source in (recipe.data.sources if recipe else ())
        if source.name and source.name not in _PACKAGED_DATASETS and is_repo_id(source.name)
    ]
    trained = [] if recipe is None or recipe.adaptation == "full" else ["lora"]
    values: dict[str, Any] = {
        "base_model": base.hub_id,
        "base_model_relation": relation if base.hub_id else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "long-context",
            "context-extension",
            "rope",
            *([] if method == "none" else [method]),
            *trained,
            "ctxext",
        ],
        "datasets": datasets or None,
        "model_name": _title(provenance) if summary else None,
        "eval_results": _eval_results(summary) if summary else None,
        **base.licence,
    }
    data: Any = ModelCardData(**values)
    return f"---\n{yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True)}---\n\n"


def _eval_results(summary: Mapping[str, Any]) -> list[EvalResult] | None:
    suite, main = summary["facts"]["suite"], _main_row(summary)
    name = _file_name(str(suite["name"])).removesuffix(".yaml")
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=f"ctxext-{name}",
            dataset_name=f"needle in a haystack, ctxext suite {name}",
            metric_type="accuracy",
            metric_name=f"right answers at {int(length):,} tokens, {share['num_right']} of {share['num_samples']}",
            metric_value=round(share["num_right"] / share["num_samples"], 6),
        )
        for length, share in main["lengths"].items()
        if share["num_samples"]
    ]
    return results or None


def _title(provenance: Mapping[str, Any]) -> str:
    name = short_name(_file_name(str(provenance["base"]["source"])))
    return f"{name}-{provenance['method']['method']}-{provenance['target_length']}"


def _parameters(provenance: Mapping[str, Any]) -> str:
    """The method's own parameters in words; long lists as their length."""
    entries = []
    for key, value in public_values(provenance["method"]).items():
        if key in ("method", "control") or value is None:
            continue
        shown = f"{len(value)} values" if isinstance(value, list) else f"{value:g}" if type(value) is float else value
        entries.append(f"{key} {shown}")
    return ", ".join(entries)


def _shortened(parameters: Any) -> Any:
    """RoPE parameters with long lists of factors told by their length; `config.json` has them in full."""
    if isinstance(parameters, dict):
        return {key: _shortened(value) for key, value in parameters.items()}
    return f"{len(parameters)} values" if isinstance(parameters, list) and len(parameters) > 8 else parameters


def _render(
    *, base: Base, provenance: Mapping[str, Any], config: Mapping[str, Any], run: Mapping[str, Any] | None
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ctxext.export", "."),
        autoescape=False,  # autoescape means HTML; every printed value goes through `escape` instead
        finalize=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, fenced=fenced, tokens=lambda count: f"{count:,}", label=length_label)
    method = METHODS.get(str(provenance["method"]["method"]))
    text = config.get("text_config") or config
    rendered = environment.get_template("card.md.j2").render(
        title=_title(provenance),
        base=base,
        method=str(provenance["method"]["method"]),
        method_class=method,
        parameters=_parameters(provenance),
        rope=yaml.safe_dump(_shortened(text.get("rope_parameters")), sort_keys=False),
        states_attention_factor="attention_factor" in str(text.get("rope_parameters")),
        on_existing=provenance.get("on_existing") or "refuse",
        scale=float(provenance.get(SCALE_KEY, 1.0)),
        trained_on=describe_base(provenance[TRAINED_ON_KEY]) if TRAINED_ON_KEY in provenance else None,
        original=int(provenance["original_length"]),
        target=int(provenance["target_length"]),
        model_type=str(text.get("model_type")),
        inexact=trained_inexactly(public_values(provenance)),
        run=run,
    )
    return re.sub(r"\n{3,}", "\n\n", rendered).rstrip("\n") + "\n"


def _refuse_edited(checkpoint: Path, replace_edited: bool) -> None:
    if not replace_edited and is_edited(checkpoint):
        raise ArtefactError(
            "the card was written or edited by somebody else and would be overwritten",
            where=str(checkpoint / CARD_NAME),
            hint="Move it away, or ask for it to be replaced.",
        )


def _write(checkpoint: Path, text: str, pictures: Mapping[str, bytes]) -> Path:
    """Pictures first, so that a card never shows what is not there."""
    stale = {path.name for path in checkpoint.glob(PICTURES)} - pictures.keys()
    _release_from_manifest(checkpoint, {CARD_NAME, *pictures, *stale})
    for name, data in pictures.items():
        write_bytes_atomic(checkpoint / name, data)
    card = checkpoint / CARD_NAME
    text = f"{text}\n"
    write_text_atomic(card, f"{text}<!-- ctxext card {sha256_bytes(text.encode())} -->\n")
    for name in stale:
        (checkpoint / name).unlink()
    return card


def _release_from_manifest(checkpoint: Path, names: set[str]) -> None:
    """Drop the card's files from the manifest before they change. Nothing is hashed anew: a manifest made again now
    would vouch for weights that nobody has checked."""
    path = checkpoint / MANIFEST_NAME
    if not path.is_file():
        return
    manifest = read_json(path)
    listed = manifest.get("files", {}) if isinstance(manifest, dict) else {}
    kept = {name: facts for name, facts in listed.items() if name not in names}
    if len(kept) != len(listed):
        write_json_atomic(path, {**manifest, "files": kept})
