"""Peak memory and time of patching and merging on disk, against loading the same weights.

    python tests/benchmarks/bench_patch.py [--gigabytes 4] [--folder DIR]

Makes a Llama-shaped bfloat16 checkpoint in files of 1 GB (sparse: zeros that take no room until they are copied) with a
LoRA adapter, runs every way in a process of its own, and prints each one's peak resident memory (what the kernel
counted), the peak of its anonymous part (sampled), seconds, and the ratio to loading. Reading zeros costs no disk time,
so loading looks faster here than it is. Copies need as much free room as the checkpoint is large. Exits with 1 when a
streamed way reaches 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT_BYTES = 1 << 30
HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 14336, 32, 32000


def layout(gigabytes: float) -> tuple[int, dict[str, list[int]]]:
    """Number of layers and shapes of the tensors of a Llama that fills about `gigabytes` in bfloat16."""
    per_layer = {
        "self_attn.q_proj": [HIDDEN, HIDDEN],
        "self_attn.k_proj": [HIDDEN // 4, HIDDEN],
        "self_attn.v_proj": [HIDDEN // 4, HIDDEN],
        "self_attn.o_proj": [HIDDEN, HIDDEN],
        "mlp.gate_proj": [INTERMEDIATE, HIDDEN],
        "mlp.up_proj": [INTERMEDIATE, HIDDEN],
        "mlp.down_proj": [HIDDEN, INTERMEDIATE],
        "input_layernorm": [HIDDEN],
        "post_attention_layernorm": [HIDDEN],
    }
    outside = {"model.embed_tokens": [VOCABULARY, HIDDEN], "model.norm": [HIDDEN], "lm_head": [VOCABULARY, HIDDEN]}
    count = sum(num_elements(shape) for shape in per_layer.values())
    rest = gigabytes * 2**29 - sum(num_elements(shape) for shape in outside.values())
    layers = max(1, round(rest / count))
    inside = {f"model.layers.{k}.{name}": shape for k in range(layers) for name, shape in per_layer.items()}
    return layers, {f"{name}.weight": shape for name, shape in (outside | inside).items()}


def num_elements(shape: list[int]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def write_base(folder: Path, gigabytes: float) -> int:
    """Sparse shards with their index; returns the number of layers."""
    layers, shapes = layout(gigabytes)
    shards: list[dict[str, list[int]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(num_elements, shards[-1].values())) * 2 > 2**30:
            shards.append({})
        shards[-1][name] = shape
    folder.mkdir()
    places = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for name, shape in tensors.items():
            begin, end = end, end + num_elements(shape) * 2
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            places[name] = file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return layers


def write_config_and_adapter(root: Path, layers: int) -> None:
    """Config and tokenizer of the base, and a random adapter of rank 16 on all linear layers."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from support import byte_tokenizer
    from transformers import LlamaConfig

    from ctxext.export.proof import meta_model
    from ctxext.files import write_json_atomic, write_manifest
    from ctxext.model.load import load_config, resolve_source, weights_fingerprint
    from ctxext.rope.patchers import extend_config

    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    source = resolve_source(str(root / "base"))
    config = extend_config(load_config(source), method="yarn", target_length=32768)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(meta_model(config), lora, low_cpu_mem_usage=True)
    names = get_peft_model_state_dict(model)
    (root / "adapter").mkdir()
    tensors = {name: torch.randn(tensor.shape) * 0.02 for name, tensor in names.items()}
    save_file(tensors, root / "adapter" / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(str(root / "adapter"))
    config.save_pretrained(root / "adapter")
    base = {"source": source.name, "revision": None, "fingerprint": weights_fingerprint(source, config)}
    provenance = {"base": base, "method": {"method": "yarn"}, "original_length": 4096, "target_length": 32768}
    write_json_atomic(root / "adapter" / "ctxext.json", provenance)
    write_manifest(root / "adapter")


def load(root: Path) -> None:
    """What every other tool does first: all tensors in memory."""
    from safetensors.torch import load_file

    kept = [load_file(path) for path in sorted((root / "base").glob("*.safetensors"))]
    for tensors in kept:
        for tensor in tensors.values():
            tensor.view(-1)[::2048].sum()  # one number a page: mapped pages are loaded when they are used


def link(root: Path) -> None:
    from ctxext.export.stream import stream_weights

    assert not stream_weights(root / "base", root / "out").copied


def copy(root: Path) -> None:
    from ctxext.export.stream import stream_weights

    stream_weights(root / "base", root / "out", link=False)


def edit_q_and_k(root: Path) -> None:
    """What the portable form does: rows of the query and key projections scaled."""
    from ctxext.export.stream import checkpoint_tensors, row_scaling, stream_weights

    tensors = checkpoint_tensors(root / "base").tensors
    names = [name for name in tensors if "q_proj" in name or "k_proj" in name]
    edits = {name: row_scaling(lambda tensor: tensor * 1.1, tensors[name].num_rows) for name in names}
    stream_weights(root / "base", root / "out", edits)


def edit_all_by_rows(root: Path) -> None:
    from ctxext.export.stream import RowwiseEdit, checkpoint_tensors, stream_weights

    edit = RowwiseEdit(lambda rows, first: rows.mul_(1.1))
    stream_weights(root / "base", root / "out", dict.fromkeys(checkpoint_tensors(root / "base").tensors, edit))


def merge(root: Path) -> None:
    from ctxext.export.merge import merge_streamed

    merge_streamed(root / "adapter", root / "base", root / "out", proof="samples")


def merge_with_logits(root: Path) -> None:
    from ctxext.export.merge import merge_streamed

    merge_streamed(root / "adapter", root / "base", root / "out", proof="logits")


def imports(root: Path) -> None:
    """Nothing: what PyTorch, transformers and peft take by themselves."""


WAYS: dict[str, tuple[str, Callable[[Path], None], bool]] = {
    "load": ("load with safetensors", load, False),
    "imports": ("imports alone", imports, True),
    "link": ("patch: no edits, linked", link, True),
    "copy": ("patch: no edits, copied", copy, True),
    "edit-qk": ("patch: q and k scaled", edit_q_and_k, True),
    "edit-all": ("patch: all tensors by rows", edit_all_by_rows, True),
    "merge": ("merge LoRA, samples compared", merge, True),
    "merge-logits": ("merge LoRA, logits compared", merge_with_logits, False),
}


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """Samples the anonymous part of this process's memory; the list holds the largest, in bytes."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak[0] = max(peak[0], int(line.split()[1]) << 10)

    thread = threading.Thread(target=sample, daemon=True)
    if Path("/proc/self/status").exists():
        thread.start()
    yield peak
    done.set()


def run_way(name: str, root: Path) -> None:
    """In the child: do it, and print the figures as JSON."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import ctxext.export.merge  # noqa: F401

    torch.set_num_threads(1)
    with anonymous_peak() as anonymous:
        start = time.perf_counter()
        WAYS[name][1](root)
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"peak_bytes": peak, "anonymous_bytes": anonymous[0], "seconds": seconds}))


