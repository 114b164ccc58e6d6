"""`mixtral perplexity --contexts`, `mixtral passkey` and `mixtral reach` as users run them."""

import json
import lzma
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from binary import ROOT, environment, mixtral, ok, ok_json

HELD_OUT = ROOT / "tests" / "data" / "held_out" / "bible.txt"
WEIGHTS = ROOT / "models" / "demo" / "model.safetensors"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("And it came to pass in those days, that there went out a decree.\n" * 8)
    return file


def with_python(python: str) -> dict[str, str]:
    return environment(MIXTRAL_PYTHON=python, PYTHONPATH=str(ROOT / "python"))


def failure(*arguments: str | Path, **options) -> tuple[int, str]:
    run = mixtral(*arguments, **options)
    message = run.stderr.decode()
    assert run.stdout == b"" and message.startswith("mixtral: ") and message.count("\n") == 1, message
    return run.returncode, message


def test_contexts_are_scored_by_every_protocol(text):
    tokens = ok_json("perplexity", text)["tokens"]
    for protocol in ["fixed", "sliding:16", "buckets", "disjoint"]:
        result = ok_json("perplexity", text, "--contexts", "16,64", "--protocol", protocol, "--targets", "last:32")
        assert result["protocol"] == protocol
        rows = result["contexts"]
        assert [row["context"] for row in rows][:2] == ([tokens] if protocol == "buckets" else [16, 64])
        assert all(row["targets"] == 32 and row["nll"] > 0 and row["standard_error"] > 0 for row in rows)
    by_default = ok_json("perplexity", text, "--contexts", "64")
    assert by_default["protocol"] == "fixed" and by_default["contexts"][0]["targets"] == min(256, tokens)


def test_the_report_shows_the_numbers_and_the_line_of_xz(text):
    arguments = ["perplexity", text, "--contexts", "16,64", "--targets", "last:32", "--window-means"]
    result, report = ok_json(*arguments), ok(*arguments).decode()
    xz = 8 * len(lzma.compress(text.read_bytes(), preset=9)) / text.stat().st_size
    assert result["xz_bits_per_byte"] == pytest.approx(xz, rel=1e-12)
    for row in result["contexts"]:
        assert f"{row['nll']:.5f}" in report and f"{row['bits_per_byte']:.5f}" in report
    assert f"{xz:.5f} bits per byte" in report and "YaRN" in report
    assert result["contexts"][0]["mean_of_window_means"] == pytest.approx(result["contexts"][0]["nll"])
    assert f"{result['contexts'][1]['change']['nll']:+.5f}" in report
    assert "mean_of_window_means" not in ok_json(*arguments[:-1])["contexts"][0]


def test_without_the_program_xz_its_line_is_left_out(text):
    arguments, nowhere = ["perplexity", text, "--contexts", "16"], environment(PATH="/nonexistent")
    assert ok_json(*arguments, env=nowhere)["xz_bits_per_byte"] is None
    assert b"xz" not in ok(*arguments, env=nowhere)


def test_documents_come_from_jsonl_or_from_cutting(text, tmp_path):
    words = text.read_text().splitlines()
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(words[i : i + 2]), "id": i}) + "\n" for i in range(0, 8, 2)))
    result = ok_json("perplexity", file, "--contexts", "16", "--targets", "last:8")
    assert (result["documents"], result["standard_error_over"]) == (4, "documents")
    assert result["contexts"][0]["targets"] == 32
    assert result["contexts"][0]["standard_error"] == pytest.approx(0, abs=1e-9)  # four times the same document
    cut = ok_json("perplexity", text, "--contexts", "16", "--targets", "last:8", "--document-tokens", "50")
    assert cut["documents"] > 1
    file.write_text('{"text": "a"}\n{"txt": "b"}\n')
    assert failure("perplexity", file, "--contexts", "16")[1].endswith(
        'documents.jsonl, line 2: must be a JSON object with the document under "text"\n'
    )


def test_passkey_reports_its_cells():
    arguments = ["passkey", "--lengths", "100,128", "--depths", "2", "--trials", "1", "--distances", "2"]
    result = ok_json(*arguments)
    assert (result["style"], result["digits"]) == ("landmark", 5) and result["k_max"] > 0
    assert [(c["length"], c["depth"], c["trials"]) for c in result["cells"]] == [
        (100, 0, 1),
        (100, 1, 1),
        (128, 0, 1),
        (128, 1, 1),
    ]
    assert len(result["distances"]) == 2
    report = ok(*arguments).decode()
    assert (
        f"k_max           {result['k_max']} tokens" in report
        and "1e-05 of keys" in report
        and "beyond 508 tokens" in report
    )
    assert f"{result['cells'][0]['logprob']:.4f}" in report
    ruler = ok_json(
        "passkey", "--lengths", "150", "--depths", "1", "--trials", "1", "--style", "ruler", "--distances", "0"
    )
    assert (ruler["style"], ruler["digits"], len(ruler["cells"]), ruler["distances"]) == ("ruler", 7, 1, [])


