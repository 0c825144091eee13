"""How this process trains together with the others: who takes which windows, what wraps the model, who is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from ctxext.data.order import Share
from ctxext.errors import ResourceError
from ctxext.evaluation.sharding import another_ended, this_launch
from ctxext.model.load import quiet
from ctxext.planning.parallel_plan import ParallelPlan
from ctxext.train.sharding import no_sync_of, shard, whole_trained

# What PyTorch's errors say when another process is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "Gloo", "NCCL", "ncclRemote")


class Together:
    """This process among those of a run.

    Raises:
        ResourceError: the processes are not those of the plan, or planned differently.
    """

    def __init__(self, accelerator: Accelerator, plan: ParallelPlan) -> None:
        self.plan = plan
        self._accelerator = accelerator
        if accelerator.num_processes != plan.processes:
            raise ResourceError(
                "the number of processes is not the one that was asked for",
                where="parallel.processes",
                got=accelerator.num_processes,
                expected=str(plan.processes),
                hint="`ctxext extend` and `ctxext train` start them; from Python, start the script with torchrun.",
            )
        plans = this_launch().gathered(plan) if plan.processes > 1 else [plan]
        if len(set(plans)) > 1:
            raise ResourceError(
                "the processes made different plans",
                where="parallel",
                got="; ".join(sorted({made.describe() for made in plans})),
                hint="Their devices or recipes differ; say parallel.shard=none or fsdp2.",
            )

    @property
    def share(self) -> Share:
        """Of a step's windows: processes that share a window take the same ones."""
        return Share(self._accelerator.process_index // self.plan.sequence, self.plan.replicas)

    def shard(self, loss: nn.Module, decoder: nn.Module) -> None:
        """Share the weights, where the plan says so."""
        if self.plan.sharded:
            shard(loss, decoder, self._accelerator.device)
            loss.no_sync = no_sync_of(loss)  # where Accelerate looks for it

    def prepare(self, loss: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The model for DDP, or as it is when its weights are shared; in the run's precision."""
        if self.plan.sharded:
            model = self._accelerator.prepare_model(loss, evaluation_mode=True)  # precision, and no DDP around it
            return model, self._accelerator.prepare_optimizer(optimizer)
        with quiet():  # Accelerate passes on a name that PyTorch has renamed
            model, optimizer = self._accelerator.prepare(loss, optimizer)
        return model, optimizer

    def whole(self, loss: nn.Module) -> AbstractContextManager[None]:
        """Inside, what trains is whole, for saving; all processes enter and leave together."""
        return whole_trained(loss) if self.plan.sharded else nullcontext()

    @contextmanager
    def while_all_live(self) -> Iterator[None]:
        """Around training: says it plainly when another process is gone.

        Raises:
            ResourceError: it is.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.plan.processes == 1 or not _means_gone(error):
                raise
            raise another_ended() from error


def _means_gone(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _GONE)


def ddp_arguments() -> dict[str, bool]:
    """Of DistributedDataParallel: no buffer is sent (rotary frequencies are equal and stay float32), no copy kept."""
    return {"broadcast_buffers": False, "gradient_as_bucket_view": True}
