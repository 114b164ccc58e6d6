"""The notebook of docs/ runs, and finds what it says."""

import json

import matplotlib
import pytest

from binary import ROOT

NOTEBOOK = ROOT / "docs" / "routing.ipynb"


@pytest.fixture(scope="module")
def found() -> dict:
    """The variables after all code cells, run one after the other."""
    matplotlib.use("Agg")
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for cell in json.loads(NOTEBOOK.read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name} {cell['id']}", "exec"), names)
    return names


def test_real_counts_say_that_domains_hardly_matter(found: dict) -> None:
    bits = found["bits"]
    assert bits["Mixtral-8x7B", "a choice"].round(4).tolist() == [0.0031, 0.0037, 0.0090]
    assert (bits["OLMoE-1B-7B"] > 40 * bits["Mixtral-8x7B"]).all(axis=None)


def test_the_token_decides_most(found: dict) -> None:
    for layer in found["layers"]:
        information = layer["information"]
        assert information["token"]["low"] > information["domain_given_token"]["high"]
        assert information["token"]["low"] > information["domain"]["high"]


def test_neighbours_agree_beyond_their_loads_in_half_of_the_layers(found: dict) -> None:
    above = [
        layer["locality"][domain]["intervals"]["either"]["low"] > layer["locality"][domain]["null_either"]
        for layer in found["layers"]
        for domain in ("bible", "sqlite")
    ]
    assert sum(above) >= len(above) / 2


def test_tables_have_all_layers_and_domains(found: dict) -> None:
    assert found["table_5"].shape == (8, 8) and found["information"].shape == (4, 6)
    assert found["spans"] and len(found["rows"]) == 120
