"""Mistral's consolidated*.pth or *.pt files -> consolidated.safetensors, in the folder of params.json.

    python scripts/convert_pth.py MODEL_FOLDER

Reads one file, or the eight of the December 2023 release (whose experts are stacked and whose w2 is transposed). The
pickles are loaded with weights_only=True and memory-mapped, and tensors are written one at a time, so memory stays
near that of the largest tensor. The output appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
STACKED = re.compile(r"(layers\.\d+)\.block_sparse_moe\.(w[123]|gate\.weight)")
OUTPUT = "consolidated.safetensors"


class ConversionError(Exception):
    """A folder that cannot be converted; the message is for the user."""


def load_shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    paths = sorted(folder.glob("consolidated*.pth")) or sorted(folder.glob("consolidated*.pt"))
    if not paths:
        raise ConversionError(f"{folder}: holds no consolidated*.pth or consolidated*.pt")
    shards = []
    for path in paths:
        try:
            shard = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for a damaged or unsafe file
            raise ConversionError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error
        if not isinstance(shard, dict):
            raise ConversionError(f"{path}: must hold a dictionary of tensors, got {type(shard).__name__}")
        for name, tensor in shard.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
                kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ConversionError(f"{path}: {name}: must be a float32, bfloat16 or float16 tensor, got {kind}")
        shards.append(shard)
    return shards


def split_experts(name: str, tensor: torch.Tensor, num_experts: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The stacked names of 2023 become those of today: w1, w3 [E*I,H] -> E x [I,H], w2 [E*I,H] -> E x [H,I]."""
    stacked = STACKED.fullmatch(name)
    if not stacked:
        yield name, tensor
    elif stacked[2] == "gate.weight":
        yield f"{stacked[1]}.feed_forward.gate.weight", tensor
    elif num_experts < 1 or tensor.shape[0] % num_experts:
        raise ConversionError(f"{name}: must stack {num_experts} experts, got shape {list(tensor.shape)}")
    else:
        for expert, rows in enumerate(tensor.chunk(num_experts)):
            matrix = rows.T if stacked[2] == "w2" else rows
            yield f"{stacked[1]}.feed_forward.experts.{expert}.{stacked[2]}.weight", matrix


def collect(shards: list[dict[str, torch.Tensor]], params: dict[str, object]) -> dict[str, torch.Tensor]:
    moe = params.get("moe")
    num_experts = moe.get("num_experts", 0) if isinstance(moe, dict) else params.get("num_local_experts", 0)
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        for old_name, old_tensor in shard.items():
            for name, tensor in split_experts(old_name, old_tensor, int(num_experts)):
                # Norms and routers are in every file of a sharded release, and must be the same in all of them.
                if name in tensors and not torch.equal(tensors[name], tensor):
                    raise ConversionError(f"{name}: is in two files with different values")
                tensors.setdefault(name, tensor)
    return tensors


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def convert(folder: Path) -> Path:
    output = folder / OUTPUT
    if output.exists():
        raise ConversionError(f"{output}: exists already")
    try:
        params = json.loads((folder / "params.json").read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{folder / 'params.json'}: cannot be read: {error}") from error
    write_safetensors(output, collect(load_shards(folder), params))
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds params.json and consolidated*.pth")
    try:
        print(convert(parser.parse_args().folder))
    except (ConversionError, OSError) as error:
        print(f"convert_pth: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
