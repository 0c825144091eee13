"""The card says what the run folder holds and no more; foreign text cannot become markup; checksums still hold."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gguf import GGUFWriter
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support import SilentReporter, make_job, save_tiny_model

from ctxext.errors import ArtefactError
from ctxext.evaluation.conclusions import draw_conclusions
from ctxext.evaluation.report import summary
from ctxext.evaluation.store import by_length, load_samples
from ctxext.export.card import (
    CARD_NAME,
    describe_base,
    describe_sources,
    is_edited,
    public_values,
    write_card,
    write_patch_card,
)
from ctxext.export.markdown import Markdown, code, escape, fenced
from ctxext.export.push import machine_paths
from ctxext.files import verify_manifest, write_json_atomic, write_manifest
from ctxext.pipeline.extend import extend
from ctxext.pipeline.report import gather
from ctxext.pipeline.run_folder import RunFolder
from ctxext.pipeline.verify import verify_checkpoint
from ctxext.recipe.data import SourceBlock
from ctxext.recipe.load import parse_document, validate_document
from ctxext.recipe.schema import Recipe

HOSTILE = (
    "kind </td><script>alert(1)</script> <!-- c --> | a | [x](http://evil.example) ![i](http://evil.example/i.png)\n\n"
    "# Heading\n---\nlicense: mit\n---\n```sh\n*b* _u_ `t` {{ 7 * 7 }} {% raw %} \u202e www.evil.example \\"
)
VISIBLE = " ".join(HOSTILE.replace("\u202e", " ").split())
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


def inline_tokens(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from inline_tokens(token.children or [])


def split_card(card: Path) -> tuple[dict[str, Any], list[Token]]:
    """Front matter and parsed body."""
    _, front, body = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), PARSER.parse(body)


def visible_text(tokens: list[Token]) -> str:
    """What a reader sees, one line a block."""
    blocks = []
    for token in tokens:
        if token.type == "inline":
            blocks.append(
                "".join(child.content if child.type != "softbreak" else "\n" for child in token.children or [])
            )
    return "\n".join(blocks)


def tables(tokens: list[Token]) -> list[list[list[str]]]:
    """Every table as rows of cells."""
    found: list[list[list[str]]] = []
    for token, content in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            assert content is not None
            found[-1][-1].append("".join(child.content for child in content.children or []))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with base, extended and control arm, whose recipe describes its model in hostile words."""
    job = make_job(tmp_path_factory.mktemp("card"))
    values = yaml.safe_load(job.recipe_path.read_text())
    values["model"] = {"source": "recipes:tiny", "description": HOSTILE}
    job.recipe_path.write_text(yaml.safe_dump(values))
    extend(job.recipe("evaluation.control=true", "train.steps=1", "train.checkpoint_every=1"), SilentReporter())
    for file in [*(job.output / "merged").glob("heatmap-*.png"), job.output / "merged" / "README.md"]:
        file.unlink(missing_ok=True)  # the tests begin without a card
    return job.output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """A checkpoint with a rewritten config that nobody trained."""
    folder = save_tiny_model(tmp_path / "patched", max_position_embeddings=512)
    provenance = {
        "base": {"source": str(tmp_path / "models" / "secret-base"), "revision": None},
        "method": {"method": "linear", "factor": 4.0},
        "original_length": 128,
        "target_length": 512,
    }
    write_json_atomic(folder / "ctxext.json", provenance)
    write_manifest(folder, kind="patched")
    return folder


def test_a_card_says_how_strong_the_adapter_was_merged_and_what_it_was_trained_on(run: Path) -> None:
    _, plain = split_card(write_card(run))
    assert not any("Adapter" in row[0] for table in tables(plain) for row in table)
    path = run / "merged" / "ctxext.json"
    trained_on = {"source": "/home/somebody/secret/base-model", "revision": None, "fingerprint": "0"}
    write_json_atomic(path, {**json.loads(path.read_text()), "adapter_scale": 0.5, "adapter_trained_on": trained_on})
    _, tokens = split_card(write_card(run))
    rows = {row[0]: row[1] for table in tables(tokens) for row in table}
    assert rows["Adapter scale"].startswith("0.5 of")
    assert "base-model" in rows["Adapter trained on"]
    assert "secret" not in rows["Adapter trained on"]


