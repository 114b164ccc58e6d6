"""The model for Python: load a checkpoint, get logits, generate, stream. The work is done in C++ (csrc)."""

import atexit
import os
import warnings
import weakref
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ._torch_version import check_model
from .errors import LoadError

check_model()

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"mixtral: the model library cannot be loaded ({error}); build it with "
        "`scripts/setup.sh` or `pip install .` (mixtral.ops works without it)"
    ) from error

from .generating import Generating  # noqa: E402
from .prompts import Prompt, experts_or_default, token_ids  # noqa: E402
from .ranks import rank_options, threads_of_rank  # noqa: E402
from .tokenizer import Tokenizer  # noqa: E402
from .trace import Trace as Trace  # noqa: E402
from .tracing import Tracing  # noqa: E402

Config = _C.Config
Generation = _C.Generation
Score = _C.Score
Timings = _C.Timings
TokenLogprob = _C.TokenLogprob

# The thread of an engine may call back into Python, so it must end before the interpreter does. The other ranks of a
# model are told that it ends, rather than that its process is gone.
_engines: weakref.WeakSet[_C.Engine] = weakref.WeakSet()
_models: weakref.WeakSet[_C.Mixtral] = weakref.WeakSet()


def keep_until_exit(engine: _C.Engine) -> _C.Engine:
    """The same engine, which ends before the interpreter does."""
    _engines.add(engine)
    return engine


@atexit.register
def _stop_engines() -> None:
    for engine in list(_engines):
        engine.stop()
    for model in list(_models):
        model.stop()


