"""The command line: parses, calls, maps errors to exit codes. No logic of its own, and no torch before it is needed."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated

import typer

from ctxext.errors import CtxextError, InterruptedRunError, UsageError, exit_code_of

if TYPE_CHECKING:
    from ctxext.pipeline.console import ConsoleReporter
    from ctxext.recipe.schema import Recipe

# Set by launchers that do not tell PyTorch what they started.
_LAUNCHERS = {"SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}

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
data_app = typer.Typer(help="The training text of a recipe, alone.", no_args_is_help=True)
app.add_typer(data_app, name="data")

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

BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        help="transformers (this process), vllm (this process, when installed) or openai (any server with that API).",
    ),
]
BaseUrl = Annotated[
    str | None,
    typer.Option(help="With --backend openai: http://HOST:PORT/v1; key in OPENAI_API_KEY.", show_default=False),
]
ModelName = Annotated[
    str | None, typer.Option(help="As the server names it; the only one served by default.", show_default=False)
]
Endpoint = Annotated[str, typer.Option(help="Of the server: auto, completions or chat.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait for one answer.", show_default=False)]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Spread a model over devices: auto, balanced, balanced_low_0, sequential.", show_default=False),
]

AllowInexact = Annotated[
    bool,
    typer.Option(
        "--allow-inexact-resume",
        help="Train on although settings, data or processes are not those of the checkpoint; every artefact says so.",
    ),
]

TrainProcesses = Annotated[
    int | None,
    typer.Option(
        "--num-processes",
        min=1,
        help="Processes on this machine; every visible GPU by default, 1 for a single one.",
        show_default=False,
    ),
]
_SEVERAL_MACHINES = (
    "Several machines: the same command under a launcher on each, e.g. torchrun --nnodes 2 --nproc-per-node 8 "
    "--rdzv-backend c10d --rdzv-endpoint HOST:29500 -m ctxext.cli extend RECIPE; accelerate launch --multi_gpu "
    "--num_machines 2 --num_processes 16 --machine_rank N --main_process_ip HOST --main_process_port 29500 "
    "-m ctxext.cli extend RECIPE; or srun ctxext extend RECIPE with MASTER_ADDR and MASTER_PORT set."
)


@app.command(epilog=_SEVERAL_MACHINES)
def extend(
    what: What,
    overrides: Overrides = None,
    target_length: TargetLength = None,
    method: Method = None,
    processes: TrainProcesses = None,
    allow_inexact: AllowInexact = False,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Every stage with tiny numbers, in a folder of its own: does everything run?"),
    ] = False,
) -> None:
    """The whole job: plan, evaluate, train, merge, verify, evaluate again, report.

    Uses every visible GPU. Run the same command again to go on after an interruption.
    """
    from ctxext.pipeline.stages import run_recipe
    from ctxext.pipeline.summary import print_smoke, print_summary

    recipe, reporter = _recipe_to_run(what, overrides, target_length, method, processes), _reporter()
    if smoke:
        print_smoke(reporter, recipe)
        return
    print_summary(reporter.console, run_recipe(recipe, reporter, allow_inexact=allow_inexact))


@app.command()
def plan(what: What, overrides: Overrides = None, target_length: TargetLength = None, method: Method = None) -> None:
    """What would happen, in numbers; loads no weights."""
    from ctxext.pipeline.summary import print_plan

    print_plan(_reporter(), _recipe(what, overrides, target_length, method))


@app.command(epilog=_SEVERAL_MACHINES)
def train(
    what: What,
    overrides: Overrides = None,
    target_length: TargetLength = None,
    method: Method = None,
    processes: TrainProcesses = None,
    allow_inexact: AllowInexact = False,
) -> None:
    """Train only; `ctxext extend` goes on from there."""
    from ctxext.pipeline.run_folder import RunFolder
    from ctxext.pipeline.stages import run_recipe

    recipe, reporter = _recipe_to_run(what, overrides, target_length, method, processes), _reporter()
    run = run_recipe(recipe, reporter, last_stage="train", allow_inexact=allow_inexact)
    reporter.info(f"what was trained, with its extended config: {RunFolder(run).trained}")


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Run folder, or its adapter or trained folder.")],
    destination: Annotated[str, typer.Argument(help="New folder for the plain checkpoint.")],
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    scale: Annotated[float, typer.Option(help="Make the adapter weaker (0.5) or stronger (1.5).")] = 1.0,
    onto: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Add the adapter to a sibling of its base, such as its instruction-tuned model.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Merge an adapter into its base: a plain checkpoint, read back and compared."""
    from pathlib import Path

    from ctxext.export.merge import merge_adapter
    from ctxext.pipeline.run_folder import RunFolder

    folder = Path(adapter)
    proof = merge_adapter(RunFolder(folder).trained or folder, Path(destination), dtype, scale=scale, onto=onto)
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

    folders, settings = _words(rest)
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
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [KEY=VALUE]...",
            help="Hub id, folder, .gguf file, package:NAME/FILE or recipes:NAME; and settings that override the suite.",
            show_default=False,
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            help="An arm on the same prompts: base, untrained (with --target-length), NAME=MODEL, NAME=method:linear. "
            "Repeat it.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[str, typer.Option(help="Shipped suite or .yaml file.")] = "quick",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for samples and heatmaps.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths: 4096,16K or 25%,100% of the target.", show_default=False)
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Depths: 0,0.5,1, or how many, e.g. 11.", show_default=False)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples a cell.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Samples a task at most.", show_default=False)] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Drop samples, never the longest length, until the estimate fits.", show_default=False),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the tokenizer's chat template, thinking off.")
    ] = False,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="With the template: let the model think; its thoughts are not scored.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Answer tokens, thoughts included.", show_default=False)
    ] = None,
    question_first: Annotated[
        bool, typer.Option("--question-first", help="The question before the text instead of behind it.")
    ] = False,
    target_length: TargetLength = None,
    method: Annotated[str, typer.Option("--method", "-m", help="RoPE method of the arm `untrained`.")] = "yarn",
    on_existing: Annotated[
        str, typer.Option(help="For arms extended on loading: refuse, replace or compose an existing scaling.")
    ] = "refuse",
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help="KEY=VALUE as in evaluation.gates; exit code 6 when not met.", show_default=False),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    beyond_reach: Annotated[
        bool, typer.Option("--beyond-reach", help="Also ask prompts longer than the model reaches.")
    ] = False,
    batch_size: Annotated[str, typer.Option(help="Prompts answered together: auto, or how many.")] = "auto",
    backend: BackendOption = "transformers",
    base_url: BaseUrl = None,
    model_name: ModelName = None,
    endpoint: Endpoint = "auto",
    timeout: Timeout = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests to a server at a time; 4 by default.", show_default=False)
    ] = None,
    device_map: DeviceMap = None,
    harness: Annotated[
        str | None,
        typer.Option(
            "--harness",
            metavar="TASK[,TASK...]",
            help="Run tasks of lm-evaluation-harness instead of a suite (needs the extra `harness`).",
            show_default=False,
        ),
    ] = None,
    ruler_file: Annotated[
        list[str] | None,
        typer.Option(
            "--ruler-file", help="A file made by RULER's own generators, or a folder. Repeat it.", show_default=False
        ),
    ] = None,
    ruler_task: Annotated[
        str | None, typer.Option(help="RULER's task, when the path does not say.", show_default=False)
    ] = None,
    ruler_length: Annotated[
        int | None, typer.Option(help="RULER's max_seq_length, when the path does not say.", show_default=False)
    ] = None,
    rescore: Annotated[
        str | None,
        typer.Option("--rescore", metavar="RUN", help="Score stored answers anew, without model.", show_default=False),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="With --rescore: another metric.", show_default=False)
    ] = None,
    reconstruct: Annotated[
        str | None,
        typer.Option(
            "--reconstruct",
            metavar="RUN",
            help="Show the exact prompt of a stored sample: --reconstruct RUN SAMPLE (an id, a part of one, or worst).",
            show_default=False,
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="With --reconstruct: the whole prompt.")] = False,
    validate: Annotated[
        str | None,
        typer.Option(
            "--validate", metavar="RUN", help="Check a stored run; exit code 3 when it is wrong.", show_default=False
        ),
    ] = None,
    every_prompt: Annotated[
        bool, typer.Option("--all", help="With --validate: make every prompt again, not some twenty.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="With --reconstruct and --validate: a model to take it from.", show_default=False),
    ] = None,
) -> None:
    """Measure retrieval by position and loss by position, of one model or of several arms on the same prompts."""
    from ctxext.pipeline.evaluate import evaluate_models
    from ctxext.pipeline.evaluation_plan import EvaluationRequest
    from ctxext.pipeline.stored_runs import stored_command

    models, settings = _words(rest)
    if stored_command(
        models,
        _reporter(),
        rescore=rescore,
        reconstruct=reconstruct,
        validate=validate,
        metric=metric,
        tokenizer=tokenizer,
        full=full,
        every_prompt=every_prompt,
    ):
        return
    if ruler_file:
        from ctxext.pipeline.ruler import evaluate_ruler_files

        if len(models) != 1:
            raise UsageError("--ruler-file needs one model", where="MODEL", got=" ".join(models) or "none")
        reporter = _reporter()
        folder = evaluate_ruler_files(
            models[0],
            ruler_file,
            reporter=reporter,
            task=ruler_task,
            length_tokens=ruler_length,
            output=output,
            revision=revision,
            dtype=dtype,
            beyond_reach=beyond_reach,
        )
        reporter.info(f"samples and ruler.json: {folder}")
        return
    if harness:
        from ctxext.pipeline.harness import evaluate_with_harness

        if len(models) != 1:
            raise UsageError("--harness needs one model", where="MODEL", got=" ".join(models) or "none")
        reporter = _reporter()
        folder = evaluate_with_harness(
            models[0],
            tasks=harness,
            output=output,
            revision=revision,
            dtype=dtype,
            lengths=lengths,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=chat,
            reporter=reporter,
        )
        reporter.info(f"results: {folder / 'harness-results.json'}, picture: {folder / 'harness.png'}")
        return
    if len(models) > 1:
        raise UsageError("eval takes one model; others are arms", where="MODEL", got=" ".join(models), hint="--arm")
    from ctxext.evaluation.backends.choice import backend_choice
    from ctxext.pipeline.summary import print_evaluation

    reporter = _reporter()
    folder = evaluate_models(
        EvaluationRequest(
            model=models[0] if models else None,
            arms=arm or (),
            suite=suite,
            suite_settings=settings,
            output=output,
            revision=revision,
            dtype=dtype,
            lengths=lengths,
            depths=depths,
            num_samples=samples,
            limit=limit,
            max_minutes=max_minutes,
            apply_chat_template=chat,
            thinking=thinking,
            max_new_tokens=max_new_tokens,
            question_first=question_first,
            target_length=target_length,
            method=method,
            on_existing=on_existing,
            beyond_reach=beyond_reach,
            gates=gate or (),
            backend=backend_choice(
                backend,
                base_url=base_url,
                model_name=model_name,
                endpoint=endpoint,
                concurrency=concurrency,
                timeout_seconds=timeout,
                device_map=device_map,
            ),
            batch_size=batch_size,
        ),
        reporter,
    )
    print_evaluation(reporter.console, folder)


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="Hub id, folder, run, .gguf file, package:NAME/FILE or recipes:NAME.")],
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    file: Annotated[list[str], typer.Option("--file", "-f", help="Text file, or - for standard input. Repeat it.")],
    max_new_tokens: Annotated[int, typer.Option(help="Answer tokens, thoughts included.")] = 256,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let a model that can think aloud do so.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="No chat template, although there is one.")] = False,
    beyond_reach: Annotated[
        bool, typer.Option("--beyond-reach", help="Ask although it takes more positions than the model reaches.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer and figures as JSON.")] = False,
    revision: Annotated[str | None, typer.Option(help="Hub revision.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    backend: BackendOption = "transformers",
    base_url: BaseUrl = None,
    model_name: ModelName = None,
    endpoint: Endpoint = "auto",
    timeout: Timeout = None,
    device_map: DeviceMap = None,
) -> None:
    """One question about long documents: the answer on standard output, tokens and time beside it."""
    import json

    from rich.console import Console

    from ctxext.evaluation.backends.choice import backend_choice
    from ctxext.pipeline.ask import AskRequest
    from ctxext.pipeline.ask import ask as run_ask
    from ctxext.pipeline.console import ConsoleReporter

    reporter = ConsoleReporter(Console(stderr=True, highlight=False))
    answer = run_ask(
        AskRequest(
            model=model,
            files=file,
            question=question,
            max_new_tokens=max_new_tokens,
            thinking=thinking,
            plain=plain,
            beyond_reach=beyond_reach,
            dtype=dtype,
            revision=revision,
            backend=backend_choice(
                backend,
                base_url=base_url,
                model_name=model_name,
                endpoint=endpoint,
                timeout_seconds=timeout,
                device_map=device_map,
            ),
        ),
        reporter,
    )
    if as_json:
        typer.echo(json.dumps(answer.as_dict(), indent=2, ensure_ascii=False))
        return
    typer.echo(answer.answer)
    for line in answer.summary():
        reporter.info(line)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Run folder, or a folder written by `ctxext eval`.")],
    record: Annotated[
        str | None,
        typer.Option(help="Also copy samples, results and heatmaps into this new baseline folder.", show_default=False),
    ] = None,
    command: Annotated[str, typer.Option(help="With --record: the command that repeats the run.")] = "",
    hardware: Annotated[str, typer.Option(help="With --record: the machine, in words.")] = "",
    over: Annotated[str, typer.Option(help="Rows of the heatmaps: depth, or position in tokens.")] = "depth",
) -> None:
    """Draw heatmaps, curves and page again from the stored samples."""
    from pathlib import Path

    from ctxext.pipeline.summary import print_report

    if record and not (command and hardware):
        raise UsageError(
            "--record needs --command and --hardware, so that readers know what they see", where="command line"
        )
    print_report(
        _reporter(), Path(run), Path(record) if record else None, command=command, hardware=hardware, over=over
    )


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


