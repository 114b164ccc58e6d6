"""``mixtral serve``: flags, sockets, and the one line that says where the server is."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..command_line import Parser, require_packages, run_command

PACKAGES = ("fastapi", "httptools", "prometheus_client", "uvicorn")

EPILOG = """\
Every flag may come from the environment instead: --max-batch from MIXTRAL_MAX_BATCH. docs/serving.md has the rest.

Examples:
  mixtral serve
  mixtral serve ./Mixtral-8x7B-Instruct-v0.1 --dtype int4 --kv-memory 8GiB --api-key "$KEY"
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "In the beginning", "max_tokens": 32}'"""


def _size(text: str) -> int:
    from .. import _C

    try:
        return _C.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text}") from None
        if value < least or (most is not None and value > most):
            rule = f">= {least}" if most is None else f"in [{least}, {most}]"
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return number


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text}") from None
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = Parser("serve", "Serve a model over HTTP, as OpenAI's clients expect it.", EPILOG)

    def add(*names: str, **options: object) -> None:
        """A flag whose default may come from the environment; argparse converts a default that is text."""
        variable = "MIXTRAL_" + names[-1].lstrip("-").replace("-", "_").upper()
        if (value := os.environ.get(variable)) is not None:
            if options.get("action") in ("store_true", argparse.BooleanOptionalAction):
                value = value.lower() not in ("", "0", "false")
            elif (choices := options.get("choices")) and value not in choices:
                parser.error(f"{variable} expected one of {', '.join(choices)}, got {value}")
            options["default"] = value
        parser.add_argument(*names, **options)

    model = "folder of the checkpoint, .gguf file, or org/name in the Hugging Face cache; without it, the demo model"
    parser.add_argument("path", metavar="MODEL", nargs="?", help=model)
    add("-m", "--model", metavar="MODEL", help="the same as a flag")
    _add_server_flags(add)
    _add_engine_flags(add)
    _add_model_flags(add)
    _add_parallel_flags(add)
    return parser


def _add_server_flags(add: Callable) -> None:
    add("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    add("--port", metavar="N", type=_at_least(0, 65535), default=8000, help="0: a free one (default: 8000)")
    add("--api-key", metavar="KEY", help="what clients must send; better in MIXTRAL_API_KEY, which ps does not show")
    add("--served-model-name", metavar="NAME", help="the model's name for clients (default: the folder's)")
    add("--chat-template", metavar="NAME|FILE", help="instead of the model's own, as of `mixtral chat`")
    add("--deadline", metavar="S", type=_seconds, default=600.0, help="for a whole answer, in seconds (default: 600)")
    add("--drain", metavar="S", type=_seconds, default=30.0, help="for open requests after SIGTERM (default: 30)")
    add("--watchdog", metavar="S", type=_seconds, default=120.0, help="for one forward pass (default: 120)")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: info)")
    add("--log-prompts", action="store_true", help="log what clients send, which is never logged otherwise")
    add("--trace", metavar="FILE", help="write which experts every token of all requests went to, when the server ends")
    add("--replay", metavar="FILE", help="send requests that begin as this trace does to the experts that it names")
    add("--queue", metavar="N", type=_at_least(1), default=256, help="requests at a time; more get 429 (default: 256)")
    tokens = "tokens of their prompts together; more get 429 (default: 1000000)"
    add("--queue-tokens", metavar="N", type=_at_least(1), default=1_000_000, help=tokens)


def _add_engine_flags(add: Callable) -> None:
    add("--max-batch", metavar="N", type=_at_least(1), default=64, help="sequences at a time (default: 64)")
    add("--kv-memory", metavar="SIZE", type=_size, default=0, help="of the key/value cache, such as 4GiB")
    add("--chunk-size", metavar="N", type=_at_least(1), default=512, help="prompt tokens of a sequence in a pass")
    mixed = "the same of a pass in which others decode (default: 256)"
    add("--mixed-chunk-size", metavar="N", type=_at_least(1), default=256, help=mixed)
    add("-c", "--ctx-size", metavar="N", type=_at_least(0), default=0, help="longest prompt plus answer (default: all)")
    add("--no-prefix-cache", action="store_true", help="compute every prompt whole, whoever sent its beginning before")
    add("--speculate", metavar="N", type=_at_least(0), default=0, help="guess up to N tokens a step from earlier text")


