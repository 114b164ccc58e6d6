"""Checkpoints of a run: one safetensors file each, which appears whole or not at all.

``checkpoints/step-00000200.safetensors`` holds the float32 weights that are trained, the moments of AdamW and the
buffers of the model; its metadata say where the run was, and of which run it is. No pickle.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LoadError
from .toml_tables import SettingsError

FOLDER = "checkpoints"


class WriteError(RuntimeError):
    """A file that could not be written; what was there before is as it was."""


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file aside, syncs it, and renames it: a reader sees the old one or the new one, after a crash too.

    Raises:
        WriteError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        _publish(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from None


def _publish(temporary: Path, path: Path) -> None:
    """Syncs a file and renames it, then syncs the folder so that the name survives too."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def paths(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((out / FOLDER).glob("step-*.safetensors"))


def check_folder(out: Path, resume: bool) -> None:
    """Raises SettingsError for a folder that a new run may not have, or that no run can be resumed in."""
    found = bool(paths(out))
    if found and not resume:
        raise SettingsError(f"{out} holds a run already: --resume goes on with it; or name another --out")
    if resume and not found:
        raise SettingsError(f"{out} holds no checkpoint to resume from: start without --resume")
    if not resume and out.exists() and (not out.is_dir() or (out / "config.json").exists()):
        raise SettingsError(f"{out} is in use: name another --out, or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out}: cannot be made: {error.strerror}") from None


def save(out: Path, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint, then removes all but the last ``keep``.

    Args:
        tensors: the state of optimizer and buffers, by name.
        state: what JSON can hold; ``step`` names the file.

    Raises:
        WriteError: it could not be written whole; the earlier ones are intact.
    """
    path = out / FOLDER / f"step-{state['step']:08d}.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(".step-*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"run": json.dumps(state)}
        )
        _publish(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        good = paths(out)
        last = f"the last good one is {good[-1].name}" if good else "there is none before it"
        raise WriteError(f"step {state['step']}: {path}: the checkpoint cannot be written: {error}; {last}") from None
    for old in paths(out)[:-keep]:
        old.unlink()
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state that ``save`` wrote.

    Raises:
        LoadError: no such file, or a damaged one.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["run"])  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        reason = f"not a checkpoint of a training run: {error}; remove it to resume from the one before"
        raise LoadError(f"{path}: {reason}", str(path), "", reason) from None


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes two runs different, as "train.lr was 0.001 and is 0.002"."""
    names = sorted({*then, *now})
    return [f"{n} was {then.get(n)} and is {now.get(n)}" for n in names if then.get(n) != now.get(n)]