def test_reach_is_that_of_the_window_and_the_layers():
    result = ok_json("reach", "--trials", "1", "-c", "540")
    assert (result["window"], result["layers"], result["reach"]) == (128, 4, 508)
    assert result["changed"]["400"] > 0 and result["changed"]["509"] == 0 and len(result["changed"]) == 540
    (farthest,) = set(result["farthest"].values())  # at the very edge a change may be lost in the rounding
    assert 490 < farthest <= 508
    report = ok("reach", "--trials", "1", "-c", "200").decode()
    assert "508 tokens = layers * (window - 1)" in report and "distance 0 to 127" in report


@pytest.mark.parametrize(
    "arguments",
    [
        ["perplexity", HELD_OUT, "--contexts", "64,256", "--targets", "last:16"],
        ["passkey", "--lengths", "100,128", "--depths", "2", "--trials", "1", "--distances", "0"],
        ["reach", "--trials", "1", "-c", "150"],
    ],
    ids=["perplexity", "passkey", "reach"],
)
def test_svg_draws_what_json_tells(arguments, tmp_path):
    svg = tmp_path / "figure.svg"
    result = ok_json(*arguments, "--svg", svg, env=with_python(sys.executable))
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    again = ok_json(*arguments)  # and without a figure no Python is needed
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_svg_without_python_says_what_to_install_before_any_work(tmp_path):
    for python in ["/nonexistent", "true-that-is-nowhere", "false"]:
        arguments = ["reach", "--svg", tmp_path / "figure.svg"]
        code, message = failure(*arguments, env=environment(MIXTRAL_PYTHON=python))
        assert code == 5 and "pip install 'mixtral[routing]'" in message and python in message
    assert not (tmp_path / "figure.svg").exists()
    code, message = failure("reach", "--svg", tmp_path / "no" / "figure.svg", env=with_python(sys.executable))
    assert code == 2 and "cannot write" in message


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["perplexity", HELD_OUT, "--contexts", "4000"], 2, "the text is shorter than the context: "),
        (["perplexity", HELD_OUT, "--contexts", "4097"], 2, "contexts must be at most 4096"),
        (["perplexity", HELD_OUT, "--contexts", "300", "-c", "256"], 2, "contexts must be at most 256"),
        (["perplexity", HELD_OUT, "--contexts", "0"], 2, "contexts must be > 0, got 0"),
        (["perplexity", HELD_OUT, "--contexts", "-5"], 2, "contexts must be > 0, got -5"),
        (["perplexity", HELD_OUT, "--contexts", "x"], 2, "--contexts must be a number, got x"),
        (["perplexity", HELD_OUT, "--contexts", "64", "--protocol", "strided"], 2, "protocol must be fixed, sliding:S"),
        (["perplexity", HELD_OUT, "--contexts", "64", "--protocol", "sliding:65"], 2, "stride must be at most 64"),
        (["perplexity", HELD_OUT, "--contexts", "64", "--targets", "first:2"], 2, "targets must be all, or last:N"),
        (["perplexity", HELD_OUT, "--protocol", "fixed"], 2, "--protocol needs --contexts"),
        (["perplexity", HELD_OUT, "--contexts", "64", "--compare-dtype", "float32"], 2, "--compare-dtype goes without"),
        (["perplexity", HELD_OUT, "--contexts", "64", "--trace", "t.safetensors"], 2, "--trace goes without"),
        (["perplexity", "/dev/null", "--contexts", "64"], 2, "no tokens"),
        (["perplexity", "/nonexistent", "--contexts", "64"], 2, "cannot open /nonexistent"),
        (["perplexity", WEIGHTS], 2, "model.safetensors is no text: it has a zero byte"),
        (["perplexity", WEIGHTS, "--contexts", "64"], 2, "model.safetensors is no text: it has a zero byte"),
        (["perplexity", "/nonexistent", HELD_OUT, "--contexts", "64"], 3, "/nonexistent"),
        (["passkey"], 2, "--lengths is required"),
        (["passkey", "--lengths", "20"], 2, "lengths must be at least "),
        (["passkey", "--lengths", "5000"], 2, "lengths must be at most 4096"),
        (["passkey", "--lengths", "128", "--style", "needle"], 2, "style must be landmark or ruler"),
        (["passkey", "--lengths", "128", "--trials", "0"], 2, "--trials: must be >= 1"),
        (["passkey", "/nonexistent", "--lengths", "128"], 3, "/nonexistent"),
        (["reach", "/nonexistent"], 3, "/nonexistent"),
        (["reach", "--trials", "0"], 2, "--trials: must be >= 1"),
    ],
)
def test_wrong_input_is_one_line(arguments, code, words):
    got, message = failure(*arguments)
    assert (got, words in message) == (code, True), message
