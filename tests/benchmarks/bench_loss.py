"""Memory and time of the loss alone, at SmolLM2's shapes, against plain logits and PyTorch's own chunked loss.

    python tests/benchmarks/bench_loss.py [--tokens 4096] [--words 49152] [--width 576] [--trained]

One thread, float32, forward and backward. Peaks are what the CPU allocator of PyTorch handed out beyond what was there
before; the hidden states' gradient, which all make, counts. Compare lines of one run only: other work on the machine
changes the times, not the bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from ctxext.model.loss import IGNORE_INDEX, summed_loss
from ctxext.planning.allocator import peak_growth_bytes

MIB = 2**20


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)


def torch_chunked(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """`linear_cross_entropy` of PyTorch 2.13 in chunks of as many tokens as ours."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=1024, chunking_method=None)
    loss: Tensor = F.linear_cross_entropy(
        hidden, head.weight, targets, reduction="sum", ignore_index=IGNORE_INDEX, options=options
    )
    return loss


def measured(loss_of: Callable[..., Tensor], hidden: Tensor, head: nn.Linear, targets: Tensor) -> tuple[float, float]:
    """Seconds of one forward and backward pass, and MiB at its peak."""

    def step() -> None:
        hidden.grad = None
        head.zero_grad()
        loss_of(hidden, head, targets).backward()

    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    return seconds, peak_growth_bytes(step, torch.device("cpu")) / MIB


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--words", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--trained", action="store_true", help="the head trains too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.width, requires_grad=True)
    head = nn.Linear(arguments.width, arguments.words, bias=False).requires_grad_(arguments.trained)
    targets = torch.randint(0, arguments.words, (arguments.tokens,))
    print("| loss | peak MiB | of plain | seconds | of plain |\n|---|---|---|---|---|", flush=True)
    first: tuple[float, float] | None = None
    for name, loss_of in (("plain logits", plain), ("ctxext", summed_loss), ("torch, chunked", torch_chunked)):
        seconds, peak = measured(loss_of, hidden, head, targets)
        first = first or (seconds, peak)
        print(f"| {name} | {peak:.0f} | {peak / first[1]:.2f} | {seconds:.1f} | {seconds / first[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
