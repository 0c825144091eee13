"""Bad input of every kind, through the command line: one sentence, the exit code of its kind, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import SilentReporter, file_size_limit, make_job, save_tiny_model
from transformers import GPT2Config

from ctxext import cli
from ctxext.files import write_json_atomic, write_manifest
from ctxext.pipeline.extend import extend

USAGE, ARTEFACT, RESOURCE = 2, 3, 4
Damage = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A command line, in a folder to which `damage` was done first, and what must come of it."""

    arguments: str
    code: int
    says: str
    damage: Damage = lambda folder: None
    largest_file: int | None = None


def in_config(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "model" / "config.json").read_text())
        change(values)
        (folder / "model" / "config.json").write_text(json.dumps(values))  # NaN is written as it is

    return damage


def theta(value: Any) -> Damage:
    return in_config(lambda config: config["rope_parameters"].update(rope_theta=value))


def in_weights(
    change: Callable[[bytes], bytes], file: str = "model/model.safetensors", *, seal: bool = False
) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        if seal:
            write_manifest((folder / file).parent)

    return damage


def without_a_tensor(folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)
    write_manifest(path.parent)


def with_another_base(folder: Path) -> None:
    save_tiny_model(folder / "another", seed=3)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / "another" / file, folder / "model" / file)


def without_its_base(folder: Path) -> None:
    path = folder / "adapter" / "ctxext.json"
    provenance = json.loads(path.read_text())
    provenance["base"]["source"] = "./gone"
    path.write_text(json.dumps(provenance))
    write_manifest(path.parent)


