"""A server in a thread of the test's own process, and the small model that it serves."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

import mixtral
from mixtral import _C
from mixtral.server.app import create_app
from mixtral.server.settings import Settings

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


def small_model(tokenizer: Path = DEMO, vocab_size: int = 4096, max_position: int = 1024, **options) -> mixtral.Mixtral:
    """Random weights, and the bundled model's tokenizer or another one."""
    config = mixtral.Config(
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=vocab_size,
        max_position=max_position,
        num_experts=4,
        top_k=2,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        window=32,
        dtype="float32",
    )
    model = _C.Mixtral.from_config(config, torch.device("cpu"), "float32", 0)
    return mixtral.Mixtral(model, mixtral.Tokenizer(tokenizer), **options)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The URL of a server of ``app``."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    failed: list[BaseException] = []

    def run() -> None:
        torch.set_num_threads(1)  # of passes for requests of this thread: two wait for each other on a busy machine
        try:
            asyncio.run(server.serve())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), failed
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"


@contextmanager
def served(model: mixtral.Mixtral, **settings) -> Iterator[str]:
    with running(create_app(model, Settings(**settings))) as url:
        yield url
