"""`ctxext patch` as people meet it: what it prints, what it leaves, and what it refuses to decide for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rope.tiny_families import build, tiny_family_config
from support import save_tiny_model

from ctxext import cli
from ctxext.errors import UsageError
from ctxext.files import verify_manifest
from ctxext.model.load import quiet
from ctxext.pipeline.patch import method_parameters, on_existing_of, patch_model_folder, settings_elsewhere
from ctxext.pipeline.verify import verify_checkpoint


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, and lines that are not wrapped."""
    save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> tuple[int, str]:
    """Exit code, and everything that was printed."""
    monkeypatch.setattr("sys.argv", ["ctxext", *command.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out + printed.err


def rope_of(folder: str) -> dict[str, object]:
    parameters: dict[str, object] = json.loads((Path(folder) / "config.json").read_text())["rope_parameters"]
    return parameters


def patched(source: str, out: str, **changes: object) -> list[str]:
    asked: dict[str, object] = {
        "method": "yarn",
        "target_length": 512,
        "portable": None,
        "on_existing": "refuse",
        "revision": None,
        "settings": (),
    }
    return list(patch_model_folder(source, Path(out), **{**asked, **changes}))  # type: ignore[arg-type]


def test_it_says_what_it_did_and_leaves_a_checkpoint_with_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = main(monkeypatch, capsys, "patch model out -n 512 beta_fast=16 truncate=false")
    assert code == 0, printed
    for said in (
        "yarn: 128 to 512 positions (factor 4); nothing was trained",
        "weight files: 1 hard-linked; 0 of 21 tensors edited",
        "positions in effect: 1 rotary module x 8 frequencies match the reference",
        "attention factor 1.1386",
        "model card: out/README.md",
        "extended checkpoint: out",
    ):
        assert said in printed
    assert "portable form" not in printed
    assert "transformers 4" not in printed
    assert rope_of("out")["beta_fast"] == 16.0
    assert rope_of("out")["truncate"] is False
    assert "README.md" not in verify_manifest(Path("out"))["files"]  # a card may be edited by hand
    assert "yarn" in Path("out/README.md").read_text().lower()
    code, printed = main(monkeypatch, capsys, "verify out")
    assert code == 0
    assert "made from model: yarn, 128 to 512 positions, not trained" in printed


def test_the_portable_form_and_what_was_folded_are_told() -> None:
    told = patched("model", "folded", portable=True)
    assert "portable form: attention factor 1.1386 folded into query and key" in told
    assert "portable form" in patched("model", "plain", method="ntk-by-parts")
    assert rope_of("folded")["rope_type"] == rope_of("plain")["rope_type"] == "longrope"
    assert not any(line.startswith("portable form") for line in patched("model", "stock", portable=False))


def test_a_reader_that_cannot_read_the_result_is_named_with_the_reason(here: Path) -> None:
    model = build(tiny_family_config("olmo2"))
    with quiet():
        model.save_pretrained(here / "olmo2")
    said = (
        "transformers 4 will not read these positions: transformers 4.57 refuses any scaling of this family but linear"
    )
    assert said in patched("olmo2", "yarn")
    assert not any("transformers 4" in line for line in patched("olmo2", "linear", method="linear"))


def test_a_scaled_model_is_extended_only_by_choice_and_the_numbers_of_each_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patched("model", "once", target_length=256)
    code, printed = main(monkeypatch, capsys, "patch once twice -n 512")
    assert code == 3
    assert "already scaled" in printed
    assert "starts from 128 positions with theta 10000" in printed
    assert "starts from the 256 positions that it reaches" in printed
    assert "yarn: 128 to 512 positions (factor 4)" in patched("once", "replaced", on_existing="replace")[0]
    assert "yarn: 256 to 512 positions (factor 2)" in patched("once", "composed", on_existing="compose")[0]
    for folder in ("replaced", "composed"):
        assert any("made from once: yarn" in line for line in verify_checkpoint(Path(folder)))


def test_settings_for_another_program_are_printed_without_writing_anything(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = main(monkeypatch, capsys, "patch model -n 512 --for vllm")
    assert code == 0, printed
    assert "--hf-overrides" in printed
    assert '"factor": 4.0' in printed or '"factor":4.0' in printed
    assert "--max-model-len 512" in printed
    assert [path.name for path in here.iterdir()] == ["model"]
    code, printed = main(monkeypatch, capsys, "patch model -n 512 --for vlm")
    assert code == 2
    assert "vllm" in printed


def test_one_rope_per_layer_type_has_no_settings_elsewhere(here: Path) -> None:
    model = build(tiny_family_config("gemma3_text"))
    with quiet():
        model.save_pretrained(here / "gemma")
    with pytest.raises(UsageError, match="one RoPE per layer type") as caught:
        list(
            settings_elsewhere(
                "vllm", "gemma", method="yarn", target_length=512, on_existing="refuse", revision=None, settings=()
            )
        )
    assert "ctxext patch MODEL OUT" in str(caught.value)


def test_settings_are_read_as_yaml() -> None:
    assert method_parameters(["beta_fast=16", "truncate=false", "long_factor=[1, 2.5]"]) == {
        "beta_fast": 16,
        "truncate": False,
        "long_factor": [1, 2.5],
    }
    assert on_existing_of("compose") == "compose"
    with pytest.raises(UsageError, match="refuse, replace or compose"):
        on_existing_of("keep")
