"""A reader is called right only when it is, and every known mistake gets its own name.

The readers themselves are run by `make test-readers`; here one is asked for real where its environment is there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import byte_tokenizer, save_tiny_model, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from ctxext.errors import ArtefactError, PositionsNotInEffectError, ResourceError, UsageError
from ctxext.export.checkpoint import write_both_forms
from ctxext.export.gguf import export_gguf
from ctxext.export.reader_environments import (
    READERS,
    READERS_DIR_VARIABLE,
    Environment,
    Question,
    ask,
    create_environment,
    creation_commands,
    cuda_packages,
    find_environment,
    last_line,
    readers_directory,
)
from ctxext.export.readers import (
    CANNOT_TELL,
    DEFAULT_THETA,
    DIFFERS,
    DROPS,
    FAILED,
    IGNORES,
    INVERTS,
    NOT_ASKED,
    OWN_FACTOR,
    RIGHT,
    SQUARES,
    ask_about,
    classify,
    layers_for,
    prepare_trial,
    prompt_ids,
    prompt_length,
    require_right,
    verdict_table,
    verify_readers,
    wrong_readings,
)
from ctxext.export.slicing import layers_that_show_everything, slice_layers
from ctxext.files import read_json, shipped_directory, write_json_atomic
from ctxext.model.load import quiet
from ctxext.rope.patchers import extend_config

MISTAKES = (IGNORES, DEFAULT_THETA, DROPS, SQUARES, INVERTS, OWN_FACTOR)
RNG = np.random.default_rng(0)
EXPECTED = {name: -5 + RNG.normal(size=50) for name in (RIGHT, *MISTAKES)}


def extended(folder: Path, *, num_layers: int = 2, provenance: bool = True, **method: Any) -> Path:
    """A tiny random Llama taken from 128 to 512 positions, saved with both config forms and its tokenizer."""
    config = extend_config(tiny_config(num_hidden_layers=num_layers), target_length=512, **method)
    model = tiny_model(num_hidden_layers=num_layers, rope_parameters=config.rope_parameters)
    with torch.no_grad():  # large enough for positions to matter
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight *= 12
    model.config = config
    with quiet():
        model.save_pretrained(folder)
    write_both_forms(folder)
    byte_tokenizer().save_pretrained(folder)
    if provenance:
        write_json_atomic(folder / "ctxext.json", {"original_length": 128, "target_length": 512})
    return folder


@pytest.fixture(scope="module")
def yarn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extended(tmp_path_factory.mktemp("readers") / "yarn", method="yarn")


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A real virtual environment for transformers 4 that holds no package at all."""
    folder = tmp_path_factory.mktemp("environments") / "transformers4"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    return Environment(READERS["transformers4"], folder, "4.57.6")


@pytest.mark.parametrize("said", [RIGHT, *MISTAKES])
@pytest.mark.parametrize("noise", [0.0, 5e-4], ids=["exact", "rounding"])
def test_every_reading_gets_its_own_name(said: str, noise: float) -> None:
    observed = EXPECTED[said] + noise * RNG.choice([-1.0, 1.0], size=50)
    assert classify(observed, EXPECTED) == (said, "")


def test_right_needs_agreement_within_the_noise_floor() -> None:
    verdict, detail = classify(EXPECTED[RIGHT] + 2e-3, EXPECTED)
    assert verdict == DIFFERS
    assert "by 0.002 on average" in detail
    assert "nearest is 'right'" in detail


def test_a_mistake_that_is_by_far_the_nearest_is_named_through_noise() -> None:
    verdict, detail = classify(EXPECTED[SQUARES] + 0.05, EXPECTED)
    assert (verdict, detail) == (SQUARES, "within 5.0e-02")
    halfway = (EXPECTED[SQUARES] + EXPECTED[RIGHT]) / 2
    assert classify(halfway, EXPECTED)[0] == DIFFERS


def test_nothing_is_called_right_where_unscaled_looks_the_same() -> None:
    alike = {**EXPECTED, IGNORES: EXPECTED[RIGHT] + 3.9e-3}
    verdict, detail = classify(EXPECTED[RIGHT], alike)
    assert verdict == CANNOT_TELL
    assert "3.9e-03" in detail
    assert "4e-03" in detail
    assert classify(EXPECTED[RIGHT], {**EXPECTED, IGNORES: EXPECTED[RIGHT] + 4.1e-3})[0] == RIGHT
    assert classify(EXPECTED[RIGHT], {RIGHT: EXPECTED[RIGHT]})[0] == CANNOT_TELL


