"""What a run reads: documents, their order, packing, passkeys, the tokenizer, held-out windows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtral._C import Config
from mixtral.tokenizer import Tokenizer
from mixtral.train import Mixtral, data, documents, passkeys
from mixtral.train.evaluation import windows
from mixtral.train.settings import read_settings
from mixtral.train.tokenizer_training import CHAT_TEMPLATE, train_tokenizer, write_tokenizer
from mixtral.train.toml_tables import SettingsError
from tiny_run import DEMO_TOKENIZER

pytest_plugins = ["training_fixtures"]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer(DEMO_TOKENIZER)


def load(corpus: Path, *overrides: str) -> tuple[data.Mixture, list[data.Domain], Tokenizer]:
    settings = read_settings(corpus, overrides)
    tokenizer = Tokenizer(corpus.parent / settings.data.tokenizer)
    texts = data.load_texts(settings.data, corpus.parent, "config")
    domains = data.load_domains(settings.data, texts, tokenizer, corpus.parent, "config")
    return data.Mixture(domains, settings.data, settings.train, tokenizer), domains, tokenizer


def whole(docs: documents.Documents, tokenizer: Tokenizer) -> list[list[int]]:
    return [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in docs]


def test_an_epoch_has_every_document_once_and_the_next_another_order(corpus: Path) -> None:
    _, domains, tokenizer = load(corpus)
    docs = domains[0].train
    stream = data.Stream(docs, tokenizer.bos_id, tokenizer.eos_id, seed=3, number=0)
    epochs = [stream.pieces(e * stream.tokens, (e + 1) * stream.tokens, context=10**6) for e in range(2)]
    for pieces in epochs:
        assert sorted(pieces) == sorted(whole(docs, tokenizer))
    assert epochs[0] != epochs[1]


def test_a_step_is_a_function_of_its_number(corpus: Path) -> None:
    mixture, domains, tokenizer = load(corpus)
    forward = [mixture.pieces(step, 48) for step in range(30)]
    fresh = load(corpus)[0]
    for step in (29, 3, 17):
        assert fresh.pieces(step, 48) == forward[step]
    assert load(corpus, "train.seed=1")[0].pieces(3, 48) != forward[3]
    # The steps together are the stream, whole, by the weights of the domains.
    tokens = [sum(len(ids) for step in forward for ids, _ in step)]
    assert abs(tokens[0] - 30 * 192) <= 30 * 2
    stream = mixture.streams[0]
    parts = [p for step in range(30) for p in stream.pieces(step * 64, (step + 1) * 64, 48)]
    assert [i for p in parts for i in p] == [i for p in stream.pieces(0, 30 * 64, 10**6) for i in p]
    assert max(map(len, parts)) <= 48


def test_held_out_documents_are_never_trained_on(corpus: Path) -> None:
    mixture, domains, tokenizer = load(corpus)
    assert [len(d.held_out) for d in domains] == [4, 1]
    trained = {tuple(ids) for d in domains for ids in d.train}
    assert not trained & {tuple(ids) for d in domains for ids in d.held_out}
    assert [len(d.train) for d in domains] == [36, 2]


def test_microbatches_hold_the_documents_of_the_step(corpus: Path) -> None:
    one = load(corpus)[0](5, 48)
    many = load(corpus, "train.accumulation=3")[0](5, 48)
    assert (len(one), len(many)) == (1, 3)

    def rows(batches):
        ends = [(b, s, e) for b in batches for s, e in zip(b.cu_seqlens[:-1], b.cu_seqlens[1:], strict=True)]
        return sorted(tuple(b.input_ids[s:e].tolist()) + (int(b.labels[e - 1]),) for b, s, e in ends)

    assert rows(one) == rows(many)
    sizes = [b.tokens for b in many]
    assert max(sizes) - min(sizes) <= 48


def test_no_token_of_one_document_sees_another(corpus: Path) -> None:
    batch = load(corpus)[0](0, 48)[0]
    config = Config(
        hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, vocab_size=320,
        max_position=48, num_experts=4, top_k=2, rms_norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    model = Mixtral.from_config(config, seed=0).eval()
    begin, end = batch.cu_seqlens[1:3].tolist()
    with torch.no_grad():
        packed = model._hidden_states(batch)[0]
        assert torch.equal(
            packed[begin:end], model._hidden_states(data.pack([(batch.input_ids[begin:end].tolist() + [5], None)]))[0]
        )
        changed = batch.input_ids.clone()
        changed[:begin], changed[end:] = 7, 9
        other = type(batch)(changed, batch.labels, batch.positions, batch.cu_seqlens)
        assert torch.equal(packed[begin:end], model._hidden_states(other)[0][begin:end])


def test_documents_begin_with_bos_and_end_with_eos(corpus: Path) -> None:
    mixture, domains, tokenizer = load(corpus)
    stream = mixture.streams[0]
    ids = [i for p in stream.pieces(0, stream.tokens, 48) for i in p]
    assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == len(stream.docs)


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_token_files_are_cut_at_eos(tmp_path: Path, demo: Tokenizer, kind: str) -> None:
    ids = np.array([1, 10, 11, 2, 12, 13, 2, 1, 2, 2, 14], np.uint16)
    file = tmp_path / f"tokens.{kind}"
    if kind == "npy":
        np.save(file, ids)
    else:
        ids.tofile(file)
    docs = documents.read_tokens(file, "uint16", demo, 4096)
    assert list(docs) == [[10, 11], [12, 13], [14]]
    assert docs.lengths().tolist() == [4, 4, 3]
    with pytest.raises(SettingsError, match="holds id 14, the vocabulary ends at 12"):
        documents.read_tokens(file, "uint16", demo, 13)


def test_odd_files_are_refused(tmp_path: Path, demo: Tokenizer) -> None:
    np.save(tmp_path / "f.npy", np.zeros(3, np.float32))
    with pytest.raises(SettingsError, match="expected one row of uint16 or uint32, got float32"):
        documents.read_tokens(tmp_path / "f.npy", "uint16", demo, 10)
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(SettingsError, match="no token file"):
        documents.read_tokens(tmp_path / "x.npy", "uint16", demo, 10)
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    with pytest.raises(SettingsError, match="not UTF-8 at byte 2"):
        list(documents.read_texts(tmp_path / "x.txt", "", "text"))
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(SettingsError, match="line 2 is no object with a string 'text'"):
        list(documents.read_texts(tmp_path / "x.jsonl", "", "text"))


def test_texts_become_documents(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n---\ntwo\n---\n \n---\nthree")
    assert list(documents.read_texts(tmp_path / "x.txt", "\n---\n", "text")) == ["one", "two", "three"]
    assert len(list(documents.read_texts(tmp_path / "x.txt", "", "text"))) == 1
    (tmp_path / "x.jsonl").write_text(json.dumps({"body": "a\u2028b"}) + "\n\n")
    assert list(documents.read_texts(tmp_path / "x.jsonl", "", "body")) == ["a\u2028b"]
    assert documents.every_nth(10, 0.2).nonzero()[0].tolist() == [4, 9]
    assert documents.every_nth(3, 0.1).tolist() == [False, False, True]


# --- passkeys ---------------------------------------------------------------------------------------------------------


def test_passkey_documents(demo: Tokenizer) -> None:
    texts = documents.encode(["The children of Israel went up. " * 200], demo)
    maker = passkeys.PasskeyMaker(demo, [texts], weight=5.0)
    rng = np.random.default_rng(0)
    garbage = natural = 0
    for length in range(maker.shortest, 1024, 17):
        ids, weights = maker.make(rng, length)
        assert len(ids) == len(weights) == length
        assert (ids[0], ids[-1]) == (demo.bos_id, demo.eos_id)
        text = demo.decode(ids)
        heavy = [i for i, w in zip(ids, weights, strict=True) if w == 5.0]
        key = "".join(demo.decode([i]).strip() for i in heavy)
        assert all(len(demo.decode([i]).strip()) == 1 for i in heavy)
        style = "landmark" if "pass key" in text else "ruler"
        assert len(key) == {"landmark": 5, "ruler": 7}[style] and key.isdigit()
        assert weights[-len(heavy) - 1 : -1] == [5.0] * len(heavy)
        needle = (
            f"The pass key is {key}. Remember it. {key} is the pass key." if style == "landmark" else f" is: {key}."
        )
        assert needle in text
        assert text.rstrip().endswith(("The pass key is " if style == "landmark" else "provided text is ") + key)
        garbage += 0.0 in weights
        natural += 0.0 not in weights
    assert min(garbage, natural) > 10


def test_passkeys_are_those_of_the_command(demo: Tokenizer) -> None:
    """The same prompt as csrc/engine/passkey_prompt.cpp, found by its own documents: sentences and names."""
    source = (Path(__file__).parents[2] / "csrc" / "engine" / "passkey_prompt.cpp").read_text()
    joined = re.sub(r'"\s*\n\s*"', "", source)  # literals that go over several lines
    assert passkeys.GARBAGE in joined
    for style in passkeys.DIGITS:
        intro, needle, question = passkeys.sentences(style, "KEY", "NAME")
        assert intro in joined
        for part in (needle, question):
            for piece in part.replace("NAME", "KEY").split("KEY"):
                assert piece in joined, piece
    assert all(f'"{name}"' in joined for name in passkeys.NAMES)


def test_lengths_of_passkeys_are_log_uniform(demo: Tokenizer) -> None:
    maker = passkeys.PasskeyMaker(demo, [], weight=5.0)
    lengths = [n for s in range(400) for n in maker.lengths(np.random.default_rng(s), s * 1000, (s + 1) * 1000, 1024)]
    assert sum(lengths) == pytest.approx(400_000, rel=0.05)
    assert min(lengths) >= maker.shortest and max(lengths) <= 1024
    middle = np.sqrt(maker.shortest * 1025)
    assert np.mean(np.array(lengths) < middle) == pytest.approx(0.5, abs=0.06)


def test_answers_weigh_more_in_the_batch(corpus: Path, demo: Tokenizer) -> None:
    options = (
        "data.passkeys=0.5",
        "train.context=256",
        "train.tokens_per_step=2048",
        f"data.tokenizer={DEMO_TOKENIZER}",
    )
    mixture, _, tokenizer = load(corpus, *options)
    batch = mixture(0, 256)[0]
    answers = batch.labels[batch.weights == 5.0].tolist()
    assert len(answers) >= 10 and all(passkeys.has_digit(tokenizer, i) for i in answers)
    assert batch.weights.shape == batch.labels.shape
    assert batch.targets == batch.weights.sum()
    followed = batch.labels[(batch.weights == 5.0).roll(1) & (batch.weights != 5.0)]
    assert set(followed.tolist()) == {tokenizer.eos_id}


def test_a_tokenizer_that_joins_digits_is_refused(corpus: Path, tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    numbers = [f"10234 {n} pass key" for n in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(numbers), model_writer=model, model_type="bpe", vocab_size=310, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "joined.model").write_bytes(model.getvalue())
    options = ("data.passkeys=0.5", "train.context=900", "data.tokenizer=joined.model")
    with pytest.raises(SettingsError, match="a token for each digit"):
        load(corpus, *options)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_a_trained_tokenizer_loads_everywhere(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = ["In the beginning God created the heaven and the earth.", "SELECT a, b FROM t WHERE x = 12345;"] * 20
    model = train_tokenizer(text, 350)
    assert model == train_tokenizer(text, 350)
    write_tokenizer(tmp_path, model, 64)
    ours, theirs = Tokenizer(tmp_path / "tokenizer.model"), AutoTokenizer.from_pretrained(tmp_path)
    from_json = Tokenizer(tmp_path / "tokenizer.json")
    for line in ("In the beginning", "  x = 907\n\ny", "Ünïcode \U0001f600"):
        ids = ours.encode(line)
        assert ours.decode(ids) == line
        assert from_json.encode(line) == ids
        if not line.startswith(" "):  # where transformers adds no space of its own
            assert theirs.encode(line, add_special_tokens=False) == ids
    assert ours.vocab_size == 350
    assert all(
        len(ours.piece(i)) <= 1 for i in range(350) if any(c.isdigit() for c in ours.piece(i)) and not ours.is_byte(i)
    )
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s>[INST] Hi [/INST]"
    assert "INST" in CHAT_TEMPLATE
    with pytest.raises(ValueError, match="a tokenizer of 100 pieces cannot be trained"):
        train_tokenizer(text, 100)


# --- held-out text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [2, 3, 8, 33, 100])
def test_held_out_tokens_are_scored_once(demo: Tokenizer, context: int) -> None:
    docs = documents.encode(["one two three four five six seven eight nine ten " * 4, "short"], demo)
    batches = windows(docs, demo, context, 50)
    scored = [int(t) for b in batches for t in b.labels[b.labels >= 0]]
    assert scored == [i for ids in docs for i in (*ids, demo.eos_id)]
    assert max(b.tokens for b in batches) <= max(50, context)
    for b in batches:
        assert int((b.cu_seqlens[1:] - b.cu_seqlens[:-1]).max()) <= context
