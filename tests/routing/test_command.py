"""`mixtral route` from end to end, on the bundled model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mixtral as package
from binary import BINARY, DEMO, ROOT, environment, mixtral
from mixtral import command_line
from mixtral.routing import command, load

HELD_OUT = ROOT / "tests" / "data" / "held_out"
TEXTS = [argument for name in ("bible", "sqlite") for argument in ("--domain", f"{name}={HELD_OUT / name}.txt")]
LOAD = {"first", "second", "either", "entropy", "jain", "max_violation"}
LOCALITY = {"first", "either", "null_first", "null_either"}
INFORMATION = {"token", "domain", "domain_given_token", "previous_given_token", "position"}
MEASURED = {"load", "locality", "information", "vocabulary", "coactivation", "confidence", "caching", "capacity"}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, by the binary, without MODEL."""
    out = tmp_path_factory.mktemp("first") / "routing"
    run = mixtral("route", *TEXTS, "--tokens", "1200", "--out", out)
    assert (run.returncode, run.stderr) == (0, b""), run.stderr
    assert run.stdout.decode() == f"{out}: 1200 tokens in trace.safetensors, metrics.json, report.html\n"
    return out


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything else, by `python -m mixtral`: MODEL, the first run as reference, parallel texts, knock-out, layers."""
    folder = tmp_path_factory.mktemp("second")
    lines = (HELD_OUT / "bible.txt").read_text().replace("\n", " ").split(".")[:30]
    (folder / "en.txt").write_text("\n".join(lines))
    (folder / "loud.txt").write_text("\n".join(line.upper() for line in lines))
    languages = [word for name in ("en", "loud") for word in ("--parallel", f"{name}={folder / name}.txt")]
    run = subprocess.run(
        [sys.executable, "-m", "mixtral", "route", DEMO, *languages, "--layers", "1,3", "--ctx-size", "128"]
        + ["--knockout", "100", "--tokens", "800", "--out", folder / "out"],
        env=environment(PYTHONPATH=str(ROOT / "python")),
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return folder / "out"


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_metrics_have_the_documented_keys(first: Path) -> None:
    metrics = metrics_of(first)
    assert metrics["domains"].keys() == {"bible", "sqlite"} and len(metrics["layers"]) == 4
    for number, layer in enumerate(metrics["layers"]):
        assert layer["layer"] == number and layer.keys() > MEASURED
        assert set(layer["load"]) == set(layer["locality"]) == {"bible", "sqlite"}
        for domain in ("bible", "sqlite"):
            assert layer["load"][domain].keys() > LOAD and layer["locality"][domain].keys() > LOCALITY
        assert layer["information"].keys() > INFORMATION
        for cause in INFORMATION:
            found = layer["information"][cause]
            assert found["low"] <= found["value"] <= found["high"]
    assert ("transition" in layer) is False  # the last one has no next layer


def test_every_key_is_documented(first: Path, second: Path) -> None:
    text = (ROOT / "docs" / "routing.md").read_text()

    def keys(value: object, names: set[str]) -> set[str]:
        if isinstance(value, dict):
            names |= {key for key in value if not key.replace(".", "").isdecimal()}
            [keys(item, names) for item in value.values()]
        if isinstance(value, list):
            [keys(item, names) for item in value[:1]]
        return names

    texts = {"bible", "sqlite", "en", "loud", "en-loud"}
    names = keys(metrics_of(first), set()) | keys(metrics_of(second), set())
    assert not {name for name in names - texts if f"`{name}`" not in text}


def test_load_is_that_of_the_trace(first: Path) -> None:
    trace = package.Trace.load(first / "trace.safetensors")
    assert trace.domain_names == ["bible", "sqlite"] and trace.router_logits is not None
    assert len(trace) == 1200 and trace.positions.max() == 511
    for layer, found in enumerate(metrics_of(first)["layers"]):
        for domain, name in enumerate(trace.domain_names):
            rows = (trace.domains == domain) & ~trace.special
            ids = trace.topk_ids[rows, layer].numpy()
            both = [np.bincount(chosen.ravel(), minlength=8) for chosen in (ids[:, 0], ids)]
            for key, counts in zip(("first", "either"), both, strict=True):
                assert found["load"][name][key] == pytest.approx(counts / counts.sum(), abs=1e-6)


def test_the_bundled_model_routes_by_token_more_than_by_domain(first: Path) -> None:
    for layer in metrics_of(first)["layers"]:
        information = layer["information"]
        assert information["token"]["low"] > information["domain_given_token"]["high"]
        assert information["domain"]["low"] > 0


def test_tables_of_pandas(first: Path) -> None:
    tables = load(first)
    metrics = metrics_of(first)
    assert all(isinstance(table, pd.DataFrame) and len(table) for table in tables.values())
    shares = tables["load"].set_index(["layer", "domain", "expert"])
    assert shares.loc[(2, "sqlite", 5), "first"] == metrics["layers"][2]["load"]["sqlite"]["first"][5]
    assert shares.groupby(["layer", "domain"])["either"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    bits = tables["information"].set_index(["layer", "cause"])
    assert bits.loc[(1, "token"), "low"] == metrics["layers"][1]["information"]["token"]["low"]
    assert len(tables["locality"]) == 8 and len(tables["coactivation"]) == 4 * 64
    assert set(tables["caching"].columns) == {"layer", "capacity", "lru", "lfu", "belady", "null"}


def test_reading_another_folder_fails_in_words(tmp_path: Path) -> None:
    with pytest.raises(package.LoadError, match="expected a folder that mixtral route wrote"):
        load(tmp_path)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(package.LoadError, match="no metrics of mixtral route"):
        load(tmp_path)


def test_parallel_texts_knockout_and_layers(second: Path) -> None:
    metrics = metrics_of(second)
    assert metrics["languages"] == ["en", "loud"] and [layer["layer"] for layer in metrics["layers"]] == [1, 3]
    for layer in metrics["layers"]:
        pair = layer["languages"]["divergence"]["en-loud"]
        assert pair["low"] <= pair["value"] <= pair["high"] and pair["value"] > pair["null"]
        assert len(layer["knockout"]["delta"]) == 8 and len(layer["knockout"]["half_width"]) == 8
    nll = metrics["experts_per_token"]["nll"]
    assert len(nll) == 8 and len(set(nll)) == 8
    assert {"knockout", "languages"} <= load(second).keys()


def test_parallel_texts_end_at_the_same_line(second: Path) -> None:
    trace = package.Trace.load(second / "trace.safetensors")
    ids = [trace.token_ids[(trace.domains == domain) & ~trace.special] for domain in range(2)]
    texts = [package.Tokenizer(DEMO).decode(part.tolist()) for part in ids]
    assert texts[0].strip().upper().split("\n")[-1].split()[-1] == texts[1].strip().split("\n")[-1].split()[-1]
    assert max(len(part) for part in ids) <= 400 and trace.positions.max() < 128


def test_saturation_against_an_earlier_trace(first: Path, tmp_path: Path) -> None:
    arguments = [*TEXTS, "--tokens", "1200", "--reference", str(first / "trace.safetensors"), "--out", str(tmp_path)]
    assert command.main([*arguments, str(DEMO)]) == 0  # MODEL may come last
    assert all(layer["saturation"]["value"] == 1 for layer in metrics_of(tmp_path)["layers"])


def test_text_in_colours(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("And it came to pass\nin those days, that there went out a decree; and so on: él")
    assert command.main([str(DEMO), "--domain", f"x={text}", "--ansi", "--layers", "2"]) == 0
    output = capsys.readouterr().out
    assert "layer 2, x\n" in output and output.count("layer ") == 1
    plain = "".join(part.partition("m")[2] for part in output.split("layer 2, x")[1].split("\x1b["))
    assert "And it came to pass" in plain and "decree" in plain
    assert not (tmp_path / "routing").exists()


# ---- the three ways to it


def test_the_binary_finds_python_by_its_name() -> None:
    run = mixtral("route", "--help", env=environment(MIXTRAL_PYTHON=sys.executable))
    assert run.returncode == 0 and b"--parallel LANG=FILE" in run.stdout
    assert b"  route " in mixtral("--help").stdout


def test_the_binary_says_what_to_install(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    run = mixtral("route", env=environment(MIXTRAL_PYTHON=str(bare)))
    assert run.returncode == 5 and run.stderr.count(b"\n") == 1
    assert b"has no mixtral package" in run.stderr and b"pip install 'mixtral[routing]'" in run.stderr
    run = mixtral("route", env=environment(MIXTRAL_PYTHON=str(tmp_path / "none")))
    assert run.returncode == 5 and run.stderr.count(b"\n") == 1 and b"cannot be started" in run.stderr


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("scipy", "pandas", "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""


def test_mixtral_needs_no_scipy() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT + "import mixtral, mixtral.routing; mixtral.Mixtral, mixtral.Trace"],
        env=environment(PYTHONPATH=str(ROOT / "python")),
    )
    assert run.returncode == 0


def test_route_says_what_to_install(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name in ("scipy", "pandas") else name)
    assert command.main(["--domain", "a=b"]) == 5
    assert capsys.readouterr().err == "mixtral: route needs pandas, scipy: pip install 'mixtral[routing]'\n"


# ---- the environment


def test_flags_that_are_not_given_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"TOKENS": "200k", "LAYERS": "1-3", "DOMAIN": "a=b", "ANSI": "on", "DEVICE": "cuda", "CTX_SIZE": ""}
    for name, value in variables.items():
        monkeypatch.setenv(f"MIXTRAL_{name}", value)
    flags = command._parser().parse_intermixed_args(["--device", "cpu", "--domain", "c=d", "MODEL"])
    assert (flags.tokens, flags.layers, flags.ansi, flags.ctx_size) == (200_000, [1, 2, 3], True, 512)
    assert (flags.device, flags.domain, flags.path) == ("cpu", ["c=d"], "MODEL")
    monkeypatch.setenv("MIXTRAL_ANSI", "no")
    flags = command._parser().parse_intermixed_args([])
    assert (flags.device, flags.domain, flags.ansi) == ("cuda", ["a=b"], False)


@pytest.mark.parametrize(
    ("variable", "value", "status", "message"),
    [
        ("MIXTRAL_MODEL", "/nowhere", 3, "/nowhere"),
        ("MIXTRAL_DEVICE", "tpu", 2, "argument --device: invalid choice: 'tpu'"),
        ("MIXTRAL_TOKENS", "many", 2, "argument --tokens: expected a number such as 200k, got many"),
        ("MIXTRAL_ANSI", "maybe", 2, "MIXTRAL_ANSI: expected true or false, got maybe"),
    ],
)
def test_wrong_values_of_the_environment_are_one_line(
    variable: str, value: str, status: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("And it came to pass. " * 20)
    variables = environment(MIXTRAL_PYTHON=sys.executable, PYTHONPATH=str(ROOT / "python"), **{variable: value})
    run = mixtral("route", "--domain", f"a={tmp_path / 'text'}", "--out", tmp_path / "out", env=variables)
    error = run.stderr.decode()
    assert run.returncode == status and message in error and error.count("\n") == 1, error


# ---- bad input


@pytest.fixture
def files(tmp_path: Path, first: Path) -> dict[str, Path]:
    names = ("empty", "short", "text", "binary", "zero", "truncated", "other")
    found = {name: tmp_path / f"{name}.txt" for name in names}
    found["empty"].write_text(" \n")
    found["short"].write_text("Once")
    found["text"].write_text("And it came to pass in those days. " * 20)
    found["binary"].write_bytes(BINARY.read_bytes()[:5000])
    found["zero"].write_bytes(b"text\0text")
    whole = (first / "trace.safetensors").read_bytes()
    found["truncated"].write_bytes(whole[: len(whole) // 2])
    return found | {"trace": first / "trace.safetensors", "model": DEMO / "model.safetensors", "folder": tmp_path}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give a text with --domain NAME=FILE"),
        (["--domain", "a"], 2, "--domain: expected NAME=FILE, got a"),
        (["--domain", "a={text}", "--domain", "a={text}"], 2, "--domain: a is given twice"),
        (["--domain", "a={empty}"], 2, "--domain: a is empty: "),
        (["--domain", "a={short}"], 2, "domain a: expected at least 20 tokens, got 2"),
        (["--domain", "a={text}", "--tokens", "1"], 2, "--tokens: expected at least 2 for each text, got 1"),
        (["--domain", "a={text}", "--tokens", "many"], 2, "expected a number such as 200k, got many"),
        (["--domain", "a={text}", "--layers", "4"], 2, "--layers: expected layers in [0, 3], got 4"),
        (["--domain", "a={text}", "--layers", "x"], 2, "expected all, or numbers such as 0,7,15 or 0-3, got x"),
        (["--domain", "a={text}", "--ctx-size", "1"], 2, "--ctx-size: must be >= 2, got 1"),
        (["--domain", "a={binary}"], 3, "binary.txt: no UTF-8 text"),
        (["--domain", "a={zero}"], 3, "zero.txt: no text: it has a zero byte"),
        (["--domain", "a={folder}/none"], 3, "none: No such file or directory"),
        (["--domain", "a={folder}"], 3, "Is a directory"),
        (["--domain", "a={text}", "--reference", "{truncated}"], 3, "truncated.txt: "),
        (["--domain", "a={text}", "--reference", "{model}"], 3, "model.safetensors: is no trace"),
        (["--domain", "a={text}", "--reference", "{text}"], 3, "text.txt: "),
        (["--domain", "a={text}", "--reference", "{trace}"], 2, "a trace of another text"),
        (["--parallel", "a={text}"], 2, "--parallel: expected at least two languages, got one"),
        (["--parallel", "a={text}", "--parallel", "b={short}", "--domain", "a={text}"], 2, "a is the name of a domain"),
        (["{folder}/nowhere", "--domain", "a={text}"], 3, "nowhere"),
        (["--domain", "a={text}", "--out", "{text}"], 2, "--out: cannot make "),
        (["--domain", "a={text}", "--unknown"], 2, "unrecognized arguments: --unknown"),
        (["--counts", "x.json", "--domain", "a={text}"], 2, "--counts: goes without --domain"),
        (["--domain", "a={text}", "--knockout", "9", "--dtype", "int8"], 2, "--knockout: expected weights in float32"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    status: int,
    message: str,
    files: dict[str, Path],
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files["folder"])
    assert command.main([argument.format(**files) for argument in arguments]) == status
    error = capfd.readouterr().err
    assert message in error and error.startswith("mixtral: ") and error.count("\n") == 1, error
    written = {path.name for path in files["folder"].rglob("*") if path.suffix in (".json", ".html", ".safetensors")}
    assert not written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "b={text}", "--domain", "a={short}"], "domain a: expected at least 20 tokens, got 2"),
        (["--domain", "a={text}", "--layers", "4"], "--layers: expected layers in [0, 3], got 4"),
        (
            ["--parallel", "a={text}", "--parallel", "b={text}", "--tokens", "4"],
            "domain a: expected at least 20 tokens",
        ),
        (
            ["--parallel", "a={text}", "--parallel", "b={text}", "--tokens", "4", "--ansi"],
            "domain a: expected at least 1",
        ),
    ],
)
def test_what_cannot_be_analysed_is_not_traced(
    arguments: list[str],
    message: str,
    files: dict[str, Path],
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files["folder"])

    def trace(*_: object, **__: object) -> None:
        pytest.fail("the texts were traced")

    monkeypatch.setattr(package.Mixtral, "trace", trace)
    assert command.main([argument.format(**files) for argument in arguments]) == 2
    assert capfd.readouterr().err.startswith(f"mixtral: {message}")


def test_parallel_texts_of_different_lengths(files: dict[str, Path], capfd: pytest.CaptureFixture) -> None:
    files["short"].write_text("one\ntwo\n")
    arguments = ["--parallel", f"a={files['text']}", "--parallel", f"b={files['short']}", "--out", str(files["folder"])]
    assert command.main(arguments) == 2
    assert "--parallel: b: expected 1 lines as in" in capfd.readouterr().err


def test_sigterm_ends_it(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text((HELD_OUT / "bible.txt").read_text() * 500)
    run = subprocess.Popen(
        [BINARY, "route", "--domain", f"a={text}", "--out", tmp_path / "out"],
        env=environment(MIXTRAL_PYTHON=sys.executable),
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "out").exists():  # made before the model is read
        assert run.poll() is None
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(2)
    run.terminate()
    assert (run.wait(60), run.stderr.read()) == (143, b"")
    assert os.listdir(tmp_path / "out") == []