@pytest.mark.parametrize(
    ("settings", "expected", "tag"),
    [
        ((), ("LoRA weights, which", "AdamW, learning rate", "cosine to zero"), True),
        (
            ("adaptation=qlora", "train.optimizer=adamw-8bit", "lora.embeddings_and_norms=true"),
            ("QLoRA", "base model in 4 bits", "moments in 8 bits", "embeddings and norms trained whole"),
            True,
        ),
        (("adaptation=full", "train.decay=inverse-sqrt"), ("every weight.", "over the square root of the step"), False),
    ],
)
def test_a_card_says_what_was_trained_and_how(
    run: Path, settings: tuple[str, ...], expected: tuple[str, ...], tag: bool
) -> None:
    path = run / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    for setting in settings:
        key, value = setting.split("=")
        *blocks, name = key.split(".")
        place = values
        for block in blocks:
            place = place[block]
        place[name] = yaml.safe_load(value)
    if values["adaptation"] == "full":
        del values["lora"]
    path.write_text(yaml.safe_dump(values))
    card = write_card(run)
    _, tokens = split_card(card)
    text = visible_text(tokens)
    assert all(words in text for words in expected), text
    assert ("lora" in ModelCard(card.read_text(encoding="utf-8")).data.tags) == tag


def test_the_front_matter_is_what_the_hub_reads(run: Path) -> None:
    card = write_card(run)
    data = ModelCard(card.read_text(encoding="utf-8")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert {"long-context", "yarn", "lora"} <= set(data.tags)
    assert data.base_model is None  # not a model of the hub
    shares = by_length(load_samples(run / "eval" / "after")).values()
    expected = [(round(s.value, 6), f"{s.num_successes} of {s.num_trials}") for s in shares]
    assert len(expected) == 2
    assert [(r.metric_value, r.metric_name.split(", ")[-1]) for r in data.eval_results] == expected


def test_the_table_repeats_the_results_of_every_arm(run: Path) -> None:
    _, tokens = split_card(write_card(run))
    head, *rows = tables(tokens)[1]
    assert head[:3] == ["arm", "100", "240 *"]
    folders = ("before", "after", "control")
    assert len(rows) == len(folders)
    for row, folder in zip(rows, folders, strict=True):
        shares = by_length(load_samples(run / "eval" / folder)).values()
        shown = [f"{s.num_successes} of {s.num_trials} ({s.low:.2f}-{s.high:.2f})" for s in shares]
        assert row[1:3] == shown


def test_claims_are_those_of_the_report_and_limited_to_what_was_tested(run: Path) -> None:
    _, tokens = split_card(write_card(run))
    text = visible_text(tokens)
    statements = json.loads((run / "report" / "summary.json").read_text())["statements"]
    claims = [s for s in statements if s["topic"] in ("extension", "before_after", "inside")]
    assert {"extension", "before_after", "inside"} == {s["topic"] for s in claims}
    for statement in claims:
        assert f"{statement['lead']}: {statement['detail']}." in text
    assert "tested on prompts of up to 240 tokens; no statement below holds beyond that length" in text
    assert "Nothing was measured between 240 and 256 tokens." in text
    assert "50% of the training windows carried" in text
    assert "never a text of that length" in text  # skip-wise windows
    assert "those of the evaluation" in text  # pass keys
    assert "No control arm was run" not in text


def test_pictures_lie_beside_the_card(run: Path) -> None:
    card = write_card(run)
    _, tokens = split_card(card)
    images = [str(t.attrs["src"]) for t in inline_tokens(tokens) if t.type == "image"]
    assert images == ["heatmap-base.png", "heatmap-extended.png", "heatmap-control.png"]
    for name in images:
        assert (card.parent / name).read_bytes() == (run / "report" / name).read_bytes()


def summarise_again(run: Path) -> None:
    """The report's numbers from the samples that are left, without drawing anything."""
    facts, arms = gather(RunFolder(run), RunFolder(run).recipe())
    statements = draw_conclusions(arms, original_length=facts.original_length, target_length=facts.target_length)
    write_json_atomic(run / "report" / "summary.json", summary(facts, arms, statements))


def test_without_a_control_arm_no_claim_is_made(run: Path) -> None:
    write_card(run)
    shutil.rmtree(run / "eval" / "control")
    summarise_again(run)
    card = write_card(run)
    _, tokens = split_card(card)
    text = visible_text(tokens)
    assert "No control arm was run" in text
    assert "no claim of context extension is made" in text
    assert "is shown" not in text
    assert len(tables(tokens)[1]) == 3
    assert not (card.parent / "heatmap-control.png").exists()


def test_what_was_not_measured_is_said(run: Path) -> None:
    shutil.rmtree(run / "eval" / "before")
    summarise_again(run)
    _, tokens = split_card(write_card(run))
    text = visible_text(tokens)
    assert "The base model was not evaluated in this run" in text
    assert "What the extension costs at short lengths was not measured." in text


def test_a_run_without_its_trained_arm_has_nothing_to_say(run: Path) -> None:
    for arm in ("after", "control"):
        shutil.rmtree(run / "eval" / arm)
    summarise_again(run)
    with pytest.raises(ArtefactError, match="has not been evaluated"):
        write_card(run)
    assert not (run / "merged" / CARD_NAME).exists()


def test_a_control_run_is_not_called_extended(run: Path) -> None:
    shutil.rmtree(run / "eval" / "after")
    path = run / "merged" / "ctxext.json"
    write_json_atomic(path, {**json.loads(path.read_text()), "method": {"method": "none", "control": True}})
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["rope"], values["evaluation"]["control"] = {"method": "none", "control": True}, False
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    summarise_again(run)
    front, tokens = split_card(write_card(run))
    text = visible_text(tokens)
    assert "without any rewrite of its position embeddings" in text
    assert "No: nothing was rewritten." in text
    assert "context window extended" not in text
    assert "none" not in front["tags"]
    assert [row[0] for row in tables(tokens)[1][1:]] == ["base model", "control: same training, no rewrite"]


def test_a_recorded_run_is_never_passed_off_as_this_one(run: Path) -> None:
    shutil.rmtree(run / "eval" / "control")
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["evaluation"]["recorded"] = "tiny"
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    summarise_again(run)
    assert sum(row["recorded"] for row in json.loads((run / "report" / "summary.json").read_text())["table"]) == 4
    _, tokens = split_card(write_card(run))
    assert len(tables(tokens)[1]) == 3  # its own arms alone
    text = visible_text(tokens)
    assert "No control arm was run" in text
    assert text.count("Recorded on another machine") == 1
    assert "It is about other weights than these." in text


def test_foreign_text_cannot_become_markup(run: Path) -> None:
    card = write_card(run)
    front, tokens = split_card(card)
    assert front["license"] == "apache-2.0"
    assert f"({VISIBLE})" in visible_text(tokens)
    kinds = [token.type for token in inline_tokens(tokens)]
    html = [t.content for t in inline_tokens(tokens) if t.type in ("html_block", "html_inline")]
    assert [text.split()[:3] for text in html] == [["<!--", "ctxext", "card"]]
    assert kinds.count("image") == 3
    assert "link_open" not in kinds
    headings = [b.content for a, b in itertools.pairwise(tokens) if a.type == "heading_open"]
    assert headings == [
        "tiny-yarn-256",
        "Method",
        "What was measured",
        "Is it context extension?",
        "Inside the original length",
        "Training",
        "How to use it",
        "Limitations",
        "How it was made",
    ]


@given(st.text(max_size=60) | st.text("`*_[]<>&|~\\$#!:/.w@\n\r\t -+=1()", max_size=30))
def test_escaped_text_shows_itself_and_nothing_else(text: str) -> None:
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    (_, inline, _) = PARSER.parse(f"x {escape(text)} y")
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children or []) == (f"x {shown} y" if shown else "x  y")
    cells = tables(PARSER.parse(f"| head |\n|---|\n| {escape(text)} |"))
    assert cells == [[["head"], [shown]]]
    (_, inline, _) = PARSER.parse(f"x {code('a' + text)} y")
    spans = [(child.type, child.content) for child in inline.children or []]
    shown = " ".join("".join(c if c.isprintable() else " " for c in "a" + text).split())
    assert spans == [("text", "x "), ("code_inline", shown), ("text", " y")]
    block, *rest = PARSER.parse(fenced(text))
    assert (block.type, rest) == ("fence", [])


