"""A checkpoint of ``random_models`` as llama.cpp reads it: bf16 by the ``gguf`` package, fewer bits by llama.cpp."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import llama_cpp
import torch
from safetensors import safe_open
from torch import Tensor

from random_models import MAX_POSITION, NORM_EPS, ROPE_THETA, Shape

FILE_TYPES = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}

Read = Callable[[str], Tensor]


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [heads * D, H] from the half-split rotary layout to llama.cpp's interleaved one."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _tensors(shape: Shape, read: Read) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """(GGUF name, sizes, how to make it), one tensor in memory at a time."""
    h, i, e = shape.hidden, shape.intermediate, shape.experts
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocab, h), lambda: read("model.embed_tokens.weight")
    for n in range(shape.layers):
        ours, theirs = f"model.layers.{n}", f"blk.{n}"
        attention, moe = f"{ours}.self_attn", f"{ours}.block_sparse_moe"

        def experts(name: str, moe: str = moe) -> Tensor:
            return torch.stack([read(f"{moe}.experts.{x}.{name}.weight") for x in range(e)])

        def rotary(name: str, attention: str = attention) -> Tensor:
            return _interleaved(read(f"{attention}.{name}_proj.weight"), shape.head_dim)

        # llama.cpp wants norms and the router in f32.
        yield f"{theirs}.attn_norm.weight", (h,), lambda o=ours: read(f"{o}.input_layernorm.weight").float()
        yield f"{theirs}.ffn_norm.weight", (h,), lambda o=ours: read(f"{o}.post_attention_layernorm.weight").float()
        yield f"{theirs}.attn_q.weight", (q, h), lambda r=rotary: r("q")
        yield f"{theirs}.attn_k.weight", (k, h), lambda r=rotary: r("k")
        yield f"{theirs}.attn_v.weight", (k, h), lambda a=attention: read(f"{a}.v_proj.weight")
        yield f"{theirs}.attn_output.weight", (h, q), lambda a=attention: read(f"{a}.o_proj.weight")
        yield f"{theirs}.ffn_gate_inp.weight", (e, h), lambda m=moe: read(f"{m}.gate.weight").float()
        yield f"{theirs}.ffn_gate_exps.weight", (e, i, h), lambda x=experts: x("w1")
        yield f"{theirs}.ffn_down_exps.weight", (e, h, i), lambda x=experts: x("w2")
        yield f"{theirs}.ffn_up_exps.weight", (e, i, h), lambda x=experts: x("w3")
    yield "output_norm.weight", (h,), lambda: read("model.norm.weight").float()
    yield "output.weight", (shape.vocab, h), lambda: read("lm_head.weight")


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(MAX_POSITION)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # The file must have a tokenizer, though only token ids are used: special tokens, bytes, and made-up words.
    special, byte, words = ["<unk>", "<s>", "</s>"], [f"<0x{b:02X}>" for b in range(256)], shape.vocab - 259
    types = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + byte + [f"word{n}" for n in range(words)])
    writer.add_token_scores([0.0] * shape.vocab)
    writer.add_token_types([types.UNKNOWN, *[types.CONTROL] * 2, *[types.BYTE] * 256, *[types.NORMAL] * words])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _write_bf16(shape: Shape, folder: Path, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")  # Mixtral is llama.cpp's "llama" with an expert count
    _add_metadata(writer, shape)
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    file_of = {name: file for file in files for name in file.keys()}
    tensors = list(_tensors(shape, lambda name: file_of[name].get_tensor(name)))
    for name, sizes, _ in tensors:
        in_f32 = re.search(r"norm|gate_inp", name)
        data = torch.empty(sizes, dtype=torch.float32 if in_f32 else torch.int16, device="meta")
        kind = gguf.GGMLQuantizationType.F32 if in_f32 else gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(name, sizes, None, data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, make in tensors:
        tensor = make()
        # numpy has no bf16: it gets the bits.
        writer.write_tensor_data((tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy())
    writer.close()


def _quantise(source: Path, path: Path, file_type: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params):
        raise RuntimeError(f"gguf_models: llama.cpp could not quantise {source}")


def write_gguf(shape: Shape, folder: Path, kind: str) -> Path:
    """Write the checkpoint in ``folder`` as ``<folder>-<kind>.gguf`` (BF16, Q8_0 or Q4_K_M); a file there is kept."""
    path = folder.with_name(f"{folder.name}-{kind}.gguf")
    if not path.exists():
        part = path.with_suffix(".part")
        if kind == "BF16":
            _write_bf16(shape, folder, part)
        else:
            _quantise(write_gguf(shape, folder, "BF16"), part, FILE_TYPES[kind])
        part.rename(path)
        print(f"  {folder.name}: {path.name}, {path.stat().st_size / 1e9:.2f} GB", flush=True)
    return path
