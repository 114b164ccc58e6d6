"""What each of two processes does in test_module_wrappers.py: a file of its own, so that they start fast."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mixtral.train import Batch, Mixtral, RouterOptions, StepTotals

DOCUMENTS = [[(7 * i + i * i * d) % 61 for i in range(n)] for d, n in enumerate((9, 30, 14, 22))]
OPTIONS = RouterOptions(balance="global")


def run(rank: int, folder: Path, model_folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {"gradients": ddp_gradients(rank, model_folder), "weights": fsdp_step(rank, model_folder)}
        if rank == 0:
            torch.save(results, folder / "results.pt")
    finally:
        dist.destroy_process_group()


def share(rank: int, model: Mixtral) -> tuple[Batch, StepTotals]:
    """The batch of this rank, and the totals of both."""
    batch = Batch.from_documents(DOCUMENTS[rank::2])
    with torch.no_grad():
        load = model.loss(batch).load
    counts = torch.stack((batch.targets, torch.tensor(float(batch.tokens))))
    for part in (load, counts):
        dist.all_reduce(part)
    return batch, StepTotals(counts[0], counts[1], load)


def ddp_gradients(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    model = Mixtral.from_pretrained(folder, router=OPTIONS)
    batch, totals = share(rank, model)
    wrapped = DistributedDataParallel(model)
    (2 * wrapped(batch, totals).total).backward()  # the gradients of ranks are averaged
    return {name: weight.grad for name, weight in model.named_parameters()}


def fsdp_step(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    model = Mixtral.from_pretrained(folder, router=OPTIONS)
    batch, totals = share(rank, model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    (2 * model.loss(batch, totals).total).backward()
    optimizer.step()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