def test_the_recipe_in_the_card_is_a_recipe_without_local_paths(run: Path) -> None:
    _, tokens = split_card(write_card(run))
    text = [token.content for token in tokens if token.type == "fence" and token.info == "yaml"][-1]
    again = validate_document(parse_document(text, "card"), Recipe)
    stored = RunFolder(run).recipe()
    assert again.evaluation.suite == "suite.yaml"  # it was an absolute path
    assert again.output_dir is None
    assert list(machine_paths(run / "merged", [CARD_NAME], [run])) == []
    same = {"output_dir": None, "evaluation": again.evaluation}
    assert again == stored.model_copy(update=same)


def test_public_values_keep_hub_ids_and_cut_local_paths() -> None:
    given_values = {
        "output_dir": "runs/x",
        "source": "org/name",
        "paths": ["/home/me/books/*.txt", "~/a.txt", "../b.txt", "C:\\Users\\me\\c.txt", "data/d.txt"],
        "package": "package:llm/x.gguf",
    }
    assert public_values(given_values) == {
        "source": "org/name",
        "paths": ["*.txt", "a.txt", "b.txt", "c.txt", "data/d.txt"],
        "package": "package:llm/x.gguf",
    }


def test_the_python_in_the_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokens = split_card(write_card(run))
    (snippet,) = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "document.txt").write_text("the river runs past the old mill")
    names: dict[str, Any] = {}
    exec(snippet.replace("PATH_OR_REPO", str(run / "merged")), names)
    assert names["model"].config.max_position_embeddings == 256
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_checkpoint_stays_verified_and_its_weights_stay_guarded(run: Path) -> None:
    merged = run / "merged"
    write_card(run)
    assert len(list(verify_checkpoint(run))) >= 3
    assert CARD_NAME not in verify_manifest(merged)["files"]
    weights = merged / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    write_card(run)
    with pytest.raises(ArtefactError, match="checksum differs"):
        verify_manifest(merged)


