"""Folders that appear complete or not at all, and safetensors written a tensor at a time."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import Mixtral

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


# What lies beside a model and speaks of the run that made it, or of that model alone: not of one made from it.
RUN_FILES = (
    *("metrics.jsonl", "loss.svg", "loss.png", "train.toml", "README.md"),
    *("upcycle.json", "distill.json", "finetune.json"),
)


def drop_run_files(folder: Path) -> None:
    """Removes what was carried from another model's folder and does not speak of the one in ``folder``."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def check_unused(out: Path) -> None:
    """Raises ValueError unless ``out`` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: must not exist or be an empty folder")


def check_space(out: Path, needed: int) -> None:
    """Raises RuntimeError unless the disk that will hold ``out`` has ``needed`` bytes left."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RuntimeError(f"{out}: needs {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB left")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, "OUT.incomplete", which becomes ``out`` at the end; after an error it is gone.

    Raises:
        ValueError: ``out`` is in use (``check_unused``).
    """
    check_unused(out)
    part = out.absolute().with_name(out.absolute().name + ".incomplete")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()  # empty
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    parts: Callable[[str], Iterator[Tensor]],
    progress: Callable[[int], None],
) -> None:
    """Writes a file of ``tensors``, names and shapes in the order of the file, never holding one of them whole.

    Args:
        dtype: of all of them: float32, bfloat16 or float16.
        parts: of a tensor's name: its rows, in pieces of ``dtype``.
        progress: called with the bytes written since the last call.
    """
    header, end = {}, 0
    for name, shape in tensors:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _ in tensors:
            for part in parts(name):
                written = part.contiguous().view(-1).view(torch.uint8).numpy()
                file.write(written)
                progress(written.nbytes)
        if file.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{path}: the pieces are not of the announced sizes")


def put_model(model: "Mixtral", out: Path) -> None:
    """Writes a model into a folder that holds other files too; config.json, which makes it a model, comes last."""
    with tempfile.TemporaryDirectory(prefix=".model-", dir=out) as aside:
        model.save_pretrained(Path(aside) / "model")
        drop_run_files(Path(aside) / "model")
        for file in sorted((Path(aside) / "model").iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