Everything = Annotated[
    bool, typer.Option("--all", help="The sources to their ends, not only what the recipe's training reads.")
]
NumProcesses = Annotated[
    int | None, typer.Option("--processes", help="Processes that tokenise; by default all cores.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs, on standard output.")]


@data_app.command("build")
def data_build(
    recipe: What, overrides: Overrides = None, everything: Everything = False, processes: NumProcesses = None
) -> None:
    """Tokenise the sources into the cache that training reads; go on where an earlier build stopped."""
    from ctxext.pipeline.data_commands import data_build as build

    checked, reporter = _recipe(recipe, overrides, None, None), _reporter()
    for line in build(checked, reporter, everything=everything, num_processes=processes):
        reporter.info(line)


@data_app.command("stats")
def data_stats(
    recipe: What,
    overrides: Overrides = None,
    everything: Everything = False,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for pictures.", show_default=False)] = None,
    processes: NumProcesses = None,
    as_json: AsJson = False,
) -> None:
    """Lengths, fertility, duplicates, contamination, and the mixture before and after sampling."""
    from pathlib import Path

    from ctxext.pipeline.data_commands import data_stats as measure
    from ctxext.pipeline.data_commands import print_json, print_statistics

    checked, reporter = _recipe(recipe, overrides, None, None), _reporter(stderr=as_json)
    statistics, folder = measure(
        checked, reporter, folder=Path(out) if out else None, everything=everything, num_processes=processes
    )
    if as_json:
        typer.echo(print_json(statistics.to_json()))
        return
    print_statistics(reporter.console, checked, statistics, folder)


