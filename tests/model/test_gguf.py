"""GGUF files: the same model as from the Hugging Face folder that they were made from, and the same tokenizer."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import TokenType

import mixtral
from checkpoints import random_model
from gguf_files import random_blocks, rows_of_float, set_weights, write_gguf

# Most files here have no tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:mixtral. the model has no tokenizer")
DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
# Multiples of 256 in every row: what K-quants need.
SIZES = dict(hidden_size=256, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=32)
IDS = torch.arange(1, 90).reshape(1, -1)
QUANTIZED = [Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def small_model(**overrides):
    torch.manual_seed(0)
    return random_model(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **overrides})


def load(path: Path, dtype: str = "auto", **options) -> mixtral.Mixtral:
    return mixtral.Mixtral.from_pretrained(path, dtype=dtype, **options)


def assert_same(ours: mixtral.Mixtral, theirs: mixtral.Mixtral) -> None:
    a, b = ours.named_parameters(), theirs.named_parameters()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert torch.equal(ours(IDS), theirs(IDS))


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "split"])
@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.BF16])
def test_floats_are_the_same_model(type, merged, tmp_path):
    dtype = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}[type]
    model = small_model().to(dtype)
    write_gguf(tmp_path / "m.gguf", model, lambda _, weight: rows_of_float(weight, type), merged)
    hf = save(model, tmp_path / "hf")
    assert_same(load(tmp_path / "m.gguf"), load(hf))
    assert mixtral.Config.from_folder(tmp_path / "m.gguf").dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_packing_and_quantising_begin_from_the_same_numbers(dtype, tmp_path):
    model = small_model().to(torch.bfloat16)
    write_gguf(tmp_path / "m.gguf", model, lambda _, weight: rows_of_float(weight, Type.BF16))
    assert_same(load(tmp_path / "m.gguf", dtype), load(save(model, tmp_path / "hf"), dtype))


@pytest.mark.parametrize("type", QUANTIZED)
def test_quantised_blocks_become_the_numbers_of_llama_cpp(type, tmp_path):
    """Every bit pattern of a block that the generator comes upon, against gguf's own dequantisation."""
    generator, model, tensors = np.random.default_rng(0), small_model(), {}

    def data_of(name: str, weight: torch.Tensor) -> tuple[np.ndarray, Type]:
        if weight.ndim == 1 or "ffn_gate_inp" in name:
            tensors[name] = weight
            return rows_of_float(weight, Type.F32)
        blocks = random_blocks(generator, tuple(weight.shape), type)
        tensors[name] = torch.from_numpy(gguf.dequantize(blocks, type))
        return blocks, type

    write_gguf(tmp_path / "m.gguf", model, data_of)
    set_weights(model, tensors)
    hf = save(model, tmp_path / "hf")
    assert_same(load(tmp_path / "m.gguf", "float32", pack=False), load(hf, "float32", pack=False))
    assert_same(load(tmp_path / "m.gguf", "int4"), load(hf, "int4"))
    assert mixtral.Config.from_folder(tmp_path / "m.gguf").dtype == "bfloat16"
    reference = model(IDS).logits.detach()
    torch.testing.assert_close(load(tmp_path / "m.gguf", "float32")(IDS), reference, rtol=1e-3, atol=1e-3)


def test_types_may_be_mixed_as_in_q4_k_m(tmp_path):
    """Quantised by gguf itself where it can; the tensor's type decides, not the file's."""
    model, tensors = small_model(), {}

    def data_of(name: str, weight: torch.Tensor) -> tuple[np.ndarray, Type]:
        type = Type.Q8_0 if "attn_" in name else Type.Q4_0 if "exps" in name else Type.F16
        data, type = rows_of_float(weight, Type.F32 if "ffn_gate_inp" in name else type)
        tensors[name] = torch.from_numpy(gguf.dequantize(data, type).reshape(weight.shape).astype(np.float32))
        return data, type

    write_gguf(tmp_path / "m.gguf", model, data_of)
    set_weights(model, tensors)
    assert_same(load(tmp_path / "m.gguf", "float32"), load(save(model, tmp_path / "hf"), "float32"))


