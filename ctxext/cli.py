"""The command line: parses, calls, maps errors to exit codes. No logic of its own, and no torch before it is needed."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated

import typer

from ctxext.errors import CtxextError, UsageError, exit_code_of

if TYPE_CHECKING:
    from ctxext.pipeline.console import ConsoleReporter
    from ctxext.recipe.schema import Recipe

app = typer.Typer(
    name="ctxext",
    help="Extend the context window of a pretrained language model, and prove that it works.",
    epilog="An argument that ends in .yaml or names a shipped recipe is a recipe, anything else is a model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
list_app = typer.Typer(help="Show what is available.", no_args_is_help=True)
app.add_typer(list_app, name="list")

What = Annotated[
    str, typer.Argument(metavar="RECIPE|MODEL", help="Shipped recipe, .yaml file, hub id, model folder or .gguf file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that override the recipe, e.g. train.steps=50.", show_default=False
    ),
]
TargetLength = Annotated[
    int | None,
    typer.Option("--target-length", "-n", help="Positions the extended model shall reach.", show_default=False),
]
Method = Annotated[
    str | None,
    typer.Option("--method", "-m", help="RoPE method, see `ctxext list methods`.", show_default=False),
]


@app.command()
def extend(what: What, overrides: Overrides = None, target_length: TargetLength = None, method: Method = None) -> None:
    """The whole job: plan, evaluate, train, merge, verify, evaluate again, report.

    Run the same command again to go on after an interruption.
    """
    from ctxext.pipeline.extend import extend as run_extend
    from ctxext.pipeline.summary import print_summary

    recipe, reporter = _recipe(what, overrides, target_length, method), _reporter()
    print_summary(reporter.console, run_extend(recipe, reporter))


@app.command()
def plan(what: What, overrides: Overrides = None, target_length: TargetLength = None, method: Method = None) -> None:
    """What would happen, in numbers; loads no weights."""
    from ctxext.pipeline.summary import print_plan

    print_plan(_reporter(), _recipe(what, overrides, target_length, method))


@app.command()
def train(what: What, overrides: Overrides = None, target_length: TargetLength = None, method: Method = None) -> None:
    """Train the adapter only; `ctxext extend` goes on from there."""
    from ctxext.pipeline.extend import extend as run_extend

    recipe, reporter = _recipe(what, overrides, target_length, method), _reporter()
    run = run_extend(recipe, reporter, last_stage="train")
    reporter.info(f"adapter with its extended config: {run / 'adapter'}")


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Run folder, or adapter folder written by ctxext.")],
    destination: Annotated[str, typer.Argument(help="New folder for the plain checkpoint.")],
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> None:
    """Merge an adapter into its base: a plain checkpoint, read back and compared."""
    from pathlib import Path

    from ctxext.export.merge import merge_adapter

    folder = Path(adapter)
    if (folder / "adapter").is_dir():
        folder = folder / "adapter"
    proof = merge_adapter(folder, Path(destination), dtype)
    reporter = _reporter()
    for line in proof.summary():
        reporter.info(line)
    reporter.info(f"merged checkpoint: {proof.folder}")


@app.command()
def patch(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, package:NAME/FILE or recipes:NAME.")],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUT] [KEY=VALUE]...",
            help="New folder, and the method's parameters, e.g. beta_fast=64. --for needs no folder.",
            show_default=False,
        ),
    ] = None,
    target_length: Annotated[
        int, typer.Option("--target-length", "-n", help="Positions the extended model shall reach.")
    ] = ...,  # type: ignore[assignment]
    method: Annotated[str, typer.Option("--method", "-m", help="RoPE method, see `ctxext list methods`.")] = "yarn",
    portable: Annotated[
        bool | None,
        typer.Option(
            "--portable/--stock",
            help="Write the form that every program reads right, or the stock type; by default whichever is right.",
            show_default=False,
        ),
    ] = None,
    on_existing: Annotated[
        str, typer.Option(help="For a model that is scaled already: refuse, replace or compose.")
    ] = "refuse",
    program: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Print the settings that do the same in vllm, sglang, llamacpp, axolotl, llamafactory, transformers.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.", show_default=False)] = None,
) -> None:
    """Extend a checkpoint without training: new config, weights linked or streamed, never loaded whole."""
    from pathlib import Path

    from ctxext.pipeline.patch import patch_model_folder, settings_elsewhere

    words = rest or []
    settings = [word for word in words if "=" in word]
    folders = [word for word in words if "=" not in word]
    if program:
        for line in settings_elsewhere(
            program,
            model,
            method=method,
            target_length=target_length,
            on_existing=on_existing,
            revision=revision,
            settings=settings,
        ):
            typer.echo(line)  # not through rich, which would wrap flags
        return
    if len(folders) != 1:
        raise UsageError("patch writes one new folder", where="OUT", got=" ".join(folders) or "none", expected="one")
    reporter = _reporter()
    for line in patch_model_folder(
        model,
        Path(folders[0]),
        method=method,
        target_length=target_length,
        portable=portable,
        on_existing=on_existing,
        revision=revision,
        settings=settings,
    ):
        reporter.info(line)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run folder or checkpoint folder.")],
    gguf: Annotated[str, typer.Option("--gguf", help="GGUF file to write, with an Ollama Modelfile beside it.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16, of the matrices.")] = "auto",
    portable: Annotated[
        bool, typer.Option("--portable", help="Carry any scaling as rope_freqs.weight instead of llama.cpp's keys.")
    ] = False,
    pre: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name of the pre-tokenizer, when it is not recognised.", show_default=False),
    ] = None,
) -> None:
    """Write a checkpoint for another program: GGUF for llama.cpp and Ollama (Llama family)."""
    from pathlib import Path

    from ctxext.export.gguf import export_gguf
    from ctxext.pipeline.verify import find_checkpoint

    written = export_gguf(find_checkpoint(Path(checkpoint)), Path(gguf), dtype=dtype, portable=portable, pre=pre)
    reporter = _reporter()
    reporter.info(written.summary())
    reporter.info(f"Ollama Modelfile: {written.modelfile}")
    for note in written.notes:
        reporter.info(note)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, package:NAME/FILE or recipes:NAME.")],
    suite: Annotated[str, typer.Option(help="Shipped suite or .yaml file.")] = "quick",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for samples and heatmap.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    beyond_reach: Annotated[
        bool, typer.Option("--beyond-reach", help="Also ask prompts longer than the model reaches.")
    ] = False,
) -> None:
    """Measure retrieval by position and loss by position of one model."""
    from ctxext.pipeline.evaluate import evaluate_model

    reporter = _reporter()
    page = evaluate_model(
        model,
        suite=suite,
        output=output,
        revision=revision,
        dtype=dtype,
        reporter=reporter,
        beyond_reach=beyond_reach,
    )
    reporter.info(f"report: {page}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Run folder, or a folder written by `ctxext eval`.")],
    record: Annotated[
        str | None,
        typer.Option(help="Also copy samples, results and heatmaps into this new baseline folder.", show_default=False),
    ] = None,
    command: Annotated[str, typer.Option(help="With --record: the command that repeats the run.")] = "",
    hardware: Annotated[str, typer.Option(help="With --record: the machine, in words.")] = "",
) -> None:
    """Draw heatmaps, curves and page again from the stored samples."""
    from pathlib import Path

    from ctxext.pipeline.summary import print_report

    if record and not (command and hardware):
        raise UsageError(
            "--record needs --command and --hardware, so that readers know what they see", where="command line"
        )
    print_report(_reporter(), Path(run), Path(record) if record else None, command=command, hardware=hardware)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Run or evaluation folders and recorded baselines; NAME:ARM for one arm."
        ),
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for JSON, CSV and curves.", show_default=False)
    ] = None,
) -> None:
    """Put evaluated arms side by side on the prompts that they share; each is compared with the first."""
    from pathlib import Path

    from ctxext.pipeline.compare import print_comparison

    print_comparison(_reporter().console, runs, Path(output) if output else None)


@app.command()
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Merged checkpoint, adapter folder or run folder.")],
    against: Annotated[
        str | None, typer.Option(help="Recipe or plan.json whose positions it must have.", show_default=False)
    ] = None,
    portability: Annotated[
        bool, typer.Option("--portability", help="Who else reads it right, by rules with sources; runs nothing.")
    ] = False,
    readers: Annotated[
        str | None,
        typer.Option(
            help="Ask other programs for real: transformers4,llamacpp,vllm,mlx, each in an environment of its own.",
            show_default=False,
        ),
    ] = None,
    create: Annotated[
        bool, typer.Option("--create", help="With --readers: make environments that are missing.")
    ] = False,
) -> None:
    """Are the positions in effect? Checks checksums, config, every rotary module, and how the loaded model behaves."""
    from pathlib import Path

    from ctxext.pipeline.verify import ask_readers, judge_portability, verify_checkpoint

    reporter, folder = _reporter(), Path(checkpoint)
    if portability:
        table, lines = judge_portability(folder)
        reporter.console.print(table)
        for line in lines:
            typer.echo(line)
        return
    if readers:
        ask_readers(folder, readers.split(","), create, reporter.console)
        return
    for line in verify_checkpoint(folder, against):
        reporter.info(line)


@app.command()
def card(
    folder: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run folder, or a patched checkpoint.")],
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a card that was edited by hand.")] = False,
) -> None:
    """Write the model card: what it is, what was measured, how to serve it."""
    from pathlib import Path

    from ctxext.export.push import card_of

    _reporter().info(f"card: {card_of(Path(folder), replace_edited=replace)}")


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run folder, merged or patched checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub; created when missing.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Visibility of a new repository.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list everything, contact nobody.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created when missing.", show_default=False)] = None,
    allow_paths: Annotated[
        bool, typer.Option("--allow-paths", help="Upload although a file names a path of this machine.")
    ] = False,
) -> None:
    """Upload a checkpoint with its card to the hub, verified, and nothing else of the folder."""
    from pathlib import Path

    from ctxext.export.push import push as push_checkpoint

    report = push_checkpoint(
        Path(folder), repo, private=private, dry_run=dry_run, revision=revision, allow_paths=allow_paths
    )
    reporter = _reporter()
    for line in report.lines():
        reporter.info(line)


@list_app.command()
def methods() -> None:
    """RoPE methods: what each does to the frequencies, when to use it, and who reads it."""
    from rich.console import Console

    from ctxext.rope.listing import can_show_blocks, methods_view

    console = Console(highlight=False)
    console.print(methods_view(blocks=can_show_blocks(console)))


@list_app.command()
def tasks() -> None:
    """What a suite can ask: each task, when to use it, and where it comes from."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from ctxext.evaluation.tasks.registry import TASKS

    console = Console(highlight=False)
    for name, task in TASKS.items():
        console.print(Text.assemble((name, "bold"), f"  {task.summary}"))
        console.print(Padding(Text(f"{task.when}\n{task.source}"), (0, 0, 1, 4)))


@list_app.command()
def families(
    match: Annotated[
        str | None, typer.Argument(help="Only families whose name contains this.", show_default=False)
    ] = None,
) -> None:
    """Architectures of the installed transformers: which can be extended, how, and why not the others."""
    from rich.console import Console

    from ctxext.rope.listing import families_table

    Console(highlight=False).print(families_table(match))


def _recipe(what: str, overrides: list[str] | None, target_length: int | None, method: str | None) -> Recipe:
    from ctxext.pipeline.recipes import is_recipe, recipe_of

    recipe = recipe_of(what, overrides or [], target_length, method)
    if not is_recipe(what):
        _reporter().recipe(recipe)
    return recipe


def _reporter() -> ConsoleReporter:
    from ctxext.pipeline.console import ConsoleReporter

    return ConsoleReporter()


def main() -> None:
    """Entry point: expected errors become one message and an exit code; anything else is a bug with a traceback."""
    # Libraries ask the hub for updates and print progress of their own; neither belongs into this program's output.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app(standalone_mode=True)
    except CtxextError as error:
        print(f"ctxext: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        print("ctxext: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        print("ctxext: this is a bug in ctxext; please report it with the lines above", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
