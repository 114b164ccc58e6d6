"""A tokenizer.json gives the ids of the tokenizers library, on the real vocabularies that mistral-common ships.

MIXTRAL_TOKENIZER_TEXTS=10000 compares more texts of each kind than the 500 of a plain run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

import mixtral

DATA = Path(mistral_common.__file__).parent / "data"
VOCABULARIES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
TEXTS = int(os.environ.get("MIXTRAL_TOKENIZER_TEXTS", "500"))

# Spaces, control tokens spelt out, the added tokens below, code points of one to four bytes.
FRAGMENTS = [
    " ", "  ", "    ", "\n", "\t", "\0", "a", "the", " the", "Hello", "é", "日本", "𓀀", "👩‍👧", "\ufffd", "\u2028",
    "e\u0301", "\u3000", "\u00a0", "\r\n", "▁", "▁▁", "aaaa", "0", "12", "==", "_", "{", "[INST]", "[/INST]", "<s>",
    "</s>", "<unk>", "<0x41>", "[IMG]", "<|im_start|>", "<|im_end|>", "foo", "foobar", "<left>", "<right>", "<both>",
    "<norm>",
]  # fmt: skip
WORD_NEIGHBOURS = ["", " ", "a", "é", "日", "_", "7", "!", "-", "。", "👩", "\u3000", "\n", "word", "<word>", "Hello"]


@cache
def pieces(version: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DATA / VOCABULARIES[version]))


@cache
def vocabulary(version: str) -> dict[str, int]:
    return {pieces(version).id_to_piece(i): i for i in range(pieces(version).vocab_size())}


@cache
def merges(version: str, by_score: bool) -> list[tuple[str, str]]:
    """What transformers' converters make of a SentencePiece model: ordered by score, or (version 5) by id."""
    model, vocab = pieces(version), vocabulary(version)
    scores = [(text, model.get_score(i)) for text, i in vocab.items()] if by_score else None
    no_text = [t for t, i in vocab.items() if model.is_control(i) or model.is_unknown(i) or model.is_byte(i)]
    return generate_merges(vocab, scores, skip_tokens=no_text)


def converted(version: str, spaces: str = "first", by_score: bool = False) -> Tokenizer:
    model, vocab = pieces(version), vocabulary(version)
    bpe = BPE(vocab=vocab, merges=merges(version, by_score), fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "▁")
    if spaces == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif spaces == "replace":
        tokenizer.normalizer = replace
    else:
        scheme, split = spaces.removesuffix("-split"), spaces.endswith("-split")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)
    special = [text for text, i in vocab.items() if model.is_control(i) or model.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def extended(version: str, spaces: str = "first", by_score: bool = False) -> Tokenizer:
    """A fine-tune's: added tokens with every flag."""
    tokenizer = converted(version, spaces, by_score)
    tokenizer.add_tokens(
        [
            AddedToken("<norm>", normalized=True),
            AddedToken("foo", normalized=False),
            AddedToken("foobar", normalized=True),
            AddedToken("<both>", lstrip=True, rstrip=True, normalized=False),
        ]
    )
    flags = {"<|im_start|>": {}, "<|im_end|>": {}, "<left>": {"lstrip": True}, "<right>": {"rstrip": True}}
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, **flag) for text, flag in flags.items()])
    return tokenizer


def union(spaces: str = "first") -> Tokenizer:
    """A merged model's: the pieces of another vocabulary added one by one, some of them with spaces."""
    tokenizer = converted("v1", spaces)
    rng = random.Random(5)
    new = [text for text in vocabulary("v3") if text not in vocabulary("v1")]
    new += sorted({"".join(rng.choices("abcd ", k=rng.randrange(3, 7))) for _ in range(2000)})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in new[:1000]])
    tokenizer.add_tokens(new[1000:])
    return tokenizer


KINDS = {
    "v1": lambda: converted("v1"),
    "v1-normalizer": lambda: converted("v1", "normalizer"),
    "v1-by-score": lambda: converted("v1", "normalizer", by_score=True),
    "v1-always": lambda: converted("v1", "always"),
    "v1-never": lambda: converted("v1", "never"),
    "v1-replace": lambda: converted("v1", "replace"),
    "v1-split": lambda: converted("v1", "always-split"),
    "v3": lambda: converted("v3"),
    "v3-normalizer": lambda: converted("v3", "normalizer"),
    "extended": lambda: extended("v1"),
    "extended-normalizer": lambda: extended("v1", "normalizer"),
    "extended-replace": lambda: extended("v1", "replace"),
    "extended-v3": lambda: extended("v3", "always"),
    "union": lambda: union(),
    "union-normalizer": lambda: union("normalizer"),
}


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def char() -> str:
        code = rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x10FFFF)])
        return chr(code) if not 0xD800 <= code < 0xE000 else "x"

    def part() -> str:
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(FRAGMENTS)
        return char() if kind > 0.75 else pieces("v1").id_to_piece(rng.randrange(32000)).replace("▁", " ")

    return ["", *("".join(part() for _ in range(rng.randrange(14))) for _ in range(count - 1))]


