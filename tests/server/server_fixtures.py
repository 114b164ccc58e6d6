from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def server_model() -> object:
    """A small model with random weights; what a test asks of it does not change it."""
    from running import small_model

    return small_model()


@pytest.fixture(scope="session")
def server_url(server_model: object) -> Iterator[str]:
    """A server of ``server_model``, which the tests share."""
    from running import served

    with served(server_model) as url:
        yield url