def test_a_mistake_too_small_to_be_seen_is_mentioned() -> None:
    verdict, detail = classify(EXPECTED[RIGHT], {**EXPECTED, DROPS: EXPECTED[RIGHT] + 1e-4})
    assert (verdict, detail) == (RIGHT, f"too small to be seen here: {DROPS}")


def test_numbers_that_are_not_finite_are_never_right() -> None:
    observed = EXPECTED[RIGHT].copy()
    observed[3] = np.nan
    assert classify(observed, EXPECTED)[0] == DIFFERS


@pytest.mark.parametrize(
    ("method", "mistakes"),
    [
        ({"method": "yarn"}, {IGNORES, DROPS, SQUARES, INVERTS}),
        ({"method": "yarn", "attention_factor": 1.3}, {IGNORES, DROPS, SQUARES, INVERTS, OWN_FACTOR}),
        ({"method": "linear"}, {IGNORES}),
        ({"method": "llama3"}, {IGNORES}),
        ({"method": "theta"}, {IGNORES}),
    ],
    ids=["yarn", "yarn, factor given", "linear", "llama3", "theta"],
)
def test_wrong_readings_are_those_that_change_something(method: dict[str, Any], mistakes: set[str]) -> None:
    config = extend_config(tiny_config(), target_length=512, **method)
    before = dict(config.rope_parameters)
    assert set(wrong_readings(config, {None: 10000.0})) == mistakes
    assert config.rope_parameters == before
    other_theta = extend_config(
        tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), target_length=512, **method
    )
    assert set(wrong_readings(other_theta, {None: 5e5})) == mistakes | {DEFAULT_THETA}


def test_attention_factors_of_the_wrong_readings() -> None:
    config = extend_config(tiny_config(), method="yarn", target_length=512)
    factor = 1.138629436111989  # 0.1 ln 4 + 1, from the original authors' code
    wrong = {name: c.rope_parameters.get("attention_factor") for name, c in wrong_readings(config).items()}
    assert wrong == pytest.approx({IGNORES: None, DROPS: 1.0, SQUARES: factor**2, INVERTS: 1 / factor})


def test_layer_types_are_mistaken_each_for_itself() -> None:
    config = Gemma3TextConfig(num_hidden_layers=6)
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 2.0,
            "original_max_position_embeddings": 512,
        },
    }
    config.rope_parameters = nested
    wrong = wrong_readings(config)[DROPS].rope_parameters
    assert wrong["sliding_attention"] == nested["sliding_attention"]
    assert wrong["full_attention"] == {**nested["full_attention"], "attention_factor": 1.0}


def test_the_mistakes_on_purpose_are_what_models_built_that_way_compute(yarn: Path, tmp_path: Path) -> None:
    trial = prepare_trial(yarn, tmp_path, 200, 20, 2)
    assert set(trial.expected) == {RIGHT, IGNORES, DROPS, SQUARES, INVERTS}
    ids = torch.tensor([trial.ids])
    num_compared = 0
    for name, config in {
        RIGHT: AutoConfig.from_pretrained(yarn),
        **wrong_readings(AutoConfig.from_pretrained(yarn)),
    }.items():
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(yarn, config=config, dtype=torch.float32)
        with torch.no_grad():
            table = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
        scores = np.array([float(table[place - 1, ids[0, place]]) for place in range(180, 200)])
        assert np.abs(scores - trial.expected[name]).max() < 1e-4
        others = [np.abs(trial.expected[name] - other).mean() for key, other in trial.expected.items() if key != name]
        assert min(others) > 4e-3
        num_compared += 1
    assert num_compared == 5