def test_a_card_that_a_manifest_listed_is_released_from_it(run: Path) -> None:
    merged = run / "merged"
    write_card(run)
    write_manifest(merged, kind="merged")
    assert CARD_NAME in verify_manifest(merged)["files"]
    shutil.rmtree(run / "eval" / "control")
    summarise_again(run)
    write_card(run)
    manifest = verify_manifest(merged)
    assert manifest["kind"] == "merged"
    assert "model.safetensors" in manifest["files"]
    assert not {CARD_NAME, "heatmap-base.png", "heatmap-control.png"} & manifest["files"].keys()


def test_the_same_run_gives_the_same_card(run: Path) -> None:
    first = write_card(run).read_bytes()
    assert write_card(run).read_bytes() == first


def test_an_edited_card_is_not_overwritten(run: Path) -> None:
    card = write_card(run)
    assert not is_edited(card.parent)
    original = card.read_text(encoding="utf-8")
    card.write_text(original.replace("## Limitations", "## Limits"), encoding="utf-8")
    assert is_edited(card.parent)
    with pytest.raises(ArtefactError, match="edited by somebody"):
        write_card(run)
    assert "## Limits\n" in card.read_text(encoding="utf-8")
    write_card(run, replace_edited=True)
    assert card.read_text(encoding="utf-8") == original


def test_unfit_runs_are_refused(run: Path, tmp_path: Path) -> None:
    page = run / "report" / "summary.json"
    reported = page.read_text()
    values = json.loads(reported)
    with pytest.raises(ArtefactError, match="no merged checkpoint"):
        write_card(tmp_path)
    values["facts"]["plan_id"] = "another"
    write_json_atomic(page, values)
    with pytest.raises(ArtefactError, match="another plan"):
        write_card(run)
    page.unlink()
    with pytest.raises(ArtefactError, match="no report"):
        write_card(run)
    page.write_text(reported)
    heatmap = run / "report" / "heatmap-base.png"
    picture = heatmap.read_bytes()
    heatmap.unlink()
    with pytest.raises(ArtefactError, match="lacks the heatmap"):
        write_card(run)
    heatmap.write_bytes(picture)
    results = run / "eval" / "after" / "results.json"
    counts = json.loads(results.read_text())
    assert counts["cells"][-1]["length_tokens"] == 240
    counts["cells"][-1]["num_samples"] += 1
    write_json_atomic(results, counts)
    with pytest.raises(ArtefactError, match="older than the samples"):
        write_card(run)
    assert not (run / "merged" / CARD_NAME).exists()


