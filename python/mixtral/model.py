"""The model for Python: load a checkpoint, get logits, generate, stream. The work is done in C++ (csrc)."""

import atexit
import os
import queue
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from . import follower
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

from .prompts import Prompt, experts_or_default, prompt_list, token_ids  # noqa: E402
from .tokenizer import Tokenizer  # noqa: E402
from .trace import Trace as Trace  # noqa: E402
from .tracing import Tracing  # noqa: E402

Config = _C.Config
Generation = _C.Generation
Score = _C.Score
Timings = _C.Timings
TokenLogprob = _C.TokenLogprob

_DEFAULT_THREADS = torch.get_num_threads()

# The thread of an engine may call back into Python, so it must end before the interpreter does. The other ranks of a
# model are told that it ends, rather than that its process is gone.
_engines: weakref.WeakSet[_C.Engine] = weakref.WeakSet()
_models: weakref.WeakSet[_C.Mixtral] = weakref.WeakSet()


@atexit.register
def _stop_engines() -> None:
    for engine in list(_engines):
        engine.stop()
    for model in list(_models):
        model.stop()


class Mixtral(Tracing):
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
            self._engine = _C.Engine(model, tokenizer, _C.EngineOptions(**options))
            _engines.add(self._engine)
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
                nobody may cut its files short meanwhile. Results are the same bit for bit.
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
            MemoryError: the weights do not fit the device.
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
        }
        threads = _threads_of_rank(layout)
        model = _C.Mixtral.from_pretrained(
            folder,
            device,
            what["dtype"],
            pack,
            what["lora"],
            check_weights,
            experts_or_default(experts_per_token),
            weights,
            read_ahead,
            gpu_memory,
            routing_counts or "",
            progress,
            _rank_options(os.fspath(folder), what, layout),
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

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int = 0,
        ignore_eos: bool = False,
        on_text: Callable[[int, str], bool | None] | None = None,
        generation_config: bool = False,
        experts_per_token: int | None = None,
        return_routed_experts: bool = False,
        *,
        n: int = 1,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        prompt_logprobs: int = 0,
    ) -> list[Generation]:
        """Continue each prompt; the prompts run as one batch, and a result does not depend on its neighbours.

        Threads may call this at the same time: their prompts run as one batch too.

        Args:
            prompts: one prompt or several. Text gets a BOS token in front; token ids, integers of any type also as a
                NumPy array or tensor [N] or [B, N], are used as they are.
            max_tokens: new tokens of each prompt, at most.
            temperature: 0, the default, takes the most probable token.
            top_p: (0, 1]; sample from the fewest tokens with this probability together. Default 1.
            top_k: sample from the k most probable tokens; 0, the default: off.
            min_p: [0, 1]; drop tokens less probable than this share of the most probable one. Default 0.
            repetition_penalty: > 0; tokens already seen become less likely above 1, the default.
            seed: of the random numbers; None or -1: taken from the operating system.
            stop: generation ends before any of these texts.
            logprobs: 0: none; n: of each new token and of the n most likely at its place.
            ignore_eos: go on after the end-of-sequence token.
            on_text: called with (index of the result, text) as text becomes certain, on a thread of the engine. False
                cancels that result; the others go on, and so does one whose call returns nothing. It must not call
                ``generate``.
            generation_config: take the five sampling parameters that are not given here from the model's
                generation_config.json (``sampling_defaults``).
            experts_per_token: another number of experts than the model's.
            return_routed_experts: keep the experts of every token and layer, as ``routed_experts`` of the result: uint8
                [tokens, layers, experts per token]. The tokens are those that the model read: prompt and new ones,
                but for the newest.
            n: continue each prompt this many times, each with its own random numbers.
            presence_penalty, frequency_penalty: [-2, 2]; subtracted from the logit of a generated token, once and once
                for each time that it was generated (as in OpenAI's API).
            logit_bias: token id -> [-100, 100], added to its logit after the penalties.
            min_tokens: among so many new tokens is none that would end the generation, and ``stop`` does not end it.
            stop_token_ids: generation ends before any of these tokens too, even with ``ignore_eos``.
            prompt_logprobs: 0: none; n: of each token of the prompt and of the n most likely at its place.

        Returns:
            One result for each prompt, or ``n`` of the first prompt, then ``n`` of the next: ``text``, ``token_ids``,
            ``finish_reason``, ``logprobs``, ``prompt_logprobs`` (None for the first token), ``routed_experts``.

        Raises:
            ValueError: an empty or too long prompt, an id outside the vocabulary, a parameter out of range, or text
                for a model without a tokenizer.
            MemoryError: the key/value cache cannot hold a prompt and ``max_tokens``.
        """
        params = self._sampling_params(
            generation_config=generation_config,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            prompt_logprobs=prompt_logprobs,
        )
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        self._check_process()
        ids = [self._prompt_ids(prompt) for prompt in prompt_list(prompts)]
        k = experts_or_default(experts_per_token)
        generations, self.timings = self._engine.generate(ids, params, k, return_routed_experts, on_text, n)
        return generations

    def stream(self, prompt: Prompt, **options: object) -> Iterator[str]:
        """Continue one prompt, text by text as it becomes certain. Closing the iterator ends the work.

        Args:
            prompt: text or token ids.
            options: those of ``generate``, without ``on_text``, ``return_routed_experts`` and ``n``.

        Raises:
            ValueError, MemoryError: as ``generate``, when the first piece is asked for; ValueError for a model
                without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("stream: model expected a tokenizer, got none; use generate for token ids")
        self._check_process()
        return self._pieces(self._prompt_ids(prompt), **options)

    def save_prompt_cache(self, prompt: Prompt, path: str | PathLike[str]) -> None:
        """Write the keys and values of a prompt that ``generate`` has read into a file, as far as they are still in the
        cache: those of full pages. Another process goes on from it with ``load_prompt_cache``, to the same bits on the
        same kind of processor. New tokens may be part of ``prompt``.

        Raises:
            RuntimeError: the file cannot be written; it is then as it was.
        """
        self._check_process()
        self._engine.save_prompt_cache(self._prompt_ids(prompt), path)

    def load_prompt_cache(self, path: str | PathLike[str]) -> None:
        """Read a file of ``save_prompt_cache``: prompts that begin with its tokens compute only what comes after them.

        Raises:
            LoadError: the file is damaged, or of another model, type or device.
            MemoryError: the key/value cache has no room for it.
        """
        self._check_process()
        self._engine.load_prompt_cache(path)

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

    def _pieces(
        self,
        prompt_ids: list[int],
        experts_per_token: int | None = None,
        **options: object,
    ) -> Iterator[str]:
        events: queue.SimpleQueue[str | _C.Outcome] = queue.SimpleQueue()  # filled on the engine's thread

        def on_text(piece: str) -> bool:
            events.put(piece)
            return True

        k = experts_or_default(experts_per_token)
        params = self._sampling_params(**options)
        request = self._engine.submit(prompt_ids, params, k, on_text, events.put)
        event: str | _C.Outcome = ""
        try:
            while isinstance(event := events.get(), str):
                if event:
                    yield event
        finally:
            self._engine.cancel(request)
            while isinstance(event, str):
                event = events.get()
            self.timings = event.timings
        event.result()  # raises what ended the request

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

    def _sampling_params(
        self,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        generation_config: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        stop_token_ids: Sequence[int] = (),
        **fields: object,
    ) -> _C.SamplingParams:
        defaults = self.sampling_defaults if generation_config else {}
        given = {name: value for name, value in fields.items() if value is not None}
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        return _C.SamplingParams(
            stop=stops,
            seed=None if seed == -1 else seed,
            logit_bias=dict(logit_bias or {}),
            stop_token_ids=list(stop_token_ids),
            **{**defaults, **given},
        )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return token_ids(prompt)
        if self.tokenizer is None:
            raise ValueError("generate: prompts expected token ids (the model has no tokenizer), got text")
        prompt.encode()  # a lone surrogate is no text: UnicodeEncodeError, a ValueError, says where it is
        return self.tokenizer.encode(prompt, add_bos=True)


def _dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rank_options(path: str, what: dict[str, object], layout: dict[str, object]) -> _C.RankOptions:
    """The ranks of a ``layout``, each of which loads ``what``."""
    return _C.RankOptions(
        tensor_size=layout["tensor_parallel_size"],
        stages=layout["pipeline_parallel_size"],
        expert_parallel=layout["expert_parallel"],
        backend=layout["parallel_backend"],
        timeout=layout["rank_timeout"],
        device=what["device"],
        command=follower.command(_threads_of_rank(layout), path=path, **what, **layout),
    )


def _threads_of_rank(layout: dict[str, object]) -> int:
    """Ranks of one host share its cores, unless the number of threads was chosen."""
    ranks = layout["tensor_parallel_size"] * layout["pipeline_parallel_size"]
    if ranks == 1 or "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() != _DEFAULT_THREADS:
        return torch.get_num_threads()
    return max(1, _DEFAULT_THREADS // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


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