def test_a_larger_theta_is_compared_with_the_base_where_that_is_there(tmp_path: Path) -> None:
    theta = extended(tmp_path / "theta", method="theta", theta=80000.0)
    assert set(prepare_trial(theta, tmp_path, 200, 20, 2).expected) == {RIGHT, DEFAULT_THETA}
    base = save_tiny_model(tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    write_json_atomic(theta / "ctxext.json", {"original_length": 128, "base": {"source": str(base)}})
    assert set(prepare_trial(theta, tmp_path, 200, 20, 2).expected) == {RIGHT, IGNORES, DEFAULT_THETA}


def gemma(folder: Path) -> Path:
    """A tiny random Gemma 3, one RoPE per layer type, whose full-attention layers were taken from 128 to 512."""
    config = Gemma3TextConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=64, max_position_embeddings=128, initializer_range=0.1,
        bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(extend_config(config, method="yarn", target_length=512))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight += 2
    with quiet():
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_one_rope_per_layer_type_can_be_asked_about(tmp_path: Path) -> None:
    trial = prepare_trial(gemma(tmp_path / "gemma"), tmp_path, 400, 50, 6)
    assert set(trial.expected) == {RIGHT, IGNORES, DEFAULT_THETA, DROPS, SQUARES, INVERTS}
    assert {classify(scores, trial.expected)[0] for scores in trial.expected.values()} == set(trial.expected)


def test_what_a_reader_cannot_open_is_not_asked_and_says_why(tmp_path: Path) -> None:
    trial = prepare_trial(gemma(tmp_path / "gemma"), tmp_path, 300, 20, 6)
    environment = Environment(READERS["llamacpp"], tmp_path / "nowhere", "1")
    (verdict,) = ask_about(environment, [trial], 60)
    assert verdict.verdict == NOT_ASKED
    assert "Llama family" in verdict.detail
    assert not verdict.is_right


def test_prompt_length_lies_between_the_lengths(yarn: Path, tmp_path: Path) -> None:
    assert prompt_length(yarn) == 384  # 256 beyond the original 128
    assert prompt_length(yarn, 511) == 511
    for wrong in (128, 512):
        with pytest.raises(UsageError, match=f"longer than the original length.*got {wrong}; expected 129 to 511"):
            prompt_length(yarn, wrong)
    (without := tmp_path / "yarn").mkdir()
    (without / "config.json").write_bytes((yarn / "config.json").read_bytes())
    assert prompt_length(without) == 384  # from original_max_position_embeddings
    linear = extended(tmp_path / "linear", method="linear", provenance=False)
    with pytest.raises(ArtefactError, match=r"does not say which length.*Give it with --original-length"):
        prompt_length(linear)
    assert prompt_length(linear, original_length=128) == 384
    with pytest.raises(ArtefactError, match="holds no config"):  # never taken for a model of the hub
        prompt_length(tmp_path / "missing")


def test_the_prompt_is_prose_of_exact_length_and_the_same_each_time(yarn: Path) -> None:
    ids = prompt_ids(yarn, 1000)
    assert len(ids) == 1000
    assert ids == prompt_ids(yarn, 1200)[:1000]
    assert "the" in byte_tokenizer().decode(ids).split()


def test_a_vocabulary_of_words_gets_words_it_knows() -> None:
    from transformers import AutoTokenizer

    tiny = shipped_directory("recipes") / "tiny"
    ids = prompt_ids(tiny, 300)
    assert AutoTokenizer.from_pretrained(tiny).unk_token_id not in ids
    assert len(set(ids)) > 30


def test_a_slice_is_the_model_without_its_later_layers(tmp_path: Path) -> None:
    whole = extended(tmp_path / "whole", num_layers=4, method="yarn")
    part = slice_layers(whole, tmp_path / "part", 2)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(whole)
        model.model.layers = model.model.layers[:2]
        sliced = AutoModelForCausalLM.from_pretrained(part)
    ids = torch.arange(40)[None] % 256
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, sliced(ids, use_cache=False).logits)
    assert {path.name for path in part.iterdir()} == {path.name for path in whole.iterdir()}
    assert read_json(part / "config.json") == {**read_json(whole / "config.json"), "num_hidden_layers": 2}


