"""A tokenizer for a new model: SentencePiece BPE of the kind that Mistral's models have."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

from .checkpoint import replace_file

UNK, BOS, EOS = 0, 1, 2
_BYTES = 256

# The format of Mistral's first instruct models.
CHAT_TEMPLATE = (
    "{% set given = messages[0].role == 'system' %}{{ bos_token }}"
    "{% for message in (messages[1:] if given else messages) %}"
    "{% if message.role != ('user' if loop.index is odd else 'assistant') %}"
    "{{ raise_exception('user and assistant must speak in turn, after at most one system message') }}"
    "{% endif %}"
    "{% if message.role == 'user' %}"
    "{{ '[INST] ' + (messages[0].content + '\\n\\n' if given and loop.first else '') + message.content + ' [/INST]' }}"
    "{% else %}"
    "{{ ' ' + message.content + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Trains a tokenizer.model: BPE with byte fallback, digits as single tokens, no normalisation.

    Args:
        documents: the text; each line of it is a sentence.
        vocab_size: pieces, with <unk>, <s>, </s> and the 256 bytes.

    Raises:
        ValueError: SentencePiece cannot make so many pieces from this text.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in documents for line in text.splitlines() if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            max_sentence_length=16384,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().rpartition("] ")[2] or "no text"  # behind the place in its source
        raise ValueError(f"a tokenizer of {vocab_size} pieces cannot be trained from this text: {reason}") from None
    return model.getvalue()


def tokenizer_json(model: bytes) -> bytes:
    """The same tokenizer for the `tokenizers` library, which wants merges: every split of a piece into two pieces."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for piece in pieces[3 + _BYTES :]:  # after <unk>, <s>, </s> and the bytes, in the order of their scores
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += sorted((s for s in splits if s[0] in ids and s[1] in ids), key=lambda s: (ids[s[0]], ids[s[1]]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

    def template(*names: str) -> list[dict]:
        return [
            part
            for i, name in enumerate(names)
            for part in ({"SpecialToken": {"id": "<s>", "type_id": i}}, {"Sequence": {"id": name, "type_id": i}})
        ]

    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], **flags} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template("A"),
            "pair": template("A", "B"),
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def write_tokenizer(out: Path, model: bytes, max_length: int) -> None:
    """tokenizer.model, tokenizer.json and tokenizer_config.json of a tokenizer that was trained here."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    replace_file(out / "tokenizer.model", model)
    replace_file(out / "tokenizer.json", tokenizer_json(model))
    replace_file(out / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
