"""Data parallelism under torchrun: the ranks share the microbatches of a step and add their gradients."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a run: one, or those that torchrun started.

    Gradients are added once a step, in float32 and in buckets, after the last microbatch: the loss of a microbatch is
    its additive share of the whole step's, so a sum is all that is left to do.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size > 1:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            if not dist.is_initialized():
                dist.init_process_group("nccl" if device == "cuda" else "gloo")

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def add(self, tensors: Iterable[Tensor], bucket_elements: int = 1 << 24) -> None:
        """Replaces each tensor by its sum over the ranks; all of one dtype."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > bucket_elements:
                self._add_bucket(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            self._add_bucket(bucket)

    def _add_bucket(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def largest(self, value: float) -> float:
        """The largest value of any rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.largest(0)

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
