"""The model that the tests cut, and what every test must leave behind: nothing."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rank_processes import split_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_model(tmp_path_factory.mktemp("models") / "split")


@pytest.fixture(autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    assert set(os.listdir("/dev/shm")) <= before
