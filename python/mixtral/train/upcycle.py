"""``mixtral upcycle``: a mixture of experts from a dense model (sparse upcycling, Komatsuzaki et al., 2212.05055).

Every expert is a copy of the dense feed-forward block and the router is drawn at random. Mixtral takes the k largest
router logits first and their softmax then, so the weights of a token add up to one and y = Σ_k w_k·f(x) = f(x): the new
model computes what the dense one does (He et al., 2410.07524, section 2.3). Training makes the experts differ.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import _C
from ..command_line import OK, Parser, run_command
from .dense import DenseFolder, Origin, dense_shapes
from .output import check_space, check_unused, drop_run_files, new_folder, write_safetensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EPILOG = """\
Reads Hugging Face and Mistral's folders tensor by tensor and writes a Hugging Face folder (transformers 5), in files of
the size of the input's. OUT/upcycle.json says of every tensor where it comes from. In float32 the new model computes
what the dense one does, until --noise or --scale change it.

Examples:
  mixtral upcycle ./Mistral-7B-v0.1 ./upcycled
  mixtral upcycle ./Mistral-7B-v0.1 ./upcycled --experts 16 --top-k 4 --noise 0.1
  mixtral upcycle ./Mistral-7B-v0.1 ./switch --top-k 1 --scale nvidia"""


@dataclass(frozen=True)
class UpcycleSettings:
    """How a dense model grows.

    Attributes:
        experts, top_k: of the new model; 1 <= top_k <= experts.
        router_std: of the router's normal distribution, cut at two sigma (Switch Transformer, section 2.4).
        scale: None, or "nvidia": softmax over all experts before the top-k, whose weights are then near 1/E, and all
            expert matrices times (E/K)^(1/3), so that the output keeps its size (He et al., granularity 1).
        noise: sigma of the normal noise on the experts' weights, as a share of the standard deviation of each matrix.
        noise_share: the share of the weights that get noise.
        seed: of the router and the noise.
        dtype: "auto", the checkpoint's, or "float32", "bfloat16", "float16".
    """

    experts: int = 8
    top_k: int = 2
    router_std: float = 0.02
    scale: str | None = None
    noise: float = 0.0
    noise_share: float = 0.5
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        def check(valid: bool, name: str, expected: str) -> None:
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

        check(2 <= self.experts <= 65536, "experts", "in [2, 65536]")
        check(1 <= self.top_k <= self.experts, "top_k", f"in [1, {self.experts}], the number of experts")
        check(0 < self.router_std < 10, "router_std", "in (0, 10)")
        check(self.scale in (None, "nvidia"), "scale", "nvidia")
        check(0 <= self.noise < 10, "noise", "in [0, 10)")
        check(0 < self.noise_share <= 1, "noise_share", "in (0, 1]")
        check(self.dtype in ("auto", *DTYPES), "dtype", "auto, float32, bfloat16 or float16")
        if self.top_k == 1 and not self.scale:
            raise ValueError(
                "top_k 1: the one weight of a token is always 1 after Mixtral's softmax: the router gets no gradient; "
                "take --top-k 2, or --scale nvidia, which takes the softmax over all experts"
            )

    @property
    def factor(self) -> float:
        """Of every expert matrix."""
        return (self.experts / self.top_k) ** (1 / 3) if self.scale else 1.0

    @property
    def identity(self) -> bool:
        """Whether the new model computes what the dense one does."""
        return not self.scale and self.noise == 0


def upcycle(dense: str | Path, out: str | Path, settings: UpcycleSettings = UpcycleSettings()) -> dict:
    """Writes the mixture of experts of ``dense`` into the folder ``out``, which appears complete or not at all.

    Returns:
        The receipt, as in OUT/upcycle.json: ``settings``, ``identity``, ``source``, ``files`` that were copied, and
        ``tensors``: name -> {"file", "shape", "dtype", "operation", "sources": [{"tensor", "file", "sha256"}]}.

    Raises:
        LoadError: the dense model cannot be read.
        ValueError: a setting out of range, ``out`` is in use, or the model has experts already.
        RuntimeError: the disk is too small.
    """
    out = Path(out)
    check_unused(out)
    source = DenseFolder(dense)
    dtype = DTYPES[source.config.dtype if settings.dtype == "auto" else settings.dtype]
    growth = _Growth(source, settings, dtype)
    files = _split(growth.shapes, source, dtype)
    total = sum(torch.Size(shape).numel() for shape in growth.shapes.values()) * dtype.itemsize
    check_space(out, total + (64 << 20))
    with new_folder(out) as folder, tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
        _C.carry_files(source.folder, folder)
        drop_run_files(folder)
        carried = sorted(file.name for file in folder.iterdir())
        (folder / "config.json").write_text(_grown_config(source, settings).config_json())
        for file, names in files.items():
            tensors = [(name, growth.shapes[name]) for name in names]
            write_safetensors(folder / file, tensors, dtype, growth.parts, bar.update)
        if len(files) > 1:
            index = {name: file for file, names in files.items() for name in names}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
            (folder / "model.safetensors.index.json").write_text(text + "\n")
        receipt = {
            "source": str(source.folder),
            "settings": asdict(settings),
            "identity": settings.identity,
            "files": carried,
            "tensors": {
                name: {"file": file, **growth.receipt(name)} for file, names in files.items() for name in names
            },
        }
        (folder / "upcycle.json").write_text(json.dumps(receipt, indent=1) + "\n")
    return receipt


class _Growth:
    """The tensors of the new model, made one piece at a time, and what was done for each."""

    def __init__(self, source: DenseFolder, settings: UpcycleSettings, dtype: torch.dtype) -> None:
        self._source, self._settings, self._dtype = source, settings, dtype
        self._origins: dict[str, list[Origin]] = {}
        self._operations: dict[str, str] = {}
        self.shapes = _grown_shapes(source, settings)

    def receipt(self, name: str) -> dict:
        return {
            "shape": list(self.shapes[name]),
            "dtype": str(self._dtype).removeprefix("torch."),
            "operation": self._operations[name],
            "sources": [asdict(origin) for origin in self._origins[name]],
        }

    def parts(self, name: str) -> Iterator[Tensor]:
        module, kind = name.rsplit(".", 1)
        if module.endswith(".mlp.gate"):
            return self._router(name)
        if kind == "gate_up_proj":
            return self._experts(name, "gate_proj", "up_proj")
        if kind == "down_proj":
            return self._experts(name, "down_proj")
        return self._copy(name)

    def _copy(self, name: str) -> Iterator[Tensor]:
        self._operations[name] = "copy"
        yield self._read(name, [name])[0].to(self._dtype)

    def _router(self, name: str) -> Iterator[Tensor]:
        std, seed = self._settings.router_std, self._settings.seed
        self._operations[name] = f"normal distribution of sigma {std:g}, cut at two sigma, seed {seed}"
        self._origins[name] = []
        router = torch.empty(self.shapes[name])
        torch.nn.init.trunc_normal_(router, 0, std, -2 * std, 2 * std, generator=self._generator(name))
        yield router.to(self._dtype)

    def _experts(self, name: str, *matrices: str) -> Iterator[Tensor]:
        """The dense matrices in turn, once for every expert; they are read once."""
        settings = self._settings
        operation = f"copy to each of {settings.experts} experts"
        if settings.scale:
            operation += f", times {settings.factor:.6g}"
        if settings.noise:
            operation += f", noise of {settings.noise:g} sigma on a share of {settings.noise_share:g}"
        self._operations[name] = operation
        mlp = name.partition(".experts.")[0]
        dense = self._read(name, [f"{mlp}.{matrix}.weight" for matrix in matrices])
        for expert in range(settings.experts):
            generator = self._generator(f"{name} {expert}")
            for matrix in dense:
                yield self._changed(matrix, generator)

    def _changed(self, matrix: Tensor, generator: torch.Generator) -> Tensor:
        settings = self._settings
        if settings.identity:
            return matrix.to(self._dtype)
        matrix = matrix.float() * settings.factor
        if settings.noise:
            noise = torch.randn(matrix.shape, generator=generator) * (settings.noise * matrix.std())
            matrix += noise * (torch.rand(matrix.shape, generator=generator) < settings.noise_share)
        return matrix.to(self._dtype)

    def _read(self, name: str, sources: Sequence[str]) -> list[Tensor]:
        read = [self._source.read(source) for source in sources]
        self._origins[name] = [origin for _, origin in read]
        return [tensor for tensor, _ in read]

    def _generator(self, what: str) -> torch.Generator:
        """The same numbers for the same seed, whatever is written before."""
        digest = hashlib.sha256(f"{self._settings.seed} {what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _grown_shapes(source: DenseFolder, settings: UpcycleSettings) -> dict[str, tuple[int, ...]]:
    """Of the tensors of the new model, under the names of transformers 5, layer by layer."""
    hidden, inner, experts = source.config.hidden_size, source.config.intermediate_size, settings.experts
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in dense_shapes(source.config).items():
        mlp = name.partition(".mlp.")[0] + ".mlp"
        if name.endswith("gate_proj.weight"):
            shapes[f"{mlp}.gate.weight"] = (experts, hidden)
            shapes[f"{mlp}.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        elif name.endswith("down_proj.weight"):
            shapes[f"{mlp}.experts.down_proj"] = (experts, hidden, inner)
        elif not name.endswith("up_proj.weight"):
            shapes[name] = shape
    return shapes


def _split(shapes: dict[str, tuple[int, ...]], source: DenseFolder, dtype: torch.dtype) -> dict[str, list[str]]:
    """File -> its tensors: one file, or files about as large as those of a sharded source."""
    sharded = len(source.files) > 1
    limit = max(file.path.stat().st_size for file in source.files) if sharded else None
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if limit and groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _grown_config(source: DenseFolder, settings: UpcycleSettings) -> _C.Config:
    config = copy.copy(source.config)
    config.num_experts, config.top_k = settings.experts, settings.top_k
    config.renormalize = not settings.scale
    if settings.dtype != "auto":
        config.dtype = settings.dtype
    return config


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    parser = Parser("upcycle", "Make a mixture of experts of a dense model.", EPILOG)
    add = parser.add_argument
    add("dense", metavar="DENSE", help="folder of a dense model, such as Mistral 7B")
    add("out", metavar="OUT", help="folder to write; it must not exist or be empty")
    add("--experts", metavar="N", type=int, default=8, help="of every layer (default: 8)")
    add("--top-k", metavar="N", type=int, default=2, help="experts of a token (default: 2)")
    add("--router-std", metavar="X", type=float, default=0.02, help="sigma of the router's weights (default: 0.02)")
    add("--scale", choices=("nvidia",), help="softmax before top-k, and experts times the cube root of N/K")
    add("--noise", metavar="X", type=float, default=0.0, help="sigma of noise on the experts, in sigmas of each matrix")
    add("--noise-share", metavar="X", type=float, default=0.5, help="share of the weights with noise (default: 0.5)")
    add("--seed", metavar="N", type=int, default=0, help="of the router and the noise (default: 0)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16; auto: the checkpoint's")
    flags = vars(parser.parse_args(arguments))
    dense, out = flags.pop("dense"), flags.pop("out")
    settings = UpcycleSettings(**flags)
    receipt = upcycle(dense, out, settings)
    print(f"{out}: {len(receipt['tensors'])} tensors, {settings.experts} experts, top-{settings.top_k}")
    if settings.identity:
        print("In float32 it computes what the dense model does; train it, and the experts will differ.")
    else:
        print("It does not compute what the dense model does: --scale or --noise change it.")
    if settings.scale:
        print("transformers takes the softmax after the top-k, whatever norm_topk_prob says: run and train it here.")
    return OK
