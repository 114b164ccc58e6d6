"""A pytest plugin: a checkpoint of transformers, and a copy of it to spoil."""

import shutil
from pathlib import Path

import pytest
import torch

from checkpoints import random_model


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    random_model(num_local_experts=4, num_experts_per_tok=2).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(source, tmp_path / "model"))
