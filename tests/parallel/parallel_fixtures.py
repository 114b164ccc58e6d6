"""The model that the tests cut."""

from pathlib import Path

import pytest

from rank_processes import split_model


@pytest.fixture(scope="session")
def splittable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_model(tmp_path_factory.mktemp("models") / "split")
