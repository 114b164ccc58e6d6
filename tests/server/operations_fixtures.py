from collections.abc import Iterator

import pytest

from processes import ServerProcess, small_server


@pytest.fixture(scope="session")
def small() -> Iterator[ServerProcess]:
    """The whole server around the small model, in a process of its own, which the tests share."""
    with small_server() as server:
        yield server