def test_a_dense_model_with_a_tied_head_and_a_window(tmp_path):
    torch.manual_seed(0)
    model = random_model(dense=True, **SIZES, sliding_window=48, tie_word_embeddings=True)
    write_gguf(
        tmp_path / "m.gguf",
        model,
        lambda _, weight: rows_of_float(weight, Type.F32),
        edit=lambda writer: writer.add_sliding_window(48),
    )
    config = mixtral.Config.from_folder(tmp_path / "m.gguf")
    assert (config.window, config.window_source) == (48, "m.gguf: llama.attention.sliding_window")
    assert config.tie_word_embeddings
    assert torch.equal(load(tmp_path / "m.gguf")(IDS), load(save(model, tmp_path / "hf"))(IDS))


def test_config_is_that_of_the_folder(tmp_path):
    model = small_model(rms_norm_eps=2**-17)
    write_gguf(tmp_path / "m.gguf", model, lambda _, weight: rows_of_float(weight, Type.F32))
    ours = mixtral.Config.from_folder(tmp_path / "m.gguf")
    theirs = mixtral.Config.from_folder(save(model, tmp_path / "hf"))
    different = {"window_source", "layout"}
    for name in [name for name, member in vars(mixtral.Config).items() if isinstance(member, property)]:
        assert name in different or getattr(ours, name) == getattr(theirs, name), name
    assert ours.window_source == "m.gguf: no llama.attention.sliding_window"


def test_a_folder_with_one_gguf_file_is_that_model(tmp_path):
    model = small_model()
    write_gguf(tmp_path / "m.gguf", model, lambda _, weight: rows_of_float(weight, Type.F32))
    assert_same(load(tmp_path), load(tmp_path / "m.gguf"))
    shutil.copy(tmp_path / "m.gguf", tmp_path / "n.gguf")
    with pytest.raises(mixtral.LoadError, match="holds several .gguf files: name one of them"):
        load(tmp_path)
    save(model.to(torch.float16), tmp_path)  # safetensors win
    assert mixtral.Config.from_folder(tmp_path).dtype == "float16"


# ---- what is refused -------------------------------------------------------------------------------------------------


def assert_refused(path: Path, item: str, *words: str) -> None:
    with pytest.raises(mixtral.LoadError) as error:
        load(path)
    assert error.value.item == item, str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("edit", "item", "words"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "llama.rope.scaling.type", ["got yarn"]),
        (lambda w: w.add_float32("llama.rope.scale_linear", 4.0), "llama.rope.scale_linear", ["must be 1"]),
        (lambda w: w.add_uint16("split.count", 3), "split.count", ["one part of several", "--merge"]),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(16, np.float32)), "rope_freqs.weight", ["not supported"]),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(9, np.float32)), "blk.0.attn_q.bias", ["is not"]),
        (lambda w: w.add_tensor("blk.2.x.weight", np.ones(9, np.float32)), "blk.2.x.weight", ["is not part of"]),
    ],
    ids=["yarn", "linear", "split", "frequencies", "bias", "layer"],
)  # fmt: skip
def test_features_that_would_be_ignored_are_refused(edit, item, words, tmp_path):
    write_gguf(tmp_path / "m.gguf", small_model(), lambda _, weight: rows_of_float(weight, Type.F32), edit=edit)
    assert_refused(tmp_path / "m.gguf", item, *words)