def test_a_patched_checkpoint_says_that_it_was_not_trained(patched: Path) -> None:
    card = write_patch_card(patched)
    front, tokens = split_card(card)
    text = visible_text(tokens)
    assert "It was not trained and not evaluated" in text
    assert "Longest tested length" in text
    assert not {"license", "base_model", "base_model_relation", "model-index"} & front.keys()
    assert "Licence: not known" in text
    assert "secret-base, a local folder" in text
    assert str(patched.parent) not in card.read_text(encoding="utf-8")
    verify_manifest(patched)


def test_long_lists_and_an_earlier_scaling_are_told_in_words(patched: Path) -> None:
    values = json.loads((patched / "ctxext.json").read_text())
    values["method"] = {"method": "longrope", "short_factor": [1.0] * 32, "file": "/home/me/factors.json"}
    write_json_atomic(patched / "ctxext.json", {**values, "on_existing": "replace"})
    config = json.loads((patched / "config.json").read_text())
    config["rope_parameters"]["short_factor"] = [1.0] * 32
    write_json_atomic(patched / "config.json", config)
    _, tokens = split_card(write_patch_card(patched))
    text = visible_text(tokens)
    assert "Parameters: short_factor 32 values, file factors.json." in text
    assert "was scaled before; that scaling was replaced" in text
    assert "short_factor: 32 values" in next(token.content for token in tokens if token.type == "fence")


@pytest.mark.parametrize("missing", ["method", "original_length"])
def test_a_checkpoint_that_does_not_say_what_was_done_gets_no_card(patched: Path, missing: str) -> None:
    values = json.loads((patched / "ctxext.json").read_text())
    del values[missing]
    write_json_atomic(patched / "ctxext.json", values)
    with pytest.raises(ArtefactError, match="which method was used between which lengths"):
        write_patch_card(patched)


def test_a_trained_checkpoint_gets_no_patch_card(run: Path) -> None:
    with pytest.raises(ArtefactError, match="was trained"):
        write_patch_card(run / "merged")


def test_a_base_of_the_hub_is_linked_with_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "README.md"
    cached.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Base\n")
    asked = []

    def download(repo: str, name: str, **options: Any) -> str:
        asked.append((repo, name, options["revision"]))
        return str(cached)

    monkeypatch.setattr("ctxext.export.card.hf_hub_download", download)
    base = describe_base({"source": "org/base-1b", "revision": "main"})
    assert asked == [("org/base-1b", "README.md", "main")]
    assert (base.hub_id, base.licence["license_name"]) == ("org/base-1b", "own")
    assert "](https://huggingface.co/org/base-1b)" in base.words


def test_an_unreachable_hub_leaves_the_licence_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = describe_base({"source": "org/not-in-any-cache", "revision": None})
    assert (base.hub_id, base.licence) == ("org/not-in-any-cache", {})


def test_a_local_base_gives_its_licence_and_keeps_its_place_to_itself(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: x/y\n---\n")
    base = describe_base({"source": str(folder), "revision": None})
    assert (base.words, base.hub_id, base.licence) == ("`base`, a local folder", None, {"license": "mit"})
    (folder / "README.md").write_text("---\n: : [\n---\n")
    assert describe_base({"source": str(folder)}).licence == {}
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("Apache-2.0")
    writer.add_tensor("t", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = describe_base({"source": str(tmp_path / "m.gguf")})
    assert (base.words, base.licence) == ("`m.gguf`, a local GGUF file", {"license": "apache-2.0"})


def test_sources_are_named_without_their_folders() -> None:
    sources = [
        SourceBlock(kind="text", paths=["/home/me/books/*.txt"], weight=3),
        SourceBlock(kind="dataset", name="org/books", revision="v1"),
        SourceBlock(kind="dataset", name="json", paths=["/home/me/x.jsonl"], weight=2),
        SourceBlock(kind="python-stdlib", weight=4),
    ]
    words = describe_sources(sources)
    assert words[0] == "text files of the maker: `*.txt` (30% of the documents' tokens)"
    assert "[org/books](https://huggingface.co/datasets/org/books)" in words[1]
    assert words[2].startswith("local data files: `x.jsonl`")
    assert not [word for word in words if "/home" in word]
    assert all(isinstance(word, Markdown) for word in words)
