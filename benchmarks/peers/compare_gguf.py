"""Does a GGUF file mean the same here and in llama.cpp? needs llama_cpp and gguf.

``cd benchmarks && python -m peers.compare_gguf [--record]``

A small random Mixtral is written in F32 and quantised by llama.cpp. Two questions for each type, on the same prompts:

- Are our logits those of the weights in the file? llama.cpp computes with these weights made floats of, in F32.
- How far is llama.cpp from that on the file itself? It rounds activations to the type's partner (F16, Q8_0, Q8_K).
"""

import argparse
import ctypes
import math
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from llama_cpp import llama_cpp as api

import mixtral
from common import Bench, Row
from peers.gguf_models import write_gguf
from random_models import Shape, write_checkpoint

SHAPE = Shape(hidden=256, layers=3, heads=8, kv_heads=4, head_dim=32, intermediate=512, vocab=1024)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 50, 20, 16
FILE_TYPES = {
    "F32": api.LLAMA_FTYPE_ALL_F32,
    "F16": api.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": api.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": api.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": api.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K_M": api.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": api.LLAMA_FTYPE_MOSTLY_Q6_K,
}


class LlamaCpp:
    """A GGUF file in llama.cpp, with keys and values in F32."""

    def __init__(self, path: Path) -> None:
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = 512
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = Type.F32
        params.flash_attn_type = 0
        self.context = api.llama_init_from_model(self.model, params)

    def close(self) -> None:
        api.llama_free(self.context)
        api.llama_model_free(self.model)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Of the last token, behind what the cache holds."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if api.llama_decode(self.context, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp: llama_decode failed")
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, -1), (SHAPE.vocab,)).copy()

    def run(self, prompt: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """-> (logits behind the prompt, greedy tokens)."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        first = self.logits(prompt)
        tokens = [int(first.argmax())]
        while len(tokens) < NEW_TOKENS:
            tokens.append(int(self.logits(tokens[-1:]).argmax()))
        return first, tokens


def quantise(source: Path, path: Path, file_type: int) -> None:
    params = api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = file_type, True
    if api.llama_model_quantize(str(source).encode(), str(path).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantise {source}")


def write_as_floats(source: Path, path: Path) -> None:
    """The same weights in F32, made of the blocks of ``source`` by the gguf package."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(name: str, path: Path, folder: Path, prompts: list[list[int]]) -> list[Row]:
    write_as_floats(path, folder / "floats.gguf")
    ours = mixtral.Mixtral.from_pretrained(path, dtype="float32")
    mine = [
        (ours(torch.tensor([p]))[0, -1].numpy(), ours.generate(p, max_tokens=NEW_TOKENS, ignore_eos=True)[0].token_ids)
        for p in prompts
    ]
    size = max(np.abs(logits).max() for logits, _ in mine)
    rows = []
    for what, file in {"its weights in F32": folder / "floats.gguf", "the file": path}.items():
        peer = LlamaCpp(file)
        theirs = [peer.run(p) for p in prompts]
        peer.close()
        equal = sum(a[1] == b[1] for a, b in zip(mine, theirs, strict=True))
        error = max(np.abs(a[0] - b[0]).max() for a, b in zip(mine, theirs, strict=True)) / size
        case = f"{name}, llama.cpp on {what}"
        rows.append(Row(case, "prompts with equal greedy tokens", equal, "prompts", len(prompts), 2.0 * equal))
        digits = round(-math.log10(error), 1)
        rows.append(Row(case, "decimal digits of the logits that agree, at least", digits, "digits"))
        print(f"{case:44s} greedy tokens equal on {equal} of {len(prompts)}, logits differ by {error:.1e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-gguf.json")
    arguments = parser.parse_args()
    bench = Bench("gguf", "cpu")
    bench.versions |= {"gguf": version("gguf"), "llama_cpp": llama_cpp.__version__}
    random = np.random.default_rng(0)
    prompts = [[1, *map(int, random.integers(3, SHAPE.vocab, PROMPT_TOKENS))] for _ in range(PROMPTS)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(SHAPE, folder)
        source = write_gguf(SHAPE, folder, "BF16")
        for name, file_type in FILE_TYPES.items():
            quantise(source, folder / "file.gguf", file_type)
            bench.rows += compare(name, folder / "file.gguf", folder, prompts)
    bench.finish(arguments.record)


if __name__ == "__main__":
    main()
