"""moe_permute and moe_unpermute against indexing by an argsort. Bound: each row read and each copy written once."""

import torch

import mixtral.ops as ops
from common import Bench, main, with_backward
from mixtral import reference


def sort_rows(x: torch.Tensor, ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What moe_permute returns, without host synchronisation, so that a graph can hold it."""
    sorted_ids, order = ids.flatten().sort(stable=True)
    offs = torch.searchsorted(sorted_ids, torch.arange(experts, device=x.device), right=True, out_int32=True)
    row_map = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return x[order // ids.shape[1]], offs, row_map.view(ids.shape).int()


def run(bench: Bench) -> None:
    hidden, experts, top_k = 4096, 8, 2
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 128, 4096):
            x = torch.randn(tokens, hidden, device=bench.device).to(dtype)
            weights, ids = ops.topk_softmax(torch.randn(tokens, experts, device=bench.device), top_k)
            permuted, _, row_map = ops.moe_permute(x, ids, experts)
            case = f"T={tokens} H={hidden} K={top_k} {dtype}"
            gigabytes = (1 + top_k) * tokens * hidden * x.element_size() / 1e9
            bench.compare(
                f"moe_permute {case}",
                lambda x=x, i=ids: ops.moe_permute(x, i, experts),
                {"torch": lambda x=x, i=ids: sort_rows(x, i, experts)},
                gigabytes=gigabytes,
            )
            bench.compare(
                f"moe_unpermute {case}",
                lambda y=permuted, w=weights, m=row_map: ops.moe_unpermute(y, w, m),
                {"torch": lambda y=permuted, w=weights, m=row_map: reference.moe_unpermute(y, w, m)},
                gigabytes=gigabytes,
            )
            bench.compare(
                f"moe_permute and backward {case}",
                with_backward(lambda x, i=ids: ops.moe_permute(x, i, experts)[0], x),
                {"torch": with_backward(lambda x, i=ids: sort_rows(x, i, experts)[0], x)},
                gigabytes=2 * gigabytes,
            )
            bench.compare(
                f"moe_unpermute and backward {case}",
                with_backward(lambda y, w, m=row_map: ops.moe_unpermute(y, w, m), permuted, weights),
                {"torch": with_backward(lambda y, w, m=row_map: reference.moe_unpermute(y, w, m), permuted, weights)},
                gigabytes=(2 + 3 * top_k) * tokens * hidden * x.element_size() / 1e9,
            )


if __name__ == "__main__":
    main("moe_permute", run)