def without_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def sharded(index: dict[str, Any]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model" / "model.safetensors").rename(folder / "model" / "model-00001-of-00001.safetensors")
        write_json_atomic(folder / "model" / "model.safetensors.index.json", index)

    return damage


PATCH, PLAN = "patch model out -n 256", "plan model -n 256"
MAP = "-m longrope long_factor"
CASES = {
    # Methods and lengths.
    "a factor below 1": Case(f"{PATCH} factor=0.5", USAGE, r"factor: .*greater than or equal to 1; got 0\.5"),
    "a factor that is NaN": Case(f"{PATCH} factor=.nan", USAGE, r"factor: .*finite number; got nan"),
    "a factor that is infinite": Case(f"{PATCH} factor=.inf", USAGE, r"factor: .*finite number; got inf"),
    "a factor that is a word": Case(f"{PATCH} factor=two", USAGE, r"factor: .*valid number; got 'two'"),
    "a factor that contradicts the lengths": Case(f"{PATCH} factor=3.0", USAGE, r"contradicts .*expected 2 \(target"),
    "a parameter that is NaN": Case(f"{PATCH} beta_fast=.nan", USAGE, r"beta_fast: .*finite number; got nan"),
    "an unknown parameter": Case(f"{PATCH} beta_fsat=9", USAGE, r"'beta_fsat'.*Did you mean 'beta_fast'\?"),
    "an unknown method": Case(f"{PATCH} -m yarm", USAGE, r"'yarm'.*Did you mean 'yarn'\?"),
    "a setting without a value": Case(f"{PATCH} beta_fast=", USAGE, r"beta_fast"),
    "a target at the original": Case("patch model out -n 128", USAGE, r"got 128; expected more than 128"),
    "a target below the original": Case("patch model out -n 100", USAGE, r"got 100; expected more than 128"),
    "a target of nothing": Case("patch model out -n 0", USAGE, r"got 0; expected more than 128"),
    "a negative target": Case("patch model out -n -8", USAGE, r"got -8; expected more than 128"),
    "too few factors": Case(f"{PATCH} {MAP}=[1.0,2.0]", USAGE, r"got '2 entries'; expected 8 \(half of 16"),
    "too many factors": Case(f"{PATCH} {MAP}={[1.0] * 9}".replace(", ", ","), USAGE, r"got '9 entries'; expected 8"),
    "ranges of two lengths": Case(f"{PATCH} {MAP}=[1.0,2.0] short_factor=[1.0]", USAGE, r"1 entries and long_factor 2"),
    "factors that are not positive": Case(f"{PATCH} {MAP}=[0.0,1.0]", USAGE, r"long_factor\.0: .*greater than 0"),
    "no factors": Case(f"{PATCH} -m longrope", USAGE, r"long_factor: .*required"),
    "a file of factors that is missing": Case(
        f"{PATCH} -m longrope file=none.json", USAGE, r"none\.json cannot be read"
    ),
    "a control arm by accident": Case(f"{PATCH} -m none", USAGE, r"control: .*required"),
    "a portable form that there is none of": Case(f"{PATCH} -m dynamic --portable", ARTEFACT, r"no portable form"),
    "a choice that there is none of": Case(f"{PATCH} --on-existing keep", USAGE, r"'keep'.*refuse, replace or compose"),
    # The same through a recipe's checks, which list everything at once.
    "planning a factor below 1": Case(f"{PLAN} rope.factor=0.5", USAGE, r"rope\.factor: .*greater than or equal to 1"),
    "planning a factor that is NaN": Case(f"{PLAN} rope.factor=.nan", USAGE, r"rope\.factor: .*finite number"),
    "planning an unknown parameter": Case(f"{PLAN} rope.beta_fsat=9", USAGE, r"did you mean 'beta_fast'"),
    "planning for a low target": Case("plan model -n 128", USAGE, r"128 is not above .* original length 128"),
    "planning with too few factors": Case(f"{PLAN} -m longrope rope.long_factor=[1.0]", USAGE, r"'1 entries'.*8"),
    "planning without a length": Case(
        PLAN, ARTEFACT, r"max_position_embeddings: .*got -1", in_config(lambda c: c.update(max_position_embeddings=-1))
    ),
    "extending with weights cut short": Case(
        "extend model -n 256 output_dir=out train.steps=1 evaluation.before=false",
        ARTEFACT,
        r"model: could not load the model's weights",
        in_weights(lambda data: data[:-9]),
    ),
    # Configs.
    "a length that is missing": Case(
        PATCH,
        ARTEFACT,
        r"max_position_embeddings: .*does not say how many positions.*would assume 2048",
        in_config(lambda config: config.pop("max_position_embeddings")),
    ),
    "a length that is no number": Case(
        PATCH,
        ARTEFACT,
        r"could not read the model's config .*max_position_embeddings",
        in_config(lambda config: config.update(max_position_embeddings="128")),
    ),
    "a length that is negative": Case(
        PATCH, ARTEFACT, r"got -1; expected a positive", in_config(lambda c: c.update(max_position_embeddings=-1))
    ),
    "a base that was lost": Case(
        PATCH,
        ARTEFACT,
        r"rope_theta: the RoPE parameters .* lost their base.*would assume 10000",
        in_config(lambda config: config["rope_parameters"].pop("rope_theta")),
    ),
    "a base that is null": Case(PATCH, ARTEFACT, r"does not say its RoPE base", theta(None)),
    "a base that is NaN": Case(PATCH, ARTEFACT, r"does not say its RoPE base; got nan", theta(float("nan"))),
    "a base that is a word": Case(PATCH, ARTEFACT, r"does not say its RoPE base; got '10000'", theta("10000")),
    "a base of 1": Case(PATCH, ARTEFACT, r"does not say its RoPE base; got 1", theta(1)),
    "a RoPE of an unknown kind": Case(
        PATCH,
        ARTEFACT,
        r"kind that ctxext does not know.*'spiral'",
        in_config(lambda c: c["rope_parameters"].update(rope_type="spiral")),
    ),
    "a config that is not JSON": Case(
        PATCH, ARTEFACT, r"could not read the model's config", lambda f: (f / "model/config.json").write_text("{")
    ),
    "a tokenizer config that is not JSON": Case(
        PATCH,
        ARTEFACT,
        r"^ctxext: model/tokenizer_config\.json:1: not valid JSON",
        lambda f: (f / "model/tokenizer_config.json").write_text("{"),
    ),
    "a model without RoPE": Case(
        PATCH, ARTEFACT, r"'gpt2' uses learned absolute positions", lambda f: GPT2Config().save_pretrained(f / "model")
    ),
    # Weights.
    "weights cut short": Case(PATCH, ARTEFACT, r"model\.safetensors: .*cut short", in_weights(lambda data: data[:-9])),
    "weights that are empty": Case(PATCH, ARTEFACT, r"cut short; got '0 bytes'", in_weights(lambda data: b"")),
    "weights with a broken header": Case(
        PATCH, ARTEFACT, r"header is not JSON", in_weights(lambda data: data[:20] + b"\xff" + data[21:])
    ),
    "weights with a header of any length": Case(
        PATCH, ARTEFACT, r"not a safetensors file", in_weights(lambda data: b"\xff" * 8 + data[8:])
    ),
    "weights with bytes at the end": Case(
        PATCH, ARTEFACT, r"after the last tensor", in_weights(lambda data: data + b"\0" * 9)
    ),
    "pickled weights": Case(PATCH, ARTEFACT, r"not stored as safetensors", without_weights),
    "an index that names nothing there": Case(
        PATCH,
        ARTEFACT,
        r"names a shard that is missing",
        sharded({"weight_map": {"model.norm.weight": "no.safetensors"}}),
    ),
    "an index that leaves its folder": Case(
        PATCH, ARTEFACT, r"outside its folder", sharded({"weight_map": {"model.norm.weight": "../no.safetensors"}})
    ),
    "an index that says nothing": Case(PATCH, ARTEFACT, r"no weight_map", sharded({})),
    "verifying weights cut short": Case(
        "verify model", ARTEFACT, r"model: could not load the model's weights", in_weights(lambda data: data[:-9])
    ),
    # Adapters.
    "an adapter of another base": Case(
        "merge adapter out", ARTEFACT, r"not the ones that were trained", with_another_base
    ),
    "verifying an adapter of another base": Case(
        "verify adapter", ARTEFACT, r"not the ones that were trained on", with_another_base
    ),
    "an adapter without its base": Case("merge adapter out", ARTEFACT, r"\./gone: model not found", without_its_base),
    "an adapter with missing keys": Case(
        "merge adapter out", ARTEFACT, r"does not fit the model \(1 weights missing", without_a_tensor
    ),
    "verifying an adapter with missing keys": Case(
        "verify adapter", ARTEFACT, r"does not fit the model \(1 weights missing", without_a_tensor
    ),
    "an adapter cut short": Case(
        "merge adapter out",
        ARTEFACT,
        r"cut short or grew",
        in_weights(lambda d: d[:-9], "adapter/adapter_model.safetensors"),
    ),
    "an adapter cut short, with new checksums": Case(
        "merge adapter out",
        ARTEFACT,
        r"adapter_model\.safetensors: .*cut short",
        in_weights(lambda d: d[:-9], "adapter/adapter_model.safetensors", seal=True),
    ),
    "an adapter of another program": Case(
        "merge adapter out", ARTEFACT, r"no ctxext\.json", lambda f: (f / "adapter/ctxext.json").unlink()
    ),
    "a model taken for an adapter": Case("merge model out", ARTEFACT, r"no ctxext\.json"),
    # Places.
    "patching into a folder that exists": Case("patch model adapter -n 256", ARTEFACT, r"adapter: .*exists already"),
    "patching into the source": Case("patch model model -n 256", ARTEFACT, r"model: .*exists already"),
    "merging into a folder that exists": Case("merge adapter model", ARTEFACT, r"model: .*exists already"),
    "patching below a file": Case(
        "patch model file/out -n 256", RESOURCE, r"file/out: could not create", lambda f: (f / "file").write_text("")
    ),
    "patching to nowhere": Case("patch model -n 256", USAGE, r"writes one new folder; got 'none'"),
    "patching to two places": Case("patch model a b -n 256", USAGE, r"writes one new folder; got 'a b'"),
    "patching what is not there": Case("patch ./nothing out -n 256", ARTEFACT, r"\./nothing: model not found"),
    "verifying what is not there": Case("verify nothing", ARTEFACT, r"nothing: folder not found"),
    # A disk that is full: small files still fit, weights do not; and not even small ones.
    "a full disk for weights": Case(
        f"{PATCH} --portable", RESOURCE, r"could not write the weights", largest_file=50_000
    ),
    "a full disk for a config": Case(PATCH, RESOURCE, r"out: could not write", largest_file=900),
    "a full disk for a merge": Case("merge adapter out", RESOURCE, r"could not write the weights", largest_file=50_000),
    "a full disk for a merge's tokenizer": Case(
        "merge adapter out --dtype bfloat16", RESOURCE, r"could not write", largest_file=5_000
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and an adapter that was trained on it."""
    job = make_job(tmp_path_factory.mktemp("job"))
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(job.folder / "models" / "tiny", folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = job.recipe("model.source=model", f"output_dir={job.output}", "train.steps=1")
        extend(recipe, SilentReporter(), last_stage="train")
    shutil.copytree(job.output / "adapter", folder / "adapter")
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a folder of its own."""
    folder = Path(shutil.copytree(prepared, tmp_path / "here"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line, run by its entry point."""
    monkeypatch.setattr("sys.argv", ["ctxext", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def everything_below(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def test_bad_input(here: Path, case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    case.damage(here)
    before = everything_below(here)
    capfd.readouterr()
    with nullcontext() if case.largest_file is None else file_size_limit(case.largest_file):
        code = main(monkeypatch, *case.arguments.split())
    printed = capfd.readouterr().err.strip()
    assert code == case.code, printed
    assert printed.startswith("ctxext: ")
    assert "Traceback" not in printed
    assert re.search(case.says, printed), printed
    listed = re.match(r"ctxext: (\d+) problems? in ", printed)
    assert len(printed.splitlines()) == (1 + int(listed[1]) if listed else 1), printed
    left = everything_below(here)
    if case.arguments.startswith("extend"):  # a run folder tells how its run ended
        assert json.loads(left.pop("out/status.json") or b"")["exit_code"] == case.code
        left = {name: content for name, content in left.items() if name.split("/")[0] != "out"}
    assert left == before


def test_a_source_that_says_too_little_or_two_things_is_extended_with_a_word_about_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama 2's first config said 2048 positions, its generation config 4096; many older ones name no RoPE base."""
    monkeypatch.setenv("COLUMNS", "300")
    in_config(lambda config: config.pop("rope_parameters"))(here)
    assert main(monkeypatch, "patch", "model", "assumed", "-n", "256") == 0
    assert "does not say its RoPE base; its family's default 10000 is assumed" in capsys.readouterr().out
    in_config(lambda config: config.update(max_position_embeddings=64, rope_theta=5000.0))(here)
    for file, key in (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length")):
        values = json.loads((here / "model" / file).read_text())
        (here / "model" / file).write_text(json.dumps({**values, key: 128}))
    assert main(monkeypatch, "patch", "model", "doubtful", "-n", "256") == 0
    told = capsys.readouterr().out
    assert "the config says 64 positions, its tokenizer 128" in told
    assert "the config says 64 positions, its generation config 128" in told
    assert "correct max_position_embeddings before extending it" in told
    assert "RoPE base" not in told
    written = json.loads((here / "doubtful" / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 5000.0
