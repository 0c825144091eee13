"""The command line as people meet it: help at once, and one clear message for everything that is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support import SilentReporter, child_environment, make_job, run_cli, write_suite
from transformers import GPT2Config

from ctxext.pipeline.extend import extend

COMMANDS = ("extend", "plan", "train", "merge", "eval", "report", "verify", "list", "list methods")

# Every command in an interpreter of its own, and none of them loads a library that takes seconds.
HELP_OF_ALL = """
import sys
from ctxext.cli import app
for command in sys.argv[1:]:
    try:
        app([*command.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, (command, end.code)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torch", "transformers", "peft", "datasets", "matplotlib", "scipy"}, loaded
"""

# Loads the libraries once and forks for each command line: the real entry point, without seconds of import each time.
RUN_EACH = """
import json, os, runpy, sys
import ctxext.pipeline.summary, ctxext.pipeline.verify, ctxext.pipeline.evaluate
for number, arguments in enumerate(json.load(open("cases.json"))):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["ctxext", *arguments]
        code = 0
        try:
            runpy.run_module("ctxext.cli", run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    with open(f"{number}.code", "w") as stream:
        stream.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@dataclass(frozen=True)
class Case:
    """A command line, what it must end with and what it must say."""

    arguments: str
    code: int
    says: str


CASES = {
    "a recipe that does not exist": Case("extend quickstrat", 2, r"'quickstrat'.*Did you mean 'quickstart'\?"),
    "a recipe file that does not exist": Case("extend nothing.yaml", 3, r"nothing\.yaml: recipe file not found"),
    "broken YAML": Case("plan broken.yaml", 2, r"broken\.yaml:3: not valid YAML"),
    "several problems at once": Case(
        "plan wrong.yaml", 2, r"4 problems in wrong\.yaml:\n.*wrong\.yaml:3: .*did you mean 'target_length'"
    ),
    "a model without a target": Case("extend models/tiny", 2, r"a model needs --target-length"),
    "a target that is not above the original": Case(
        "plan low.yaml", 2, r"low\.yaml:3: target_length: 100 is not above the model's original length 128"
    ),
    "a target that is not above, from the command line": Case(
        "plan models/tiny --target-length 100", 2, r"target_length: 100 is not above"
    ),
    "an unknown method": Case("plan models/tiny -n 256 --method yarm", 2, r"yarm.*did you mean 'yarn'"),
    "an override without a value": Case("plan recipe.yaml train.steps", 2, r"key\.subkey=value.*'train\.steps'"),
    "an override of nothing": Case("plan recipe.yaml train.stepz=3", 2, r"train\.stepz: unknown key.*'steps'"),
    "a model with learned positions": Case(
        "extend models/gpt2 --target-length 256", 3, r"'gpt2' uses learned absolute positions"
    ),
    "a recipe for a model with learned positions": Case(
        "plan gpt2.yaml", 2, r"gpt2\.yaml:2: model\.source: .*learned absolute positions"
    ),
    "a model folder that does not exist": Case("plan ./nowhere --target-length 256", 3, r"\./nowhere: model not found"),
    "a folder that is no model": Case("plan empty --target-length 256", 3, r"empty: .*no config\.json"),
    "a config that is not JSON": Case(
        "plan models/broken --target-length 256", 3, r"could not read the model's config"
    ),
    "weights cut short": Case(
        "eval models/cut --suite suite.yaml --beyond-reach", 3, r"models/cut: could not load the .*weights"
    ),
    "a suite that does not exist": Case("eval models/tiny --suite quik", 2, r"unknown suite; got 'quik'.*'quick'"),
    "a suite file with a typo": Case("eval models/tiny --suite bad-suite.yaml", 2, r"did you mean 'haystack'"),
    "an unknown dtype": Case("eval models/tiny --dtype float16", 2, r"--dtype: .*'float16'.*bfloat16"),
    "a prompt longer than the haystack": Case(
        "eval models/tiny --suite long.yaml --beyond-reach", 2, r"haystack is shorter"
    ),
    "a prompt longer than the model reaches": Case(
        "eval models/tiny --suite suite.yaml", 2, r"247 positions \(240 \+ 7\); expected at most 128"
    ),
    "merging what is no adapter": Case("merge models/tiny out", 3, r"models/tiny: .*no ctxext\.json"),
    "merging what does not exist": Case("merge nowhere out", 3, r"nowhere: folder not found"),
    "merging a merged checkpoint": Case("merge run/merged out", 3, r"not an adapter folder"),
    "merging into a folder that exists": Case("merge run empty", 3, r"empty: the destination exists already"),
    "merging a damaged adapter": Case(
        "merge damaged/adapter out", 3, r"adapter_model\.safetensors: .*checksum differs"
    ),
    "verifying a damaged checkpoint": Case("verify damaged/merged", 3, r"model\.safetensors: .*checksum differs"),
    "verifying a truncated checkpoint": Case("verify damaged/short", 3, r"model\.safetensors: .*cut short"),
    "verifying what does not exist": Case("verify nowhere", 3, r"nowhere: folder not found"),
    "verifying an empty folder": Case("verify empty", 3, r"no config\.json"),
    "verifying a model without RoPE": Case("verify models/gpt2", 3, r"no rotary positions to verify"),
    "reporting what is no run": Case("report models", 3, r"models: not a run folder"),
    "recording without facts": Case("report run --record baseline", 2, r"--record needs --command and --hardware"),
    "a run folder of another plan": Case(
        "extend recipe.yaml train.steps=3",
        2,
        r"holds a run of another plan.*\n  train.steps +4 +3 +changes results\n.*output_dir=",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every case has run, with its exit code and output."""
    folder = tmp_path_factory.mktemp("cli")
    job = make_job(folder)
    recipe = yaml.safe_load(job.recipe_path.read_text())
    recipe["model"]["source"], recipe["output_dir"], recipe["evaluation"]["suite"] = "models/tiny", "run", "suite.yaml"
    job.recipe_path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        extend(job.recipe(), SilentReporter())
    GPT2Config(n_layer=1, n_head=1, n_embd=8).save_pretrained(folder / "models" / "gpt2")
    (folder / "empty").mkdir()
    (folder / "models" / "broken").mkdir()
    (folder / "models" / "broken" / "config.json").write_text('{"model_type": "llama"')
    (folder / "broken.yaml").write_text("model:\n  source: models/tiny\n rope: [\n")
    (folder / "wrong.yaml").write_text(
        "model:\n  source: models/tiny\ntarget_lenght: 256\ntrain:\n  steps: -1\n  warmup: 0.5\n"
    )
    (folder / "low.yaml").write_text("model:\n  source: models/tiny\ntarget_length: 100\n")
    (folder / "gpt2.yaml").write_text("model:\n  source: models/gpt2\ntarget_length: 256\n")
    write_suite(folder / "bad-suite.yaml", haystak="python-docs")
    write_suite(folder / "long.yaml", {"length": 3_000_000, "depths": [0.5], "samples": 1}, haystack="python-docs")
    cut = Path(shutil.copytree(folder / "models" / "tiny", folder / "models" / "cut")) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    for name, source in (("adapter", "adapter"), ("merged", "merged"), ("short", "merged")):
        copy = Path(shutil.copytree(folder / "run" / source, folder / "damaged" / name))
        (weights,) = copy.glob("*.safetensors")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data[:-8] if name == "short" else data)
    (folder / "cases.json").write_text(json.dumps([case.arguments.split() for case in CASES.values()]))
    subprocess.run([sys.executable, "-c", RUN_EACH], cwd=folder, env=child_environment(), check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_gives_one_clear_message_and_the_exit_code_of_its_kind(outcomes: Path, name: str) -> None:
    case, number = CASES[name], list(CASES).index(name)
    output, errors = ((outcomes / f"{number}.{stream}").read_text() for stream in ("out", "err"))
    assert int((outcomes / f"{number}.code").read_text()) == case.code, errors
    assert re.search(case.says, errors, re.DOTALL), errors
    assert errors.startswith("ctxext: ")
    assert errors.count("ctxext: ") == 1
    assert "Traceback" not in errors + output
    lines = errors.strip().splitlines()
    problems = re.match(r"ctxext: (\d+) problems? in ", errors)
    # Several lines only where there is a list of problems, or a table (below its heading) with a hint under it.
    indented = sum(line.startswith("  ") for line in lines)
    assert len(lines) == (1 + indented + 1 if "  setting " in errors else 1 + indented)
    assert indented == (int(problems[1]) if problems else 2 if "  setting " in errors else 0)


def test_help_of_every_command_works_without_loading_a_heavy_library() -> None:
    command = [sys.executable, "-c", HELP_OF_ALL, *COMMANDS]
    finished = subprocess.run(command, env=child_environment(), text=True, capture_output=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    for word in ("RECIPE|MODEL", "--target-length", "--record", "KEY=VALUE"):
        assert word in finished.stdout


def test_help_is_the_real_commands_and_its_time_is_told(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        finished = run_cli("--help", cwd=tmp_path)
        best = min(best, time.perf_counter() - started)
        assert finished.returncode == 0
    listed = set(re.findall(r"^\W*(\w+) ", finished.stdout, re.MULTILINE))
    assert {command for command in COMMANDS if " " not in command} <= listed
    record_property("seconds_of_help", round(best, 2))
    print(f"ctxext --help: {best:.2f} s, best of 3")


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, ctxext; dir(ctxext); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True, timeout=60)


@pytest.mark.parametrize("arguments", [(), ("extnd",), ("plan",), ("merge", "one"), ("plan", "x", "--no-such-option")])
def test_a_wrong_command_line_is_a_usage_error(arguments: tuple[str, ...], tmp_path: Path) -> None:
    finished = run_cli(*arguments, cwd=tmp_path)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert "Usage" in finished.stdout + finished.stderr


def test_a_bug_is_told_as_one_with_its_traceback() -> None:

    broken = "import sys, ctxext.cli as c; c._recipe = lambda *a: 1 / 0; sys.argv = ['ctxext', 'plan', 'x']; c.main()"
    finished = subprocess.run(
        [sys.executable, "-c", broken], env=child_environment(), text=True, capture_output=True, timeout=60
    )
    assert finished.returncode == 1
    assert "ZeroDivisionError" in finished.stderr
    assert finished.stderr.strip().endswith("please report it with the lines above")


def test_list_methods_names_every_method_with_its_source(tmp_path: Path) -> None:
    finished = run_cli("list", "methods", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert all(word in finished.stdout for word in ("linear", "yarn", "none", "arXiv:2309.00071"))


def test_plan_prints_every_number_and_writes_nothing(outcomes: Path) -> None:
    before = sorted(path.name for path in outcomes.iterdir())
    finished = run_cli("plan", "models/tiny", "--target-length", "512", cwd=outcomes)
    assert finished.returncode == 0, finished.stderr
    for text in ("128 -> 512 (factor 4)", "yarn, attention factor 1.1386", "plan id", "LoRA", "disk"):
        assert text in finished.stdout, finished.stdout
    assert sorted(path.name for path in outcomes.iterdir()) == before


def test_the_whole_job_from_the_command_line_and_again(outcomes: Path) -> None:
    finished = run_cli("extend", "recipe.yaml", "output_dir=run2", "train.trackers=[tensorboard]", cwd=outcomes)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    for text in ("Plan", "[1/4]", "[4/4]", "positions in effect", "Report: run2/report/index.html"):
        assert text in finished.stdout, finished.stdout
    assert (outcomes / "run2" / "report" / "index.html").is_file()
    samples = (outcomes / "run2" / "eval" / "after" / "samples.jsonl").read_bytes()
    merged = run_cli("merge", "run2", "again", cwd=outcomes)
    assert merged.returncode == 0, merged.stderr
    weights = [(outcomes / folder / "model.safetensors").read_bytes() for folder in ("again", "run2/merged")]
    assert weights[0] == weights[1]
    recorded = run_cli("report", "run2", "--record", "baseline", "--command", "c", "--hardware", "h", cwd=outcomes)
    assert recorded.returncode == 0, recorded.stderr
    assert (outcomes / "baseline" / "extended" / "samples.jsonl").read_bytes() == samples