def test_other_architectures_and_types_are_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, small_model(), lambda _, weight: rows_of_float(weight, Type.F32), architecture="qwen2moe")
    assert_refused(path, "general.architecture", "must be llama", "qwen2moe")

    def with_q5_0(name: str, weight: torch.Tensor) -> tuple[np.ndarray, Type]:
        return rows_of_float(weight, Type.Q5_0 if name == "blk.1.attn_v.weight" else Type.F32)

    write_gguf(path, small_model(), with_q5_0)
    assert_refused(path, "blk.1.attn_v.weight", "Q8_0, Q4_0, Q4_K, Q5_K or Q6_K, got Q5_0")
    write_gguf(path, small_model(head_dim=64), lambda _, weight: rows_of_float(weight, Type.F32))
    whole = path.read_bytes()
    path.write_bytes(
        whole.replace(b"llama.rope.dimension_count\x04\0\0\0\x40", b"llama.rope.dimension_count\x04\0\0\0\x20")
    )
    assert_refused(path, "llama.rope.dimension_count", "must be 64")
    path.write_bytes(whole[:-1])
    assert_refused(path, "blk.1.ffn_down_exps.weight", "must lie within the file")


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def add_tokenizer(writer: gguf.GGUFWriter, **changes) -> None:
    """As llama.cpp's converter: pieces of the SentencePiece file, then unused ones up to the rows of the embeddings."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(DEMO / "tokenizer.model"))
    tokens, scores, types = [], [], []
    for i in range(model.vocab_size()):
        tokens.append(model.id_to_piece(i).encode())
        scores.append(model.get_score(i))
        types.append(
            TokenType.UNKNOWN
            if model.is_unknown(i)
            else TokenType.CONTROL
            if model.is_control(i)
            else TokenType.BYTE
            if model.is_byte(i)
            else TokenType.NORMAL
        )
    for i in range(2):
        tokens.append(f"[PAD{i}]".encode())
        scores.append(-1000.0)
        types.append(TokenType.UNUSED)
    writer.add_tokenizer_model(changes.get("model", "llama"))
    writer.add_token_list(tokens)
    writer.add_token_scores(changes.get("scores", scores))
    writer.add_token_types(changes.get("types", types))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(changes.get("eos", 2))
    writer.add_chat_template("{{ bos_token }}USER: {{ messages[0].content }}{{ eos_token }}")


def write_with_tokenizer(path: Path, **changes) -> None:
    model = small_model(vocab_size=4098)
    write_gguf(
        path,
        model,
        lambda _, weight: rows_of_float(weight, Type.F16),
        edit=lambda writer: add_tokenizer(writer, **changes),
    )


def test_tokenizer_is_that_of_the_sentencepiece_file(tmp_path):
    path = tmp_path / "m.gguf"
    write_with_tokenizer(path)
    ours, theirs = mixtral.Tokenizer(path), mixtral.Tokenizer(DEMO / "tokenizer.model")
    assert mixtral.Tokenizer.in_folder(path) and mixtral.Tokenizer.in_folder(tmp_path)
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.bos_id, ours.eos_id, ours.version) == (theirs.bos_id, theirs.eos_id, theirs.version)
    for text in ("Once upon a time", "  two  spaces\n\n", "naïve 🦄 \u2581", "</s> [INST]", "", "\x00\xff"):
        for special in (False, True):
            ids = ours.encode(text, parse_special=special)
            assert ids == theirs.encode(text, parse_special=special), text
            assert ours.decode(ids) == theirs.decode(ids)
    for i in range(ours.vocab_size):
        assert ours.piece(i) == theirs.piece(i)
        assert ours.is_control(i) == theirs.is_control(i) and ours.is_byte(i) == theirs.is_byte(i)


def test_text_goes_in_and_comes_out(tmp_path):
    path = tmp_path / "m.gguf"
    write_with_tokenizer(path, eos=7)
    assert mixtral.Config.from_folder(path).eos_token_ids == [7]
    model = load(path)
    result = model.generate("Once upon", max_tokens=4, ignore_eos=True)[0]
    assert len(result.token_ids) == 4 and isinstance(result.text, str)


def test_a_chat_has_the_format_of_the_file(tmp_path):
    path = tmp_path / "m.gguf"
    write_with_tokenizer(path)
    messages = [{"role": "user", "content": "Hello there"}]
    for model in (path, tmp_path):
        tokenizer = mixtral.Tokenizer(model)
        ids = tokenizer.encode("<s>USER: Hello there</s>", parse_special=True)
        assert tokenizer.apply_chat(messages) == ids
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")  # what lies beside comes first
    assert mixtral.Tokenizer(tmp_path).apply_chat(messages) == tokenizer.encode("Hello there")


@pytest.mark.parametrize(
    ("changes", "item", "words"),
    [
        ({"model": "gpt2"}, "tokenizer.ggml.model", ["must be llama (SentencePiece)", "gpt2"]),
        ({"scores": [0.0]}, "tokenizer.ggml.scores", ["one value for each token"]),
        ({"types": [9] * 4098}, "tokenizer.ggml.token_type", ["must be 1 to 6, got 9"]),
        ({"types": [1] * 4098}, "", ["must have one unknown piece, got 0"]),
    ],
    ids=["gpt2", "scores", "type", "unknown"],
)
def test_other_tokenizers_are_refused(changes, item, words, tmp_path):
    write_with_tokenizer(tmp_path / "m.gguf", **changes)
    with pytest.raises(mixtral.LoadError) as error:
        mixtral.Tokenizer(tmp_path / "m.gguf")
    assert error.value.item == item
    for word in words:
        assert word in str(error.value)