def _add_model_flags(add: Callable) -> None:
    types = ("auto", "float32", "bfloat16", "float16", "int8", "fp8", "int4")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    add("--dtype", choices=types, default="auto", help="of the weights (default: the checkpoint's)")
    add("-t", "--threads", metavar="N", type=_at_least(0), default=0, help="CPU threads; 0: one per core")
    add("--lora", metavar="FOLDER", help="adapter of PEFT or mistral-finetune to merge into the weights")
    add("--experts-per-token", metavar="K", type=_at_least(1), help="another number of experts than the checkpoint's")
    add("--check-weights", action="store_true", help="fail at a weight that is NaN or infinite")
    add("--weights", choices=("read", "direct", "mmap"), default="read", help="mmap: from the files, as they are used")
    add("--mlock", action="store_true", help="keep the weights in memory: never swapped or dropped")
    add("--gpu-memory", metavar="SIZE", type=_size, default=0, help="of the GPU for weights; others stay outside")
    add("--routing-counts", metavar="FILE", help="with --gpu-memory: counts that say which experts to keep there")
    add("--no-cuda-graph", action="store_true", help="on CUDA, launch the kernels of a step one by one")


def _add_parallel_flags(add: Callable) -> None:
    backends, number = ("auto", "shm", "gloo", "nccl"), {"metavar": "N", "type": _at_least(1), "default": 1}
    add("--tp", "--tensor-parallel-size", dest="tensor_parallel_size", **number, help="ranks that share each layer")
    add("--pp", "--pipeline-parallel-size", dest="pipeline_parallel_size", **number, help="runs of layers")
    add("--expert-parallel", action=argparse.BooleanOptionalAction, default=True, help="a rank has whole experts")
    add("--parallel-backend", choices=backends, default="auto", help="between ranks (default: auto)")
    add("--rank-timeout", metavar="S", type=_seconds, default=30.0, help="that a rank may be silent (default: 30)")


def main(argv: Sequence[str]) -> int:
    return run_command(lambda: _serve(argv))


def _serve(argv: Sequence[str]) -> int:
    flags = _parser().parse_args(argv)
    require_packages("serve", PACKAGES, "serve")
    import torch

    from . import logs
    from .app import create_app
    from .lifecycle import Lifecycle
    from .limits import Limits
    from .run import Server, listen

    logs.configure(flags.log_level)
    ranks = flags.tensor_parallel_size * flags.pipeline_parallel_size
    if ranks > 1 and not flags.threads and "OMP_NUM_THREADS" not in os.environ:
        flags.threads = max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if flags.threads:
        torch.set_num_threads(flags.threads)  # on the thread that submits requests: the engine does as it does
        os.environ["OMP_NUM_THREADS"] = str(flags.threads)  # of the other ranks
    if int(os.environ.get("RANK", "0")) > 0 and ranks > 1:
        _load(flags)[0].follow()  # under torchrun rank 0 serves
        return 0
    lifecycle = Lifecycle(Limits(request_deadline=flags.deadline, drain=flags.drain, watchdog=flags.watchdog))

    def load() -> object:
        model, name = _load(flags)
        return create_app(model, _settings(flags, name), lifecycle)

    def say_ready(url: str) -> None:
        print(f"mixtral: ready at {url}", flush=True)

    with listen(flags.host, flags.port) as listener:  # before the weights are read: a port in use is soon found
        return Server(lifecycle, flags.api_key, flags.log_prompts).serve_on(listener, load, say_ready)


def _settings(flags: argparse.Namespace, name: str) -> object:
    from .settings import Settings

    return Settings(
        host=flags.host,
        port=flags.port,
        api_key=flags.api_key,
        served_model_name=flags.served_model_name or name,
        chat_template=flags.chat_template,
        trace=flags.trace,
        replay=flags.replay,
    )


def _load(flags: argparse.Namespace) -> tuple[object, str]:
    """The model, and the name of its folder."""
    from .. import _C
    from ..model import Mixtral

    folder = Path(_C.find_model(flags.path or flags.model or _demo_model()))
    model = Mixtral.from_pretrained(
        folder,
        flags.device,
        flags.dtype,
        lora=flags.lora,
        check_weights=flags.check_weights,
        experts_per_token=flags.experts_per_token,
        weights=flags.weights,
        mlock=flags.mlock,
        gpu_memory=flags.gpu_memory,
        routing_counts=flags.routing_counts,
        tensor_parallel_size=flags.tensor_parallel_size,
        pipeline_parallel_size=flags.pipeline_parallel_size,
        expert_parallel=flags.expert_parallel,
        parallel_backend=flags.parallel_backend,
        rank_timeout=flags.rank_timeout,
        max_batch=flags.max_batch,
        speculate=flags.speculate,
        chunk_size=flags.chunk_size,
        mixed_chunk_size=flags.mixed_chunk_size,
        ctx_size=flags.ctx_size,
        kv_memory=flags.kv_memory,
        max_queue=flags.queue,
        max_queue_tokens=flags.queue_tokens,
        prefix_cache=not flags.no_prefix_cache,
        cuda_graph=not flags.no_cuda_graph,
    )
    return model, folder.stem if folder.suffix == ".gguf" else folder.resolve().name


def _demo_model() -> Path:
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "models" / "demo", package.parent.parent / "models" / "demo"):
        if (folder / "config.json").exists():
            return folder
    raise ValueError("no MODEL given, and the demo model is not installed: name a model folder")
