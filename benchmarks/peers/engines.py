"""The engines of the whole-model benchmark, each in a process of its own.

``Worker`` starts ``engines.py ENGINE MODEL DTYPE THREADS``, which loads the model and then obeys commands: one JSON
object a line on stdin, one answer a line on stdout. A worker that waits uses no processor, so engines can take turns.
"""

import ctypes
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCAB = 32000
CONTEXT = 2304  # the longest run: 2048 tokens of prompt


def prompts_of(batch: int, length: int) -> list[list[int]]:
    """The same random token ids for every engine."""
    numbers = random.Random(0)
    return [[numbers.randrange(3, VOCAB) for _ in range(length)] for _ in range(batch)]


class Ours:
    """This project, through its Python package. DTYPE: as ``from_pretrained`` takes it."""

    def __init__(self, threads: int) -> None:
        import torch

        import mixtral

        torch.set_num_threads(threads)
        self.from_pretrained = mixtral.Mixtral.from_pretrained

    def load(self, path: str, dtype: str) -> None:
        # A prompt in one pass, as the others, and read anew each time.
        self.model = self.from_pretrained(path, dtype=dtype, chunk_size=2048, prefix_cache=False)

    def prefill(self, tokens: int) -> float:
        self.model.generate(prompts_of(1, tokens), max_tokens=1)
        return self.model.timings.prefill_seconds

    def decode(self, batch: int, prompt: int, steps: int) -> float:
        self.model.generate(prompts_of(batch, prompt), max_tokens=steps + 1, ignore_eos=True)  # the prefill gives one
        return self.model.timings.decode_seconds


class Transformers:
    """Hugging Face transformers. DTYPE: a torch dtype's name."""

    def __init__(self, threads: int) -> None:
        import torch
        from transformers import DynamicCache, MixtralForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.cache, self.from_pretrained = torch, DynamicCache, MixtralForCausalLM.from_pretrained

    def load(self, path: str, dtype: str) -> None:
        self.model = self.from_pretrained(path, dtype=getattr(self.torch, dtype))

    def use_experts(self, implementation: str) -> None:
        self.model.set_experts_implementation(implementation)

    def _step(self, ids, cache):  # [B, S] -> [B, 1], the most probable next tokens
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def prefill(self, tokens: int) -> float:
        ids, cache = self.torch.tensor(prompts_of(1, tokens)), self.cache(config=self.model.config)
        start = time.perf_counter()
        self._step(ids, cache)
        return time.perf_counter() - start

    def decode(self, batch: int, prompt: int, steps: int) -> float:
        cache = self.cache(config=self.model.config)
        ids = self._step(self.torch.tensor(prompts_of(batch, prompt)), cache)
        start = time.perf_counter()
        for _ in range(steps):
            ids = self._step(ids, cache)
        return time.perf_counter() - start


class LlamaCpp:
    """llama.cpp through llama_cpp's low-level functions. MODEL: a GGUF file, which has a DTYPE of its own."""

    def __init__(self, threads: int) -> None:
        import llama_cpp
        import numpy

        self.api, self.as_array, self.threads = llama_cpp, numpy.ctypeslib.as_array, threads

    def load(self, path: str, dtype: str) -> None:
        self.model = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        params = self.api.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_threads = params.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, params)

    def _step(self, ids: list[int]) -> int:
        """The most probable token after ``ids``, which follow what the cache holds."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points at them
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp: llama_decode failed")
        return int(self.as_array(self.api.llama_get_logits_ith(self.context, -1), (VOCAB,)).argmax())

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def prefill(self, tokens: int) -> float:
        self._clear()
        start = time.perf_counter()
        self._step(prompts_of(1, tokens)[0])
        return time.perf_counter() - start

    def decode(self, batch: int, prompt: int, steps: int) -> float:
        if batch != 1:
            raise ValueError(f"LlamaCpp.decode: batch must be 1, got {batch}")
        self._clear()
        last = self._step(prompts_of(1, prompt)[0])
        start = time.perf_counter()
        for _ in range(steps):
            last = self._step([last])
        return time.perf_counter() - start


ENGINES = {"ours": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp}
PACKAGES = {"ours": ["mixtral"], "transformers": ["transformers"], "llama.cpp": ["llama_cpp", "gguf"]}


def missing_packages(engine: str) -> list[str]:
    """What has to be installed before ``engine`` can run."""
    return [package for package in PACKAGES[engine] if importlib.util.find_spec(package) is None]


def peak_memory() -> int:
    """Bytes that this process has held at most (VmHWM): files mapped into it count when they were read."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Worker:
    """An engine in a process of its own, loaded when the constructor returns.

    ``environment``: variables that its process gets besides this one's.

    Attributes:
        load_seconds: until the model was ready, without the imports.
    """

    def __init__(
        self, engine: str, path: Path, dtype: str, threads: int, environment: dict[str, str] | None = None
    ) -> None:
        self.engine = engine
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, engine, str(path), dtype, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),  # the packages that this process sees
                "OMP_NUM_THREADS": str(threads),
                "HF_HUB_OFFLINE": "1",
                **(environment or {}),
            },
        )
        self.load_seconds: float = self._answer()

    def ask(self, command: str, **arguments: int | str) -> float | None:
        """Run the engine's method ``command``; returns what it returns."""
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> float | None:
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self.engine}: the worker died, {self._errors.read()[-2000:]}")
        return json.loads(line)


def serve(engine: str, path: str, dtype: str, threads: str) -> None:
    """The worker's side: load, then answer until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer

    def answer(value: float | None) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    model = ENGINES[engine](int(threads))
    start = time.perf_counter()
    model.load(path, dtype)
    answer(time.perf_counter() - start)
    for line in sys.stdin:
        arguments = json.loads(line)
        command = arguments.pop("command")
        answer(peak_memory() if command == "peak_memory" else getattr(model, command)(**arguments))


if __name__ == "__main__":
    serve(*sys.argv[1:])