def child(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    finished = subprocess.run(command, text=True, capture_output=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{finished.stderr[-2000:]}")
    return finished.stdout


def ratio(figures: dict[str, Any], reference: dict[str, Any] | None, key: str) -> str:
    return f"{figures[key] / reference[key]:.3f}" if reference else "-"


def measure(gigabytes: float, folder: str | None, ways: list[str]) -> bool:
    """Print the table; true when every streamed way stayed below the limit."""
    root = Path(tempfile.mkdtemp(prefix="bench-patch-", dir=folder))
    try:
        layers = write_base(root / "base", gigabytes)
        if any(name.startswith("merge") for name in ways):
            child("--prepare", str(root), str(layers))
        size = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))
        files = len(list((root / "base").glob("*.safetensors")))
        print(f"checkpoint: {size / 2**30:.2f} GiB in {files} files, {layers} layers, bfloat16; one thread")
        print(f"{'':30} {'peak RSS':>10} {'anonymous':>10} {'seconds':>8} {'RSS / load':>11} {'time / load':>12}")
        within = True
        reference: dict[str, Any] | None = None
        for name in ways:
            figures: dict[str, Any] = json.loads(child("--way", name, str(root)).splitlines()[-1])
            shutil.rmtree(root / "out", ignore_errors=True)
            reference = figures if name == "load" else reference
            within &= not WAYS[name][2] or figures["peak_bytes"] < LIMIT_BYTES
            print(
                f"{WAYS[name][0]:30} {figures['peak_bytes'] / 2**20:6.0f} MiB {figures['anonymous_bytes'] / 2**20:6.0f}"
                f" MiB {figures['seconds']:8.1f} {ratio(figures, reference, 'peak_bytes'):>11}"
                f" {ratio(figures, reference, 'seconds'):>12}",
                flush=True,
            )
        print(f"every streamed way below {LIMIT_BYTES >> 20} MiB: {'yes' if within else 'NO'}")
        return within
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--folder", help="where it is made (default: the system's temporary folder)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=[w for w in WAYS if w != "merge-logits"])
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        write_config_and_adapter(Path(arguments.prepare[0]), int(arguments.prepare[1]))
    elif arguments.way:
        run_way(arguments.way[0], Path(arguments.way[1]))
    else:
        return 0 if measure(arguments.gigabytes, arguments.folder, arguments.ways) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
