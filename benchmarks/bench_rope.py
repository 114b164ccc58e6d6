"""rope against the eager formula of Hugging Face. Bound: one read and one write of q and k, and as much backward."""

import torch

import mixtral.ops as ops
from common import Bench, main, with_backward

HEADS, KV_HEADS, HEAD_DIM, THETA = 32, 8, 128, 1e6


def hugging_face(q, k, positions):
    """Angles, cosine and sine once for q and k, then x * cos + rotate_half(x) * sin in the dtype of the model."""
    inverse_frequency = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, device=q.device).float() / HEAD_DIM)
    angles = (positions.float()[:, None] * inverse_frequency).repeat(1, 2)[:, None]
    cosine, sine = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    return tuple(x * cosine + torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), -1) * sine for x in (q, k))


def run(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 128, 2048):
            q = torch.randn(tokens, HEADS, HEAD_DIM, device=bench.device).to(dtype)
            k = torch.randn(tokens, KV_HEADS, HEAD_DIM, device=bench.device).to(dtype)
            positions = torch.arange(tokens, device=bench.device)
            bench.compare(
                f"rope T={tokens} Nq={HEADS} Nkv={KV_HEADS} {dtype}",
                lambda q=q, k=k, p=positions: ops.rope(q, k, p, THETA),
                {"eager Hugging Face": lambda q=q, k=k, p=positions: hugging_face(q, k, p)},
                gigabytes=2 * (q.nbytes + k.nbytes) / 1e9,
            )
            bench.compare(
                f"rope and backward T={tokens} Nq={HEADS} Nkv={KV_HEADS} {dtype}",
                with_backward(lambda q, k, p=positions: ops.rope(q, k, p, THETA), q, k),
                {"eager Hugging Face": with_backward(lambda q, k, p=positions: hugging_face(q, k, p), q, k)},
                gigabytes=4 * (q.nbytes + k.nbytes) / 1e9,
            )


if __name__ == "__main__":
    main("rope", run)