def assert_same_ids(ours: mixtral.Tokenizer, oracle: Tokenizer, texts: list[str]) -> None:
    for parse_special in (False, True):
        oracle.encode_special_tokens = not parse_special  # the library's name for: special tokens stay text
        for text, encoding in zip(texts, oracle.encode_batch(texts, add_special_tokens=False), strict=True):
            assert ours.encode(text, parse_special=parse_special) == encoding.ids, (text, parse_special)


@pytest.fixture(params=KINDS)
def oracle(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def test_random_texts_have_the_ids_of_the_tokenizers_library(oracle: Tokenizer, tmp_path: Path) -> None:
    oracle.save(str(tmp_path / "tokenizer.json"))
    ours = mixtral.Tokenizer(tmp_path)
    assert ours.vocab_size == oracle.get_vocab_size(with_added_tokens=True)
    texts = random_texts(TEXTS, seed=7)
    assert_same_ids(ours, oracle, texts)
    for text in texts:
        special = [i for i in ours.encode(text, parse_special=True) if ours.is_control(i) and i != 0]
        left = set(ours.special_in(text)) - {0}
        assert set(special) <= left, text
        assert not any(ours.is_control(i) for i in ours.encode(text)), text


def test_single_words_have_the_ids_of_the_tokenizers_library(tmp_path: Path) -> None:
    oracle = converted("v1")
    oracle.add_tokens([AddedToken(text, single_word=True, normalized=False) for text in ("word", "<word>")])
    oracle.save(str(tmp_path / "tokenizer.json"))
    rng = random.Random(8)
    texts = ["".join(rng.choices(WORD_NEIGHBOURS, k=rng.randrange(2, 8))) for _ in range(TEXTS)]
    assert_same_ids(mixtral.Tokenizer(tmp_path), oracle, texts)


@pytest.mark.parametrize("version", VOCABULARIES)
def test_what_transformers_saves_is_read(version: str, tmp_path: Path) -> None:
    """``save_pretrained`` writes no tokenizer.model; here a fine-tune's two tokens were added."""
    hf = LlamaTokenizer(vocab=vocabulary(version), merges=merges(version, False))
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    hf.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    ours = mixtral.Tokenizer(tmp_path)
    for text in (*random_texts(TEXTS, seed=9), "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"):
        assert ours.encode(text, parse_special=True) == hf.encode(text, add_special_tokens=False), text
    assert ours.piece(len(hf) - 1) == "<|im_end|>" and ours.note == ""


def test_the_same_vocabulary_in_both_files_gives_the_same_ids(tmp_path: Path) -> None:
    """Scores and ranks order merges alike, but where one piece has two splits, which words hardly show."""
    converted("v1", "normalizer", by_score=True).save(str(tmp_path / "tokenizer.json"))
    from_json = mixtral.Tokenizer(tmp_path)
    from_model = mixtral.Tokenizer(DATA / VOCABULARIES["v1"])
    for text in random_texts(TEXTS, seed=10):
        assert from_json.encode(text) == from_model.encode(text) == pieces("v1").encode(text), text


def test_tokenizer_model_goes_first_and_takes_the_added_tokens(tmp_path: Path) -> None:
    oracle = extended("v1", by_score=True)
    oracle.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(DATA / VOCABULARIES["v1"], tmp_path / "tokenizer.model")
    ours = mixtral.Tokenizer(tmp_path)
    assert ours.note == "" and ours.vocab_size == oracle.get_vocab_size()
    # The two differ in one thing: SentencePiece puts a space before a text that starts with one, too.
    assert_same_ids(ours, oracle, [text for text in random_texts(TEXTS, seed=11) if text[:1] not in (" ", "▁")])
    assert ours.encode(" a") == pieces("v1").encode(" a") != oracle.encode(" a", add_special_tokens=False).ids

    converted("v3").save(str(tmp_path / "tokenizer.json"))
    assert mixtral.Tokenizer(tmp_path).note == (
        "tokenizer.json has another vocabulary than tokenizer.model, which is used: the first other id is 3"
    )


def test_decoded_text_is_that_of_the_tokenizers_library(tmp_path: Path) -> None:
    hf = LlamaTokenizer(vocab=vocabulary("v1"), merges=merges("v1", False))
    hf.add_tokens(["<norm>", "foo"])
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    hf.save_pretrained(tmp_path)
    ours = mixtral.Tokenizer(tmp_path)
    rng = random.Random(12)
    for _ in range(TEXTS):
        ids = [rng.choice([rng.randrange(259, len(hf)), *range(len(hf) - 4, len(hf))]) for _ in range(6)]
        assert ours.decode(ids) == hf.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("kind", ["tekken", "byte-level", "Unigram", "WordPiece"])
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if kind == "tekken":
        shutil.copy(DATA / "tekken_240718.json", file)
    elif kind == "byte-level":
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.save(str(file))
    else:
        file.write_text(json.dumps({"model": {"type": kind, "vocab": [["<unk>", 0.0]]}}))
    with pytest.raises(mixtral.LoadError, match=f"{kind}.*not supported") as error:
        mixtral.Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_mebibyte_takes_little_time_and_memory(tmp_path: Path) -> None:
    converted("v1").save(str(tmp_path / "tokenizer.json"))
    code = """
import resource, sys, time, mixtral
tokenizer = mixtral.Tokenizer(sys.argv[1])
tokenizer.encode("a")
for text in ("a" * 2**20, " " * 2**20, "the quick brown fox " * 50_000):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text.strip()
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