def test_a_slice_cuts_lists_by_layer_and_keeps_every_kind_of_layer(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=kinds, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    assert layers_that_show_everything(config) == 3
    with quiet():
        Gemma3ForCausalLM(config).save_pretrained(tmp_path / "whole")
    slice_layers(tmp_path / "whole", tmp_path / "part", 3)
    assert read_json(tmp_path / "part" / "config.json")["layer_types"] == kinds[:3]
    assert layers_that_show_everything(tiny_config(num_hidden_layers=1)) == 1


def test_a_slice_of_layers_that_are_not_there_is_refused(yarn: Path, tmp_path: Path) -> None:
    for wrong in (0, 3):
        with pytest.raises(UsageError, match=r"no such number of layers.*expected 1 to 2"):
            slice_layers(yarn, tmp_path / "part", wrong)
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_bytes((yarn / "config.json").read_bytes())
    tensors = load_file(yarn / "model.safetensors")
    save_file({name.replace("layers", "stages"): value for name, value in tensors.items()}, odd / "model.safetensors")
    with pytest.raises(ArtefactError, match="no numbered layers"):
        slice_layers(odd, tmp_path / "part", 1)
    assert not (tmp_path / "part").exists()


def test_slow_readers_are_asked_about_a_slice(tmp_path: Path) -> None:
    deep = extended(tmp_path / "deep", num_layers=4, method="yarn")
    assert layers_for(READERS["mlx"], deep, 384) == 4
    assert layers_for(READERS["mlx"], deep, 10**7) == 2
    assert layers_for(READERS["llamacpp"], deep, 10**6) == 4


def test_environments_are_looked_for_where_the_user_says(tmp_path: Path) -> None:
    assert readers_directory({READERS_DIR_VARIABLE: str(tmp_path)}) == tmp_path
    assert readers_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "ctxext" / "readers"
    assert readers_directory({}) == Path.home() / ".cache" / "ctxext" / "readers"


def test_a_missing_or_empty_environment_is_one_clear_error(tmp_path: Path, empty_environment: Environment) -> None:
    with pytest.raises(ArtefactError, match=r"no environment for reader 'mlx'.*--create.*CTXEXT_READERS_DIR"):
        find_environment(READERS["mlx"], tmp_path)
    with pytest.raises(ArtefactError, match=r"lacks its package; got '.*PackageNotFoundError.*; expected transformers"):
        find_environment(READERS["transformers4"], empty_environment.folder.parent)


def test_unknown_readers_and_missing_environments_are_refused_before_any_work(
    yarn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(READERS_DIR_VARIABLE, str(tmp_path))
    said: list[str] = []
    with pytest.raises(UsageError, match=r"unknown reader; got 'lamacpp'.*Did you mean 'llamacpp'"):
        verify_readers(yarn, ["lamacpp"], report=said.append)
    with pytest.raises(ArtefactError, match="no environment for reader 'vllm'"):
        verify_readers(yarn, ["vllm"], report=said.append)
    with pytest.raises(UsageError, match="no reader was named"):
        verify_readers(yarn, [], report=said.append)
    assert said == []


@pytest.mark.parametrize("name", READERS)
def test_creation_installs_pinned_versions_into_the_readers_own_environment(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    venv, *rest = creation_commands(reader, tmp_path / name, "TORCH-INDEX")
    assert venv == [sys.executable, "-m", "venv", str(tmp_path / name)]
    assert all(Path(command[0]).is_relative_to(tmp_path / name) for command in rest)
    packages = [word for command in rest for word in command[3:] if "==" in word]
    assert any(word.startswith(f"{reader.distribution}==") for word in packages)
    with_torch = [command for command in rest if "torch==2.13.0" in command]
    assert [command for command in rest if "TORCH-INDEX" in command] == with_torch
    if name in ("transformers4", "vllm"):
        assert with_torch == rest[:1]  # first and alone, so that nothing else brings its own
    assert "TORCH-INDEX" not in str(creation_commands(reader, tmp_path / name))


def test_cuda_libraries_are_seen_in_pips_report() -> None:
    names = ["torch", "nvidia-cublas", "numpy", "nvidia_cudnn_cu13"]
    report = {"install": [{"metadata": {"name": name}} for name in names]}
    assert cuda_packages(report) == ["nvidia-cublas", "nvidia_cudnn_cu13"]
    assert cuda_packages({"install": []}) == []


def test_creation_touches_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "llamacpp").mkdir()
    (tmp_path / "llamacpp" / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="this is no environment"):
        create_environment(READERS["llamacpp"], tmp_path)
    assert (tmp_path / "llamacpp" / "notes.txt").read_text() == "mine"


def test_an_interrupted_creation_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tmp_path / "llamacpp"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(half)], check=True, timeout=120)
    write_json_atomic(half / "ctxext-reader.json", {"reader": "llamacpp", "finished": False})
    (half / "leftover").touch()
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # this far and no farther: pip finds nothing to install
    said: list[str] = []
    with pytest.raises(ResourceError, match=r"could not create the environment for reader 'llamacpp'.*--create"):
        create_environment(READERS["llamacpp"], tmp_path, said.append)
    assert not (half / "leftover").exists()
    assert len(said) == 2


def test_a_reader_that_cannot_start_fails_in_one_line(empty_environment: Environment, yarn: Path) -> None:
    question = Question(yarn, (1, 2, 3), 1)
    first, second = ask(empty_environment, [question, question], timeout_seconds=60)
    assert first == second
    assert first.log_probs is None
    assert first.error == "exit code 1: ModuleNotFoundError: No module named 'torch'"
    assert "Traceback" in (empty_environment.folder / "last-failure.txt").read_text()


