"""The notebook of the worked run, in a few steps: its commands run, and what it shows is there."""

import json
from pathlib import Path

import matplotlib
import pytest

from binary import ROOT

NOTEBOOK = ROOT / "docs" / "training.ipynb"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The variables after all code cells, run one after the other."""
    matplotlib.use("Agg")
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("WORKED_RUN", str(tmp_path_factory.mktemp("run")))
        patch.setenv("WORKED_RUN_STEPS", "4")
        for cell in json.loads(NOTEBOOK.read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name} {cell['id']}", "exec"), names)
    return names


def test_the_upcycled_model_is_the_dense_one_until_it_is_trained(found: dict) -> None:
    assert found["difference"] <= 1e-5
    assert found["apart"]["upcycled"] == [0.0] * 4
    assert min(found["apart"]["moe"]) > 0


def test_the_student_is_scored_against_its_baseline(found: dict) -> None:
    losses = found["report"]["nats_per_token"]
    assert losses["student"] < losses["untrained"] + 0.5
    assert set(losses) == {"teacher", "untrained", "baseline", "student"}


def test_the_configurations_share_their_texts() -> None:
    """The student sees what its teacher was trained on."""
    dense, moe = ((Path(ROOT) / "docs" / "worked_run" / f"{name}.toml").read_text() for name in ("dense", "moe"))
    assert dense[dense.index("[data.domains.code]") : dense.index("[train]")] in moe
