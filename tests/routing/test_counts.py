"""Real counts of Mixtral-8x7B and OLMoE, published by allenai/OLMoE, through the binary."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, norm

from binary import ROOT, environment, mixtral
from mixtral.routing.command import main
from mixtral.routing.statistics import mutual_information_bits

COUNTS = ROOT / "tests" / "data" / "routing_counts.json"
LAYERS = (0, 7, 15)
# H / log E of three domains, and the Jensen-Shannon divergence of five in bits, of all and of first choices.
MIXTRAL_ENTROPY = {
    "arxiv": (0.9965, 0.9983, 0.9853),
    "github": (0.9968, 0.9964, 0.9919),
    "wikipedia": (0.9981, 0.9989, 0.9932),
}
MIXTRAL_DIVERGENCE = {"domain": (0.0031, 0.0037, 0.0090), "domain_first": (0.0129, 0.0105, 0.0244)}
OLMOE_DIVERGENCE = {"domain": (0.1674, 0.4005, 0.5012), "domain_first": (0.6284, 0.9733, 1.0278)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for model in ("mistral", "olmoe"):
        found[model] = tmp_path_factory.mktemp(model)
        run = mixtral("route", "--counts", f"{COUNTS}#{model}", "--out", found[model], env=environment())
        assert run.returncode == 0, run.stderr
        assert run.stderr == b""
    return found


@pytest.fixture(scope="module")
def metrics(folders: dict[str, Path]) -> dict[str, list[dict]]:
    return {name: json.loads((folder / "metrics.json").read_text())["layers"] for name, folder in folders.items()}


def test_cells_of_mixtral(metrics: dict[str, list[dict]]) -> None:
    layers = metrics["mistral"]
    assert [layer["layer"] for layer in layers] == list(LAYERS)
    for domain, cells in MIXTRAL_ENTROPY.items():
        assert [round(layer["load"][domain]["entropy"], 4) for layer in layers] == list(cells)
    for cause, cells in MIXTRAL_DIVERGENCE.items():
        assert [round(layer["information"][cause]["value"], 4) for layer in layers] == list(cells)


def test_cells_of_olmoe(metrics: dict[str, list[dict]]) -> None:
    for cause, cells in OLMOE_DIVERGENCE.items():
        assert [round(layer["information"][cause]["value"], 4) for layer in metrics["olmoe"]] == list(cells)


@pytest.mark.parametrize("model", ["mistral", "olmoe"])
def test_all_cells_are_those_of_scipy(metrics: dict[str, list[dict]], model: str) -> None:
    counts = json.loads(COUNTS.read_text())[model]
    for kind, cause in (("topk_assignments", "domain"), ("top1", "domain_first")):
        for index, layer in enumerate(metrics[model]):
            rows = np.array([table[index] for table in counts[kind].values()], float)
            assert layer["information"][cause]["value"] == pytest.approx(divergence(rows), abs=5e-7)
            if kind == "topk_assignments":
                for load, row in zip(layer["load"].values(), rows, strict=True):
                    assert load["entropy"] == pytest.approx(entropy(row) / np.log(len(row)), abs=5e-7)
                    assert load["either"] == pytest.approx(row / row.sum(), abs=5e-7)


def divergence(rows: np.ndarray) -> float:
    """Of domains of the same size, in bits: the mean distance to their mean."""
    share = rows / rows.sum(1, keepdims=True)
    return float(np.mean([entropy(row, share.mean(0), base=2) for row in share]))


def test_divergence_of_two_is_that_of_scipy() -> None:
    rows = np.array([[1.0, 2, 3], [3, 2, 1]])
    assert divergence(rows) == pytest.approx(jensenshannon(*rows, base=2) ** 2)


def test_intervals_are_those_of_counts_drawn_again(metrics: dict[str, list[dict]]) -> None:
    rows = np.array([table[2] for table in json.loads(COUNTS.read_text())["mistral"]["topk_assignments"].values()])
    drawn = np.random.default_rng(0).multinomial(rows.sum(), rows.ravel() / rows.sum(), 400)
    spread = np.std([mutual_information_bits(table.reshape(rows.shape)) for table in drawn])
    found = metrics["mistral"][2]["information"]["domain"]
    assert (found["high"] - found["low"]) / 2 == pytest.approx(norm.ppf(0.995) * spread, rel=0.15)
    load = metrics["mistral"][2]["load"]["github"]
    spread = np.sqrt(load["either"][3] * (1 - load["either"][3]) / rows[3].sum())
    assert load["half_width"]["either"][3] == pytest.approx(norm.ppf(0.995) * spread, rel=1e-3)


def test_second_choices_are_what_first_ones_leave(metrics: dict[str, list[dict]]) -> None:
    load = metrics["mistral"][0]["load"]["arxiv"]
    assert 2 * np.array(load["either"]) == pytest.approx(np.array(load["first"]) + load["second"], abs=1e-6)
    assert metrics["olmoe"][0]["load"]["arxiv"]["second"] is None  # seven further choices, not told apart


def test_counts_fill_load_and_domain_alone(metrics: dict[str, list[dict]], folders: dict[str, Path]) -> None:
    for layers in metrics.values():
        assert all(set(layer) == {"layer", "load", "information"} for layer in layers)
        assert all(set(layer["information"]) == {"domain", "domain_first"} for layer in layers)
    report = (folders["mistral"] / "report.html").read_text()
    assert report.count("<figure>") == 3
    assert not (folders["mistral"] / "trace.safetensors").exists()


def test_layers_are_those_of_the_file(tmp_path: Path) -> None:
    run = mixtral("route", "--counts", f"{COUNTS}#mistral", "--layers", "15", "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    (layer,) = json.loads((tmp_path / "metrics.json").read_text())["layers"]
    assert layer["layer"] == 15
    run = mixtral("route", "--counts", f"{COUNTS}#mistral", "--layers", "1", "--out", tmp_path)
    assert (run.returncode, run.stderr) == (2, b"mixtral: --layers: expected layers out of 0, 7, 15, got 1\n")


GOOD = {"topk_assignments": {"a": [[3, 1]], "b": [[2, 2]]}, "top1": {"a": [[3, 1]], "b": [[2, 2]]}}


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("", 3, "counts.json: no JSON: Expecting value"),
        ("[1]", 3, "counts.json: expected an object with topk_assignments"),
        ("{}", 3, "counts.json: topk_assignments: missing"),
        ("[" * 100_000, 3, "counts.json: no JSON: "),
        (json.dumps({"m": GOOD}), 2, "name one: "),
        (json.dumps(GOOD | {"layers": [1, 2]}), 3, "counts.json: layers: expected 1 different numbers, all >= 0"),
        (json.dumps(GOOD | {"layers": ["a"]}), 3, "counts.json: layers: expected 1 different numbers, all >= 0"),
        (json.dumps(GOOD | {"layers": [-1]}), 3, "counts.json: layers: expected 1 different numbers, all >= 0"),
        (json.dumps(GOOD | {"layers": [None]}), 3, "counts.json: layers: expected 1 different numbers, all >= 0"),
        (json.dumps(GOOD | {"layers": 1}), 3, "counts.json: layers: expected 1 different numbers, all >= 0"),
        (json.dumps(GOOD | {"topk_assignments": {}}), 3, "topk_assignments: expected {domain: counts}"),
        (json.dumps(GOOD | {"topk_assignments": {"a": [[1, "x"]]}}), 3, "topk_assignments.a: expected a list"),
        (json.dumps(GOOD | {"topk_assignments": {"a": [[1, 2], [3]]}}), 3, "topk_assignments.a: expected a list"),
        (json.dumps(GOOD | {"topk_assignments": {"a": [[1, -1]]}}), 3, "topk_assignments.a: expected a list"),
        (json.dumps(GOOD | {"topk_assignments": {"a": [[0, 0]]}}), 3, "topk_assignments.a: expected counts"),
        (json.dumps(GOOD | {"topk_assignments": {"a": [[1, 2]], "b": [[1, 2, 3]]}}), 3, "the same layers and experts"),
        (json.dumps(GOOD | {"top1": {"a": [[3, 1]]}}), 3, "top1: expected the domains"),
        (json.dumps(GOOD | {"top1": {"a": [[2, 0]], "b": [[9, 1]]}}), 3, "top1.b: expected first choices"),
    ],
)
def test_bad_counts_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture, text: str, status: int, message: str
) -> None:
    (tmp_path / "counts.json").write_text(text)
    assert main(["--counts", f"{tmp_path}/counts.json", "--out", f"{tmp_path}/out"]) == status
    assert_one_line(capfd.readouterr().err, message)
    assert not (tmp_path / "out").exists()


def test_a_bad_key_is_named(capfd: pytest.CaptureFixture) -> None:
    assert main(["--counts", f"{COUNTS}#mixtral"]) == 2
    assert_one_line(capfd.readouterr().err, "routing_counts.json#mistral or #olmoe, got #mixtral")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    run = mixtral("route", "--counts", tmp_path / "no.json")
    assert run.returncode == 3
    assert_one_line(run.stderr.decode(), "no.json: No such file or directory")


def assert_one_line(error: str, message: str) -> None:
    assert message in error and error.startswith("mixtral: ") and error.count("\n") == 1, error