@data_app.command("sample")
def data_sample(
    recipe: What,
    overrides: Overrides = None,
    windows: Annotated[int, typer.Option(help="How many, from the first.")] = 2,
    full: Annotated[bool, typer.Option("--full", help="Whole windows.")] = False,
    as_json: AsJson = False,
) -> None:
    """The first windows decoded, with document borders and positions visible."""
    from ctxext.pipeline.data_commands import data_sample as draw
    from ctxext.pipeline.data_commands import print_json, print_samples

    checked, reporter = _recipe(recipe, overrides, None, None), _reporter(stderr=as_json)
    views = draw(checked, reporter, num_windows=windows)
    if as_json:
        typer.echo(print_json([view.to_json() for view in views]))
        return
    print_samples(reporter.console, views, full=full)


@list_app.command()
def methods() -> None:
    """RoPE methods: what each does to the frequencies, when to use it, and who reads it."""
    from rich.console import Console

    from ctxext.rope.listing import can_show_blocks, methods_view

    console = Console(highlight=False)
    console.print(methods_view(blocks=can_show_blocks(console)))


@list_app.command("data-presets")
def data_presets() -> None:
    """Data mixtures of the literature: sources, shares, and what differs from the papers."""
    from rich.console import Console

    from ctxext.data.presets import presets_view

    Console(highlight=False).print(presets_view())


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


