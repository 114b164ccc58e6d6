"""A control group that limits the memory of the processes in it, file pages included."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class NoControlGroup(Exception):
    """This user or machine can make none; the text says why."""


@contextmanager
def memory_limit(limit: int) -> Iterator["Group"]:
    """A group that holds at most ``limit`` bytes.

    Raises:
        NoControlGroup: none can be made.
    """
    version_1 = (V1 / "memory.limit_in_bytes").exists()
    folder = (V1 if version_1 else V2) / f"mixtral-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoControlGroup(f"no control group can be made: {error}") from None
    try:
        group = Group(folder, version_1)
        try:
            group.set_limit(limit)
        except OSError as error:
            raise NoControlGroup(f"the control group takes no limit of memory: {error}") from None
        yield group
    finally:
        folder.rmdir()


class Group:
    """Made by ``memory_limit``."""

    def __init__(self, folder: Path, version_1: bool) -> None:
        self._folder, self._version_1 = folder, version_1

    def set_limit(self, limit: int) -> None:
        (self._folder / ("memory.limit_in_bytes" if self._version_1 else "memory.max")).write_text(str(limit))

    def enter(self) -> None:
        """Move the calling process into the group: for ``preexec_fn``."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """Most bytes so far."""
        return int((self._folder / ("memory.max_usage_in_bytes" if self._version_1 else "memory.peak")).read_text())
