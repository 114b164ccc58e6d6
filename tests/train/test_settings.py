"""Configurations of `mixtral train`: what is read, and what is refused in one line."""

from pathlib import Path

import pytest

from mixtral.train.command import main
from mixtral.train.settings import Settings, read_settings
from mixtral.train.toml_tables import SettingsError, parse, read_table, to_toml
from tiny_run import CONFIG

pytest_plugins = ["training_fixtures"]

BAD = [
    ("lr = 3e-3", "lrr = 3e-3", "unknown key train.lrr; did you mean lr?"),
    ("[train]", "[trian]", "unknown key trian; did you mean train?"),
    ("hidden_size = 32", "hiden_size = 32", "unknown key model.hiden_size; did you mean hidden_size?"),
    ("weight = 2", "wieght = 2", "unknown key data.domains.b.wieght; did you mean weight?"),
    ("steps = 8", "steps = 8.5", "train.steps must be a whole number, got 8.5"),
    ("steps = 8", "steps = true", "train.steps must be a whole number, got True"),
    ("steps = 8", "steps = -1", "train.steps must be positive, got -1"),
    ("steps = 8", "", "[train] needs exactly one of steps, minutes and tokens, got none"),
    (
        "steps = 8",
        "steps = 8\ntokens = 100",
        "[train] needs exactly one of steps, minutes and tokens, got steps and tokens",
    ),
    ("lr = 3e-3", 'lr = "high"', "train.lr must be a number, got 'high'"),
    ("lr = 3e-3", "lr = 1e-4", "train.min_lr must be in [0, train.lr], got 0.0003"),
    ("lr = 3e-3", "lr = nan", "train.lr must be positive, got nan"),
    ("lr = 3e-3", "lr = 3e-3\nbetas = [0.9]", "train.betas must be two numbers in [0, 1), got [0.9]"),
    ("lr = 3e-3", "lr = 3e-3\nbetas = 0.9", "train.betas must be a list, each a number, got 0.9"),
    ("lr = 3e-3", 'lr = 3e-3\ndtype = "fp8"', "train.dtype must be one of float32, bfloat16, got 'fp8'"),
    ("lr = 3e-3", "lr = 3e-3\ncontext_curriculum = [[0, 64]]", "train.context_curriculum exceeds train.context 48"),
    ("hidden_size = 32", "", "model.hidden_size is missing"),
    ("hidden_size = 32", 'from = "x"', "model.from takes the sizes from its folder: remove intermediate_size"),
    ("num_experts = 4", "num_experts = 4\ntop_k = 5", "[model]: "),
    ('files = ["a.jsonl"]', 'files = "a.jsonl"', "data.domains.a.files must be a list, each a string, got 'a.jsonl'"),
    ('files = ["a.jsonl"]', "files = []", "data.domains.a.files is missing"),
    ('files = ["a.jsonl"]', 'files = ["none*.txt"]', "data.domains.a: no file matches"),
    ("weight = 2", "weight = 0", "data.domains.b.weight must be positive"),
    ('tokenizer = "tokenizer"', "", "name a tokenizer in data.tokenizer"),
    ('tokenizer = "tokenizer"', 'tokenizer = "nowhere"', "no tokenizer: expected a file, or a folder with"),
    ('tokenizer = "tokenizer"', "train_tokenizer = 4096", "data.train_tokenizer must be a table, got 4096"),
    (
        'tokenizer = "tokenizer"',
        "train_tokenizer = { vocab_size = 90000 }",
        "data.train_tokenizer: a tokenizer of 90000",
    ),
    ('tokenizer = "tokenizer"', 'tokenizer = "tokenizer"\npasskeys = 0.5', "a context of 48 is too short for passkeys"),
    (
        "num_experts = 4",
        "num_experts = 4\nvocab_size = 100",
        "vocabulary mismatch: the tokenizer has 320 tokens, the model 100",
    ),
    ("num_experts = 4", "num_experts = 4\nmax_position = 20", "train.context 48 exceeds max_position 20"),
    ('folder = "out"', "", "output.folder is missing"),
    ("[output]", '[router]\nbalance = "swich"\n[output]', "[router]: balance must be one of"),
    ("[output]", "[output", "not TOML"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_bad_configuration_is_one_line(
    corpus: Path, capsys: pytest.CaptureFixture, old: str, new: str, message: str
) -> None:
    config = corpus.with_name("bad.toml")
    config.write_text(CONFIG.replace(old, new, 1))
    assert main([str(config)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mixtral: ") and message in error, error
    assert str(config.parent) in error
    assert not (config.parent / "out" / "checkpoints").exists()


def test_flags_go_over_the_file(corpus: Path) -> None:
    settings = read_settings(
        corpus, ["train.lr=1e-2", "train.dtype=bfloat16", "model.window=0", "data.domains.b.weight=3"]
    )
    assert (settings.train.lr, settings.train.dtype, settings.model.window) == (1e-2, "bfloat16", 0)
    assert settings.data.domains["b"].weight == 3.0
    assert settings.data.domains["a"].held_out_share == 0.1
    with pytest.raises(SettingsError, match="expected section.key=value"):
        read_table(corpus, ["train.lr"])
    with pytest.raises(SettingsError, match="lr is not a section"):
        read_table(corpus, ["train.lr.x=1"])


def test_missing_files_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "no.toml")]) == 2
    assert capsys.readouterr().err == f"mixtral: {tmp_path / 'no.toml'}: No such file or directory\n"
    assert main(["--stepps", "3"]) == 2
    assert "see mixtral train --help" in capsys.readouterr().err


def test_written_settings_are_read_again(corpus: Path, tmp_path: Path) -> None:
    settings = read_settings(
        corpus, ["output.title='A \"title\"'", "data.train_tokenizer={vocab_size=300}", "data.tokenizer=''"]
    )
    (tmp_path / "again.toml").write_text(to_toml(settings))
    assert read_settings(tmp_path / "again.toml") == settings
    assert parse(Settings, {}, "x") == Settings()


def test_the_hint_for_a_missing_package(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtral import command_line

    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "sentencepiece" else name)
    assert main(["x.toml"]) == 5
    assert capsys.readouterr().err == "mixtral: train needs sentencepiece: pip install 'mixtral[train]'\n"
