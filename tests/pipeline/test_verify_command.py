"""`ctxext verify` passes what ctxext writes, and names the one thing that is wrong with what was changed since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import SilentReporter, make_job, save_tiny_model, write_suite

from ctxext import cli
from ctxext.errors import CtxextError, UsageError
from ctxext.export.merge import merge_adapter
from ctxext.export.patch import patch_checkpoint
from ctxext.files import write_json_atomic, write_manifest
from ctxext.pipeline.evaluate import evaluate_models
from ctxext.pipeline.evaluation_plan import EvaluationRequest
from ctxext.pipeline.extend import extend
from ctxext.pipeline.verify import verify_checkpoint

ORIGINAL, TARGET = 128, 256
_RATIOS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.5]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ntk": {},
    "theta": {},
    "dynamic": {},
    "yarn": {},
    "ntk-by-parts": {},
    "llama3": {},
    "longrope": {"long_factor": [1.0 / ratio for ratio in _RATIOS], "short_factor": [1.0] * 8},
    "cope": {"dimensions": 5},
    "resonance": {},
    "frequency-map": {"ratios": _RATIOS, "attention_factor": 1.1},
    "none": {"control": True},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run that trained on it, and what was merged and patched from them, named relatively."""
    folder = tmp_path_factory.mktemp("verify")
    job = make_job(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        base = "models/tiny"
        recipe = job.recipe(f"model.source={base}", "output_dir=run", "train.steps=2")
        extend(recipe, SilentReporter(), last_stage="train")
        merge_adapter(Path("run/adapter"), Path("merged"), "float32")
        patch_checkpoint(base, Path("patched"), target_length=TARGET)
        patch_checkpoint(base, Path("portable"), target_length=TARGET, portable=True)
    return folder


@pytest.fixture
def here(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a folder of its own, which a test may damage."""
    copied = Path(shutil.copytree(work, tmp_path / "here"))
    monkeypatch.chdir(copied)
    return copied


def lines_of(folder: str, against: str | None = None) -> list[str]:
    return list(verify_checkpoint(Path(folder), against))


def edit_json(path: str, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(Path(path).read_text())
    change(values)
    write_json_atomic(Path(path), values)


def sealed(folder: str) -> None:
    """Checksums of what is there now: whoever changed it did so with care."""
    write_manifest(Path(folder))


def refused(folder: str, against: str | None = None) -> str:
    """The error, which must be one sentence of an input artefact."""
    with pytest.raises(CtxextError) as caught:
        lines_of(folder, against)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "\n" not in message
    return message


def set_both_forms(config: dict[str, Any], **changes: Any) -> None:
    """Change the RoPE of a config in both forms; None removes an entry."""
    for form in (config["rope_parameters"], config["rope_scaling"]):
        form.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del form[key]


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_patched_by_any_method_is_in_order(work: Path, tmp_path: Path, method: str) -> None:
    source = str(work / "models" / "tiny")
    patch_checkpoint(source, tmp_path / "out", method=method, target_length=TARGET, **METHODS[method])
    told = lines_of(str(tmp_path / "out"))
    assert "all checksums hold" in told[0]
    assert f"config and tokenizer agree on {TARGET} positions; KV cache on" in told
    assert any(f"{method}, {ORIGINAL} to {TARGET} positions, not trained" in line for line in told)
    assert any(line.startswith("positions in effect") for line in told)
    by_design = method in ("dynamic", "longrope")  # angles follow the sequence's length
    assert sum("logits differ by" in line for line in told) == (1 if by_design else 3)
    assert any("positions back influence the last one" in line for line in told)


@pytest.mark.parametrize("method", ["yarn", "resonance"])
@pytest.mark.parametrize("portable", [True, False])
def test_either_form_is_in_order(work: Path, tmp_path: Path, method: str, portable: bool) -> None:
    source = str(work / "models" / "tiny")
    patch_checkpoint(source, tmp_path / "out", method=method, target_length=TARGET, portable=portable)
    assert any(
        f"attention factor {'1.0000' if portable else '1.0693'}" in line for line in lines_of(str(tmp_path / "out"))
    )


def test_what_a_run_leaves_is_in_order(here: Path) -> None:
    for folder in ("run", "run/adapter", "merged", "portable"):
        told = lines_of(folder, "recipe.yaml" if folder != "portable" else "run/plan.json")
        assert any(line.startswith("positions are those of") for line in told), folder
        assert "all checksums hold" in told[0]
    assert any("adapter complete, and made for its base models/tiny" in line for line in lines_of("run"))


def test_a_checkpoint_of_somebody_else_is_checked_as_far_as_it_can_be(tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain")
    told = lines_of(str(plain))
    assert "no manifest" in told[0]
    assert any(line.startswith("positions in effect") for line in told)
    assert not any("made from" in line for line in told)
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    save_tiny_model(tmp_path / "scaled", max_position_embeddings=512, rope_parameters=scaled)
    assert any("tokens 481 positions back" in line for line in lines_of(str(tmp_path / "scaled")))


def test_a_flipped_bit(here: Path) -> None:
    weights = here / "patched" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.unlink()  # it is a second name of the base's file
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "checksum differs" in refused("patched")


@pytest.mark.parametrize("folder", ["merged", "patched", "run/adapter"])
def test_a_scaling_that_was_removed(here: Path, folder: str) -> None:
    def remove(config: dict[str, Any]) -> None:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        config.pop("rope_scaling", None)

    edit_json(f"{folder}/config.json", remove)
    sealed(folder)
    message = refused(folder)
    assert "other positions than models/tiny with yarn" in message
    assert "got 'default, theta 10000; 256 positions'" in message
    assert "expected yarn factor 2" in message


def test_a_wrong_factor(here: Path) -> None:
    edit_json("merged/config.json", lambda config: set_both_forms(config, factor=4.0))
    sealed("merged")
    message = refused("merged")
    assert "got 'yarn factor 4" in message
    assert "expected yarn factor 2" in message


def test_a_wrong_original_length(here: Path) -> None:
    edit_json("patched/config.json", lambda config: set_both_forms(config, original_max_position_embeddings=16))
    sealed("patched")
    assert "other positions than models/tiny with yarn" in refused("patched")


def test_an_attention_factor_applied_twice(here: Path) -> None:
    """Folded into the weights, and written in the config as well."""
    shutil.copytree("portable", "twice")
    edit_json("twice/config.json", lambda config: set_both_forms(config, attention_factor=1.0693147))
    sealed("twice")
    assert "other positions than models/tiny with yarn" in refused("twice")
    # The stock form beside folded weights does the same.
    shutil.copy("patched/config.json", "portable/config.json")
    sealed("portable")
    assert "other positions than models/tiny with yarn" in refused("portable")


def test_a_folded_attention_factor_that_ctxext_json_does_not_know_of(here: Path) -> None:
    """Weights of the portable form under the stock config: both files agree, only the weights do not."""
    shutil.copy("portable/model.safetensors", "folded.safetensors")
    Path("patched/model.safetensors").unlink()
    shutil.move("folded.safetensors", "patched/model.safetensors")
    sealed("patched")
    assert "the weights are not the base's, although nothing was trained" in refused("patched")


def test_a_kv_cache_that_is_off(here: Path) -> None:
    edit_json("merged/config.json", lambda config: config.update(use_cache=False))
    sealed("merged")
    assert "switches the KV cache off" in refused("merged")


def test_a_tokenizer_that_cuts_below_the_target(here: Path) -> None:
    edit_json("merged/tokenizer_config.json", lambda settings: settings.update(model_max_length=ORIGINAL))
    sealed("merged")
    message = refused("merged")
    assert "tokenizer cuts prompts" in message
    assert "got 128; expected 256" in message


def test_a_config_that_reaches_less_than_the_target(here: Path) -> None:
    edit_json("merged/config.json", lambda config: config.update(max_position_embeddings=ORIGINAL))
    sealed("merged")
    assert "max_position_embeddings" in refused("merged")


@pytest.mark.parametrize("folder", ["merged", "patched", "run/adapter"])
def test_a_base_that_was_swapped(here: Path, folder: str) -> None:
    save_tiny_model(here / "models" / "other", seed=7)
    shutil.rmtree("models/tiny")
    shutil.move("models/other", "models/tiny")
    assert "base model's weights are not the ones" in refused(folder)


def test_a_merge_with_the_positions_of_its_unscaled_base(here: Path) -> None:
    shutil.copy("models/tiny/config.json", "merged/config.json")
    sealed("merged")
    assert "other positions than models/tiny with yarn" in refused("merged")


def test_an_adapter_with_missing_unknown_or_misshapen_weights(here: Path) -> None:
    path = "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    fewer = {name: tensor for name, tensor in tensors.items() if name != first}
    for changed, says in (
        (fewer, "1 weights missing, 0 unknown"),
        ({**fewer, first.replace("layers.0", "layers.9"): tensors[first]}, "1 weights missing, 1 unknown"),
        ({**tensors, first: tensors[first][:-1].contiguous()}, "another shape"),
    ):
        save_file(changed, path)
        sealed("run/adapter")
        assert says in refused("run/adapter")


@pytest.mark.parametrize("folder", ["merged", "portable", "run/adapter"])
def test_another_recipe_or_plan(here: Path, folder: str) -> None:
    recipe = (here / "recipe.yaml").read_text()
    (here / "other.yaml").write_text(recipe.replace("target_length: 256", "target_length: 512"))
    plan = json.loads((here / "run" / "plan.json").read_text())
    plan["rope_parameters"] |= {"rope_type": "linear"}
    (here / "other.json").write_text(json.dumps(plan))
    assert "other positions than other.yaml" in refused(folder, "other.yaml")
    assert "other positions than other.json" in refused(folder, "other.json")
    (here / "no-plan.json").write_text("{}")
    with pytest.raises(UsageError, match=r"not a plan\.json"):
        lines_of(folder, "no-plan.json")


def test_weights_that_are_no_numbers(here: Path) -> None:
    tensors = load_file("merged/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    Path("merged/model.safetensors").unlink()
    save_file(tensors, "merged/model.safetensors", metadata={"format": "pt"})
    sealed("merged")
    assert "does not behave as one with working positions" in refused("merged")


@pytest.mark.parametrize("text", ["{}", "[]", '{"base": {}, "target_length": 256}', "nonsense"])
def test_a_damaged_ctxext_json(here: Path, text: str) -> None:
    (here / "merged" / "ctxext.json").write_text(text)
    sealed("merged")
    assert "ctxext.json" in refused("merged")


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line."""
    monkeypatch.setattr("sys.argv", ["ctxext", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command_ends_with_the_error_and_its_code(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json("merged/config.json", lambda config: set_both_forms(config, factor=4.0))
    sealed("merged")
    for arguments, code, says in (
        (["verify", "patched"], 0, "positions in effect"),
        (["verify", "patched", "--against", "recipe.yaml"], 0, "positions are those of recipe.yaml"),
        (["verify", "merged"], 3, "ctxext: merged/config.json: the checkpoint has other positions than"),
    ):
        assert main(monkeypatch, *arguments) == code
        printed = capsys.readouterr()
        assert says in (printed.err if code else printed.out)
        assert "Traceback" not in printed.err


def test_eval_refuses_prompts_that_an_extended_model_does_not_reach(here: Path) -> None:
    write_suite(here / "long.yaml", {"length": 250, "depths": [0.0], "samples": 1})
    asked = EvaluationRequest("patched", suite="long.yaml", output="out", dtype="float32")
    with pytest.raises(CtxextError) as caught:
        evaluate_models(asked, SilentReporter())
    assert caught.value.exit_code == 2
    assert "take 257 positions (250 + 7); expected at most 256" in str(caught.value)
    assert not Path("out").exists()
    write_suite(here / "long.yaml", {"length": 249, "depths": [0.0], "samples": 1})
    assert evaluate_models(asked, SilentReporter()).exists()