class Mixtral(Generating, Tracing):
    """A Mixtral, Mistral or Switch-style model, ready to run.

    Attributes:
        config: its architecture.
        tokenizer: None when the folder has none that can be read; the model then works on token ids.
        context: most tokens of a prompt and what follows it.
        rank: of this process among those that hold the model; 0 where there are no others.
        timings: of the last finished ``generate``; None before.
        sampling_defaults: what generation_config.json says of sampling, as arguments of ``generate``.
    """

    def __init__(self, model: _C.Mixtral, tokenizer: Tokenizer | None = None, **options: int | bool) -> None:
        """Wraps a loaded model; users call ``from_pretrained`` or ``from_config``.

        Args:
            model, tokenizer: from the C++ library.
            chunk_size: prompt tokens of one sequence in one forward pass (default 512).
            mixed_chunk_size: the same of a pass in which others decode, and of all sequences twice as many; less keeps
                the tokens of those even, more reads prompts faster (default 0: as in other passes).
            token_budget: tokens of all sequences in one forward pass (default 2048).
            max_batch: sequences at a time; further prompts wait (default 64).
            page_size: tokens in one page of the key/value cache (default 16).
            ctx_size: longest prompt plus new tokens (default: what the model was made for).
            kv_memory: bytes of the key/value cache (default: room for ``max_batch`` sequences of ``ctx_size`` tokens,
                in at most half of the memory that the device has left).
            max_queue: requests at a time, those that run included; one more raises ``QueueFull`` (default: any number).
            max_queue_tokens: tokens of their prompts together, as max_queue (default: any number).
            prefix_cache: keep keys and values for prompts that begin with the same tokens (default true).
            cuda_graph: on CUDA, decode in CUDA graphs (default True).
            speculate: most tokens to guess, in each step, from earlier text that ends alike (prompt lookup); the
                default, 0: none. Results are the same bit for bit; text that repeats itself comes faster.

        Raises:
            TypeError: an unknown option.
            ValueError: an option out of range.
        """
        self._model = model
        self.rank: int = model.rank
        self._engine: _C.Engine | None = None
        if self.rank == 0:
            self._engine = keep_until_exit(_C.Engine(model, tokenizer, _C.EngineOptions(**options)))
            _models.add(model)
        self.config: Config = model.config
        self.tokenizer = tokenizer
        self.context: int = options.get("ctx_size") or self.config.max_position
        self.timings: Timings | None = None
        self._process: int | None = None  # that has used the model
        self.sampling_defaults: dict[str, float] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        *,
        pack: bool = True,
        lora: str | PathLike[str] | None = None,
        check_weights: bool = False,
        experts_per_token: int | None = None,
        weights: str = "read",
        mlock: bool = False,
        read_ahead: bool = True,
        gpu_memory: int = 0,
        routing_counts: str | PathLike[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        expert_parallel: bool = True,
        parallel_backend: str = "auto",
        rank_timeout: float = 30.0,
        **options: int | bool,
    ) -> "Mixtral":
        """Load a Hugging Face folder, a Mistral one, one that ``mixtral quantize`` wrote, or a GGUF file.

        Warns where the files disagree in a way that does not keep them from being used.

        With ``tensor_parallel_size`` times ``pipeline_parallel_size`` above 1, so many processes hold a part of the
        model each (docs/parallel.md). This one starts the others, which end with it. Under ``torchrun`` they are there
        already, each of them calls this, and all but rank 0 then call ``follow``.

        Args:
            path: the folder, a GGUF file, or the "org/name" of a folder in the local Hugging Face cache; nothing is
                downloaded.
            device: "cpu", "cuda" or "cuda:N".
            dtype: of the weights: "float32", "bfloat16", "float16"; quantised while they are read: "int8" or
                "fp8" (one scale a row) or "int4" (one for every 32 weights); "auto": as in the files.
            pack: on the CPU, keep matrices in the layout that the kernels read fastest (``ops.pack_weight``). False: as
                in Hugging Face, so that ``named_parameters`` gives [rows, columns]. Results are the same bit for bit.
            lora: folder of an adapter of PEFT or mistral-finetune, which is merged into the weights in float32.
            check_weights: raise LoadError for a weight that is NaN or infinite.
            experts_per_token: another number of experts than the checkpoint's (``config.top_k``).
            weights: on the CPU, "mmap" takes the weights from the files as they are used, for a model larger than
                memory. It needs a folder that ``mixtral quantize`` wrote, or one whose tensors are those of the model;
                nobody may cut its files short meanwhile. "direct" reads past the memory of the system, which then
                keeps no copy of the files; it warns where the file system cannot. Results are the same bit for bit.
            mlock: keep the weights that the CPU reads in memory: the system never swaps or drops them.
            read_ahead: with "mmap", ask for the pages of experts as soon as the router has chosen them.
            gpu_memory: bytes of a GPU for weights and activations, and not for the cache: experts beyond them stay in
                the memory of the CPU, which computes them or hands them over. 0: all weights are on the device.
            routing_counts: with ``gpu_memory``, a file of counts as ``mixtral route --counts`` takes it: the experts
                with the largest counts are on the GPU.
            progress: called with (bytes read, bytes in all).
            tensor_parallel_size: ranks that share each layer.
            pipeline_parallel_size: runs of layers, each with ranks of its own.
            expert_parallel: a rank has whole experts, and results the bits of one process. False: a part of each
                expert, which is balanced, but rounds otherwise.
            parallel_backend: "shm" (one host, CPU), "gloo" (TCP), "nccl" (GPUs), or "auto".
            rank_timeout: seconds that a rank may be silent while another one waits for it.
            options: those of the constructor.

        Raises:
            LoadError: a file is missing or wrong; it names the file, the tensor or field, and the reason. Of several
                ranks, on all of them; also when they load different things.
            MemoryError: the weights do not fit the device, or ``mlock`` is beyond what the system allows.
            RankError: a rank does not come, or ended.
            RuntimeError: there is no such CUDA device.
            ValueError: an unknown dtype, or one that does not fit the device, the sizes or a quantised checkpoint;
                ``lora`` with a quantised checkpoint; ``experts_per_token`` beyond the experts; ``weights="mmap"`` for
                files that hold the experts in another form than the model.
        """
        folder = _C.find_model(path)
        device = torch.device(device)
        layout = {
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "expert_parallel": expert_parallel,
            "parallel_backend": parallel_backend,
            "rank_timeout": rank_timeout,
        }
        what = {
            "device": str(device),
            "dtype": _dtype_name(dtype),
            "pack": pack,
            "lora": os.fspath(lora or ""),
            "check_weights": check_weights,
            "experts_per_token": experts_per_token,
            "weights": weights,
            "mlock": mlock,
            "read_ahead": read_ahead,
        }
        threads = threads_of_rank(layout)
        model = _C.Mixtral.from_pretrained(
            folder,
            device,
            what["dtype"],
            pack,
            what["lora"],
            check_weights,
            experts_or_default(experts_per_token),
            weights,
            mlock,
            read_ahead,
            gpu_memory,
            routing_counts or "",
            progress,
            rank_options(os.fspath(folder), what, layout),
        )
        if threads != torch.get_num_threads():  # join_ranks has divided them once more
            torch.set_num_threads(threads)
        result = cls(model, _tokenizer_in(folder), **options)
        result.sampling_defaults = _C.sampling_defaults(folder)
        return result

    @classmethod
    def from_config(
        cls,
        config: Config,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        *,
        seed: int = 0,
        **options: int | bool,
    ) -> "Mixtral":
        """A model with random weights, drawn on ``device`` from ``seed``: for tests and benchmarks.

        Args:
            dtype: as of ``from_pretrained``; "auto" is ``config.dtype``. Large quantised matrices repeat the same few
                million values.
        """
        return cls(_C.Mixtral.from_config(config, torch.device(device), _dtype_name(dtype), seed), **options)

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; bfloat16 where the weights are quantised."""
        return self._model.dtype

    @property
    def weight_type(self) -> str:
        """ "float32", "bfloat16", "float16", "int8", "fp8" or "int4"."""
        return self._model.weight_type

    @property
    def engine(self) -> _C.Engine:
        """The engine in C++, for servers (``mixtral.server``)."""
        return self._engine

    def follow(self) -> None:
        """On a rank other than 0: does what rank 0 wants of this one, and returns when rank 0 has ended the model.

        Raises:
            RuntimeError: this is rank 0.
            RankError: a rank ended, failed, or was silent for too long.
        """
        if self.rank == 0:
            raise RuntimeError("follow: rank 0 leads; the other ranks follow")
        self._model.follow()

    def named_parameters(self) -> dict[str, Tensor]:
        """The weights by name, not copies; csrc/model/parameters.h lists names and shapes."""
        return self._model.named_parameters()

    def expert_counts(self) -> dict[str, int] | None:
        """Of mapped weights, and of experts beyond ``gpu_memory``: choices of tokens whose expert was ("hits") or was
        not ("misses") in memory, or on the GPU, when it was chosen, and the "bytes" fetched. None for other models."""
        return self._model.expert_counts()

    def __call__(self, input_ids: Tensor) -> Tensor:
        """The logits after every token. Rows are sequences of their own, without padding; no gradient.

        Args:
            input_ids: int64 [B, S].

        Returns:
            float32 [B, S, vocab], on the model's device.

        Raises:
            ValueError: another dtype or rank, or an id outside the vocabulary.
        """
        self._check_process()
        return self._model.forward(input_ids)

    def perplexity(self, text: str, ctx_size: int = 0, chunk_size: int = _C.CHUNK_SIZE) -> Score:
        """How well the model predicts a text.

        Args:
            text: what to score. Longer than the context it is cut into segments of ``ctx_size`` tokens; each starts
                anew, behind a BOS token of its own, so every token is predicted once, and BOS never.
            ctx_size: tokens of a segment; 0: what the model was made for.
            chunk_size: tokens in one forward pass; it bounds the memory and does not change the result.

        Returns:
            ``perplexity`` and ``nats_per_token`` of the tokens, ``bits_per_byte`` of the text.

        Raises:
            ValueError: an empty text, a model without a tokenizer, or an option out of range.
            MemoryError: the key/value cache cannot hold a prompt and ``max_tokens``.
        """
        if self.tokenizer is None:
            raise ValueError("perplexity: model expected a tokenizer, got none")
        self._check_process()
        return _C.score(self._model, self.tokenizer, text, ctx_size, chunk_size)

    def _check_process(self) -> None:
        """The threads of the engine and of torch do not live on in a fork: it would wait for them for ever. A rank that
        follows has no engine."""
        if self.rank > 0:
            raise RuntimeError(f"mixtral: rank {self.rank} follows rank 0, which generates: call follow()")
        if self._process not in (None, os.getpid()):
            raise RuntimeError(
                "mixtral: this process was forked from one that had used the model; load the model here, or start "
                'processes with the method "spawn"'
            )
        self._process = os.getpid()

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return token_ids(prompt)
        if self.tokenizer is None:
            raise ValueError("generate: prompts expected token ids (the model has no tokenizer), got text")
        prompt.encode()  # a lone surrogate is no text: UnicodeEncodeError, a ValueError, says where it is
        return self.tokenizer.encode(prompt, add_bos=True)


def _dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    if not Tokenizer.in_folder(folder):
        return None
    try:
        tokenizer = Tokenizer(folder)
    except LoadError as error:
        if any(folder.glob("tokenizer.model*")):
            raise
        # tokenizer.json alone, of a kind that is not supported: the model still works on token ids.
        warnings.warn(f"mixtral: the model has no tokenizer: {error}", stacklevel=3)
        return None
    if tokenizer.note:
        warnings.warn(f"mixtral: {folder}: {tokenizer.note}", stacklevel=3)
    return tokenizer