def test_a_reader_that_does_not_answer_in_time_is_ended(empty_environment: Environment, yarn: Path) -> None:
    (answer,) = ask(empty_environment, [Question(yarn, (1, 2, 3), 1)], timeout_seconds=0.001)
    assert answer.error == "no answer within 0.001 seconds"


def test_a_failed_reader_has_a_verdict_and_a_place_in_the_table(
    empty_environment: Environment, yarn: Path, tmp_path: Path
) -> None:
    (verdict,) = ask_about(empty_environment, [prepare_trial(yarn, tmp_path, 200, 20, 2)], 60)
    assert (verdict.verdict, verdict.is_right, verdict.mean_difference) == (FAILED, False, None)
    assert "No module named 'torch'" in verdict.detail
    assert verdict.unscaled_mean is not None
    assert verdict_table([verdict]).row_count == 1
    require_right(yarn, [])
    with pytest.raises(PositionsNotInEffectError, match=r"not every reader.*transformers4 4\.57\.6 failed.*--portable"):
        require_right(yarn, [verdict])


@pytest.mark.parametrize(
    ("stderr", "line"),
    [
        ("Traceback\n  File x\nValueError: bad\nI ~Server: exited\n", "ValueError: bad"),
        ("loading\nkilled\n\n", "killed"),
        (
            "ERROR: No matching distribution found for x\n[notice] a new pip\n",
            "ERROR: No matching distribution found for x",
        ),
        ("", ""),
    ],
)
def test_the_line_that_tells(stderr: str, line: str) -> None:
    assert last_line(stderr) == line


def present(*names: str) -> list[Any]:
    """The readers whose environments CTXEXT_READERS_DIR holds; the rest is skipped and says why."""
    root = os.environ.get(READERS_DIR_VARIABLE)
    reason = f"{READERS_DIR_VARIABLE} names no folder with an environment for it (make test-readers creates them)"
    missing = pytest.mark.skipif
    return [
        pytest.param(name, marks=missing(not (root and Path(root, name).exists()), reason=f"{name}: {reason}"))
        for name in names
    ]


@pytest.mark.parametrize("name", present("llamacpp"))
def test_a_real_reader_is_right(name: str, yarn: Path) -> None:
    (verdict,) = verify_readers(yarn, [name], num_tokens=300)
    assert verdict.verdict == RIGHT
    assert verdict.mean_difference is not None
    assert verdict.unscaled_mean is not None
    assert verdict.mean_difference < 1e-3 < verdict.unscaled_mean
    assert (verdict.num_tokens, verdict.num_scored, verdict.num_layers) == (300, 50, 2)


@pytest.mark.parametrize("name", present("llamacpp"))
def test_a_file_that_lost_its_scaling_is_caught(name: str, yarn: Path, tmp_path: Path) -> None:
    unscaled = tmp_path / "unscaled"
    unscaled.mkdir()
    for file in yarn.iterdir():
        (unscaled / file.name).write_bytes(file.read_bytes())
    config = read_json(yarn / "config.json")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    write_json_atomic(unscaled / "config.json", {**config, "rope_scaling": None})
    export_gguf(unscaled, tmp_path / "unscaled.gguf", dtype="float32")
    trial = prepare_trial(yarn, tmp_path, 300, 50, 2)
    question = Question(tmp_path / "unscaled.gguf", trial.ids, trial.num_scored)
    (answer,) = ask(find_environment(READERS[name]), [question], timeout_seconds=600)
    assert answer.log_probs is not None
    assert classify(np.array(answer.log_probs), trial.expected) == (IGNORES, "")


@pytest.mark.parametrize("name", present("transformers4"))
def test_a_real_reader_that_is_wrong_is_caught(name: str, yarn: Path, tmp_path: Path) -> None:
    older = extended(tmp_path / "yarn", method="yarn")
    config = read_json(older / "config.json")
    del config["rope_theta"], config["rope_scaling"]  # all that transformers 4 looks at
    write_json_atomic(older / "config.json", config)
    trials = [prepare_trial(folder, tmp_path, 300, 50, 2) for folder in (yarn, older)]
    right, wrong = ask_about(find_environment(READERS[name]), trials, 600)
    assert (right.verdict, wrong.verdict) == (RIGHT, IGNORES)
