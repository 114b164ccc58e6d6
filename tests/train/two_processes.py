"""What each of two processes does in test_module_wrappers.py: a file of its own, so that they start fast."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from mixtral.train import Batch, Mixtral, RouterOptions, StepTotals

DOCUMENTS = [[(7 * i + i * i * d) % 61 for i in range(n)] for d, n in enumerate((9, 30, 14, 22))]
OPTIONS = RouterOptions(balance="global")


def run(rank: int, folder: Path, model_folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {
            "gradients": ddp_gradients(rank, model_folder),
            "weights": fsdp_steps(rank, model_folder),
            "checkpointed": fsdp_steps(rank, model_folder, checkpointing=True),
        }
        if rank == 0:
            torch.save(results, folder / "results.pt")
            model = Mixtral.from_pretrained(model_folder)
            model.save_pretrained(folder / "saved", state_dict=results["weights"])
    finally:
        dist.destroy_process_group()


def share(rank: int, model: Mixtral) -> tuple[Batch, StepTotals]:
    """The batch of this rank, and the totals of both."""
    batch = Batch.from_documents(DOCUMENTS[rank::2])
    with torch.no_grad():
        load = model.expert_load(batch)
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


def fsdp_steps(rank: int, folder: Path, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    """Three steps with clipping; returns the weights, whole."""
    model = Mixtral.from_pretrained(folder, router=OPTIONS, gradient_checkpointing=checkpointing)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "expert_load")  # it is not forward(), which alone gathers the weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    for _ in range(3):
        batch, totals = share(rank, model)
        optimizer.zero_grad()
        (2 * model.loss(batch, totals).total).backward()  # the gradients of ranks are averaged
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
