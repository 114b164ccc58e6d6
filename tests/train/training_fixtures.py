from pathlib import Path

import pytest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A configuration with its texts and its tokenizer."""
    from tiny_run import write_corpus

    return write_corpus(tmp_path)
