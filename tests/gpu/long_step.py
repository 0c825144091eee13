"""One training step at one length, measured: tokens/s, peak memory, utilisation, attention kernels; ctxext or TRL.

    python tests/gpu/long_step.py --tokens 131072 [--trainer trl] [--steps 2] [--shape llama-8b] [--json FILE]

A model of the asked shape with random weights, LoRA r=16 on all linear layers, bfloat16, one window a step, activation
checkpointing. ctxext runs its own loop (`ctxext extend` trains with it) with `train.memory` as `--offload` and `--tile`
say; TRL runs SFTTrainer with the same settings and otherwise its defaults. The first step warms up and does not count
where there are several. Appends one line of JSON; what runs out of memory is a line too. `--shape tiny --device cpu`
walks the same way in seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench_memory import llama_8b
from bench_train import FixedWindows, Run, _keeping_losses, _StepEnds
from datasets import Dataset

from ctxext.data.packing import PackedWindow
from ctxext.model.lora import add_lora
from ctxext.model.peaks import peak_bytes, peak_flops_per_second
from ctxext.model.savings import savings_of
from ctxext.planning.cost import measured_flops_per_second, model_shape
from ctxext.planning.memory_plan import traced_step
from ctxext.planning.parallel_plan import ParallelPlan
from ctxext.recipe.schema import Recipe
from ctxext.rope.patchers import apply_method
from ctxext.train.checkpoint import TrainState
from ctxext.train.loop import Trainer, TrainHooks, TrainStart, make_accelerator
from ctxext.train.optimizer import make_optimizer
from ctxext.train.probe import is_out_of_memory
from ctxext.train.signals import StopRequest
from ctxext.train.step import SummedLoss


def shape_named(name: str) -> LlamaConfig:
    """`llama-8b`, or `tiny` for a dry run: two layers, the same kinds of everything. Both know 256 positions."""
    config = llama_8b()
    if name == "tiny":
        config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512})
        config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    config.update({"max_position_embeddings": 256})  # so that every measured length is an extension
    return config


def recipe_for(folder: Path, arguments: argparse.Namespace) -> Recipe:
    """The recipe of this step; its model is a folder with a config and no weights."""
    memory: dict[str, Any] = {"offload": arguments.offload}
    if arguments.tile is not None:
        memory["tile_tokens"] = arguments.tile
    return Recipe.model_validate(
        {
            "model": {"source": str(folder), "dtype": "float32" if arguments.device == "cpu" else "bfloat16"},
            "target_length": arguments.tokens,
            "train": {
                "steps": arguments.steps,
                "windows_per_step": 1,
                "learning_rate": 1e-4,
                "activation_checkpointing": True,
                "memory": memory,
                "allow_slow": True,
                "probe": False,  # the steps themselves are what is measured
                "trackers": [],
            },
        }
    )


def windows(count: int, tokens: int, vocabulary: int) -> list[PackedWindow]:
    """Random tokens."""
    ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [PackedWindow(row, list(range(tokens)), [0], 0) for row in ids]


def with_ctxext(
    recipe: Recipe, model: Any, config: Any, rows: list[PackedWindow], device: torch.device, run: Run
) -> Any:
    """The names of the attention kernels that ran."""
    starts: list[TrainStart] = []
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(model.dtype, device, [], Path(folder))
        state, parallel = TrainState(0, "benchmark", "benchmark", 1), ParallelPlan(windows=1, passes=1)
        trainer = Trainer(accelerator, model, config, FixedWindows(rows), recipe, Path(folder), state, parallel)

        def on_step(metrics: Any) -> None:
            run.losses.append(metrics.loss)
            run.step_ended()

        trainer.run(TrainHooks(on_start=starts.append, on_step=on_step), StopRequest())
    return starts[0].kernels


def with_trl(recipe: Recipe, model: Any, rows: list[PackedWindow], device: torch.device, run: Run) -> None:
    """SFTTrainer on the same rows, with the same adapter, optimizer, precision and checkpointing."""
    from trl import SFTConfig, SFTTrainer

    adapted = add_lora(model, recipe.lora, seed=recipe.train.seed)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer := make_optimizer(adapted, recipe.train), lambda step: 1.0)
    ids = [row.input_ids for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=len(rows),
            max_length=None,
            train_sampling_strategy="sequential",
            activation_checkpointing=True,
            max_grad_norm=recipe.train.max_grad_norm,
            activation_offloading=recipe.train.memory.offload,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
        )
        trainer = _keeping_losses(SFTTrainer, run)(
            model=adapted,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            processing_class=_tokenizer(),
            optimizers=(optimizer, rate),
            callbacks=[_StepEnds(run)],
        )
        trainer.train()


def _tokenizer() -> Any:
    """SFTTrainer wants one even for rows of tokens; this one is never asked for any."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), eos_token="a", pad_token="a")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One line of the result."""
    device = torch.device(arguments.device)
    plain = shape_named(arguments.shape)
    with tempfile.TemporaryDirectory() as name:
        plain.save_pretrained(name)
        recipe = recipe_for(Path(name), arguments)
        config = apply_method(plain, recipe.rope, recipe.target_length, recipe.on_existing)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        savings = savings_of(recipe.train, arguments.tokens)
        traced = traced_step(recipe, SummedLoss, savings)
        with device:
            # The model writes attributes into its config; what is compared with it must stay as it was made.
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
        rows, run, kernels = windows(arguments.steps, arguments.tokens, plain.vocab_size), Run(), None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        line: dict[str, Any] = {
            "trainer": arguments.trainer,
            "shape": arguments.shape,
            "tokens": arguments.tokens,
            "savings": savings.describe(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "traced_peak_bytes": traced.peak_bytes if traced is not None else None,
            "traced_host_bytes": traced.host_bytes if traced is not None else None,
        }
        started = time.perf_counter()
        try:
            if arguments.trainer == "trl":
                with_trl(recipe, model, rows, device, run)
            else:
                kernels = with_ctxext(recipe, model, config, rows, device, run)
        except Exception as error:
            cause = error.__cause__ or error
            if not is_out_of_memory(cause):
                raise
            return {**line, "out_of_memory": True, "measured_peak_bytes": peak_bytes(device)}
    seconds = min(run.wall_seconds) if run.wall_seconds else time.perf_counter() - started
    flops = model_shape(config).train_flops(arguments.tokens, activation_checkpointing=False)
    best = peak_flops_per_second(line["device"]) or measured_flops_per_second(device, dtype)
    return {
        **line,
        "kernels": kernels,
        "seconds": seconds,
        "tokens_per_second": arguments.tokens / seconds,
        "utilization": flops / seconds / best,
        "measured_peak_bytes": peak_bytes(device),
        "losses": run.losses,
    }


def main() -> None:
    """Print the line, and append it to a file when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--trainer", choices=["ctxext", "trl"], default="ctxext")
    parser.add_argument("--shape", choices=["llama-8b", "tiny"], default="llama-8b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--tile", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    line = json.dumps(measure(arguments))
    print(line)
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")


if __name__ == "__main__":
    main()
