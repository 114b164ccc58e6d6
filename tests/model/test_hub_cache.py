"""Models by their name in the local Hugging Face cache."""

import os
import shutil
from pathlib import Path

import pytest

import mixtral
from odd_checkpoints import (
    assert_load_error,
    assert_same_model,
    edit,
    load,
)

pytest_plugins = ["checkpoint_fixtures"]


@pytest.fixture
def cache(source, tmp_path) -> Path:
    """A cache as huggingface_hub lays it out, with two revisions of org/tiny."""
    root = tmp_path / "hub"
    repository = root / "models--org--tiny"
    for folder in ("blobs", "refs", "snapshots/0123", "snapshots/4567"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, repository / "blobs" / f"{i}")
        os.symlink(f"../../blobs/{i}", repository / "snapshots" / "0123" / file.name)
    return root


@pytest.mark.parametrize("variables", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_a_repository_is_found_in_the_cache(variables, cache, source, tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    places = {"HF_HUB_CACHE": "hub", "HF_HOME": "home/hub", "XDG_CACHE_HOME": "xdg/huggingface/hub",
              "HOME": ".cache/huggingface/hub"}  # fmt: skip
    values = {"HF_HUB_CACHE": "hub", "HF_HOME": "home", "XDG_CACHE_HOME": "xdg", "HOME": ""}
    place = tmp_path / places[variables]
    place.parent.mkdir(parents=True, exist_ok=True)
    if place != cache:
        cache.rename(place)
    monkeypatch.setenv(variables, str(tmp_path / values[variables]))
    assert assert_same_model("org/tiny", source) == []
    assert mixtral.Config.from_folder("org/tiny").num_layers == 2


def test_the_root_of_a_cached_repository(cache, source):
    assert assert_same_model(cache / "models--org--tiny", source) == []
    (cache / "models--org--tiny" / "refs" / "main").write_text("gone")
    assert_load_error(cache / "models--org--tiny", 'has no snapshot of "main": run `hf download org/tiny`')


def test_a_repository_that_is_not_there_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert_load_error(
        "org/other", r"org/other: is no folder here, and not in the Hugging Face cache .*hub: to download it run "
        "`hf download org/other`"
    )  # fmt: skip
    for path in ("nowhere", "/a/b/c", "./org/tiny", "a b/c"):
        assert_load_error(path, f"{path}: does not exist")


def test_a_folder_of_that_name_goes_before_the_cache(cache, folder, source, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(folder.parent)
    (folder.parent / "org").mkdir()
    folder.rename(folder.parent / "org" / "tiny")
    edit(folder.parent / "org" / "tiny", max_position_embeddings=77)
    assert load("org/tiny")[0].config.max_position == 77