def _words(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Names, and settings of the form KEY=VALUE."""
    return [w for w in words or [] if "=" not in w], [w for w in words or [] if "=" in w]


def _recipe_to_run(
    what: str, overrides: list[str] | None, target_length: int | None, method: str | None, processes: int | None
) -> Recipe:
    """The recipe, once this process is one of those that run it: only they show it."""
    from ctxext.pipeline.recipes import recipe_of

    recipe = recipe_of(what, overrides or [], target_length, method)
    _in_processes(recipe, processes)
    _show(what, recipe)
    return recipe


def _in_processes(recipe: Recipe, asked: int | None) -> None:
    """Start several processes that do the same, when there are several devices, and end with their exit code."""
    from ctxext.pipeline.launch import check_plans, processes_to_start, run_in_processes, with_processes

    processes = processes_to_start(recipe, asked)
    if processes == 1:
        return
    check_plans(with_processes(recipe, processes))  # here once, not in every process
    _reporter().info(f"starting {processes} processes (--num-processes 1 runs one)")
    sys.exit(run_in_processes(processes, sys.argv[1:]))


def _recipe(what: str, overrides: list[str] | None, target_length: int | None, method: str | None) -> Recipe:
    from ctxext.pipeline.recipes import recipe_of

    recipe = recipe_of(what, overrides or [], target_length, method)
    _show(what, recipe)
    return recipe


def _show(what: str, recipe: Recipe) -> None:
    """Print the recipe that was made of a model's name; the user knows a recipe of their own."""
    from ctxext.pipeline.recipes import is_recipe

    if not is_recipe(what):
        _reporter().recipe(recipe)


def _reporter(*, stderr: bool = False) -> ConsoleReporter:
    from rich.console import Console

    from ctxext.pipeline.console import ConsoleReporter

    # Of several processes that a launcher started, one tells.
    return ConsoleReporter(Console(highlight=False, stderr=stderr, quiet=os.environ.get("RANK", "0") != "0"))


def main() -> None:
    """Entry point: expected errors become one message and an exit code; anything else is a bug with a traceback."""
    # Libraries ask the hub for updates and print progress of their own; neither belongs into this program's output.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # PyTorch's profiler, which measures memory on CPUs, otherwise writes lines of its own between ours.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        if _LAUNCHERS & os.environ.keys():
            from ctxext.pipeline.launch import join_launch

            join_launch(os.environ)
        app(standalone_mode=True)
    except CtxextError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"ctxext: {error}", file=sys.stderr)
        elif not isinstance(error, InterruptedRunError):  # which comes to all of them
            print(f"ctxext, process {rank}: {error}", file=sys.stderr)
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
