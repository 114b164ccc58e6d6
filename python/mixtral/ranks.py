"""How ``Mixtral.from_pretrained`` shares a model among processes."""

import os

import torch

from . import _C, follower

_DEFAULT_THREADS = torch.get_num_threads()


def rank_options(path: str, what: dict[str, object], layout: dict[str, object]) -> _C.RankOptions:
    """The ranks of a ``layout``, each of which loads ``what``."""
    return _C.RankOptions(
        tensor_size=layout["tensor_parallel_size"],
        stages=layout["pipeline_parallel_size"],
        expert_parallel=layout["expert_parallel"],
        backend=layout["parallel_backend"],
        timeout=layout["rank_timeout"],
        device=what["device"],
        command=follower.command(threads_of_rank(layout), path=path, **what, **layout),
    )


def threads_of_rank(layout: dict[str, object]) -> int:
    """Ranks of one host share its cores, unless the number of threads was chosen."""
    ranks = layout["tensor_parallel_size"] * layout["pipeline_parallel_size"]
    if ranks == 1 or "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() != _DEFAULT_THREADS:
        return torch.get_num_threads()
    return max(1, _DEFAULT_THREADS // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
