"""Dense checkpoints (Mistral 7B and its kin), read tensor by tensor under the names of Hugging Face."""

import hashlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import _C
from ..errors import LoadError

# Mistral's names -> those of Hugging Face.
_CONSOLIDATED = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


@dataclass(frozen=True)
class Origin:
    """Where a tensor was read: its name in the file, the file's name, and the SHA-256 of its bytes there."""

    tensor: str
    file: str
    sha256: str


class DenseFolder:
    """The weights of a dense model, opened and not read.

    Attributes:
        folder: where they are.
        config: the architecture.
        files: the paths of the files with weights.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: a folder of Hugging Face or Mistral's own, of safetensors or of PyTorch's files, whole or sharded; or
                the "org/name" of one in the local Hugging Face cache.

        Raises:
            LoadError: a file is missing or wrong, or a tensor of the architecture is missing or has another shape.
            ValueError: the model has experts already, or is quantised.
        """
        self.folder = Path(_C.find_model(path))
        self.config = _C.Config.from_folder(self.folder)
        if self.config.is_moe:
            raise ValueError(
                f"{self.folder}: has {self.config.num_experts} experts a layer already: give a dense model"
            )
        if self.config.quantization:
            raise ValueError(
                f"{self.folder}: is quantised to {self.config.quantization} and has lost its numbers; give the "
                "checkpoint that it was made from"
            )
        self._consolidated = False
        self.files = self._find_files()
        self._tensors = {}  # Hugging Face name -> (name in the file, its file)
        for file in self.files:
            for name in file.names():
                self._tensors[self._hugging_face_name(name)] = (name, file)
        self._check()

    def names(self) -> Iterator[str]:
        """Of all tensors, layer by layer."""
        return iter(dense_shapes(self.config))

    def read(self, name: str) -> tuple[Tensor, Origin]:
        """One tensor, in the file's dtype, rotary rows in the half-split order of Hugging Face."""
        stored, file = self._tensors[name]
        tensor = file.read(stored).contiguous()
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        if self._consolidated and name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = tensor.view(-1, self.config.head_dim // 2, 2, tensor.shape[1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor, Origin(stored, file.path.name, digest)

    def _find_files(self) -> list["_File"]:
        for stem, extension, consolidated in (
            ("model", ".safetensors", False),
            ("pytorch_model", ".bin", False),
            ("consolidated", ".safetensors", True),
            ("consolidated.00", ".pth", True),
        ):
            whole = self.folder / (stem + extension)
            index = self.folder / f"{stem}{extension}.index.json"
            if whole.exists() or index.exists():
                self._consolidated = consolidated
                paths = [whole] if whole.exists() else _shards(index)
                return [_File(path) for path in paths]
        raise _load_error(
            self.folder,
            "",
            "holds no weights in safetensors or PyTorch's files: write it as such a folder with `mixtral convert`",
        )

    def _hugging_face_name(self, name: str) -> str:
        if not self._consolidated:
            return name
        module = name.removesuffix(".weight")
        if not module.startswith("layers."):
            return _CONSOLIDATED.get(module, module) + ".weight"
        _, layer, rest = module.split(".", 2)
        return f"model.layers.{layer}.{_CONSOLIDATED.get(rest, rest)}.weight"

    def _check(self) -> None:
        for name, shape in dense_shapes(self.config).items():
            if name not in self._tensors:
                raise _load_error(self.folder, name, "is missing")
            stored, file = self._tensors[name]
            got, dtype = file.describe(stored)
            if got != shape:
                raise _load_error(file.path, stored, f"shape must be {list(shape)}, got {list(got)}")
            if dtype not in ("F32", "BF16", "F16"):
                raise _load_error(file.path, stored, f"dtype must be F32, BF16 or F16, got {dtype}")


def dense_shapes(config: _C.Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a dense model and their shapes, layer by layer, under the names of Hugging Face."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for n in range(config.num_layers):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


class _File:
    """One file of weights; its tensors are read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._safetensors = path.suffix == ".safetensors"
        try:
            if self._safetensors:
                self._open = safe_open(path, framework="pt")
            else:
                self._open = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise _load_error(path, "", "does not exist") from None
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise _load_error(path, "", f"cannot be read: {str(error).splitlines()[0]}") from None

    def names(self) -> list[str]:
        return list(self._open.keys())

    def read(self, name: str) -> Tensor:
        return self._open.get_tensor(name) if self._safetensors else self._open[name]

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, and dtype as safetensors spells it."""
        if self._safetensors:
            part = self._open.get_slice(name)
            return tuple(part.get_shape()), part.get_dtype()
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        tensor = self._open[name]
        return tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype))


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [index.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise _load_error(index, "weight_map", "cannot be read") from None


def _load_error(file: Path, item: str, reason: str) -> LoadError:
    return LoadError(": ".join(filter(None, (str(file), item, reason))), str(file), item, reason)
