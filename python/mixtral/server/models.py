"""/v1/models and /version."""

import time

import torch
from fastapi import APIRouter, Request

from .. import __version__
from .served import Served, served

router = APIRouter()
_started = int(time.time())


@router.get("/v1/models")
async def models(request: Request) -> dict[str, object]:
    return {"object": "list", "data": [_describe(served(request))]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, object]:
    served(request).check_name(name)
    return _describe(served(request))


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__, "torch": torch.__version__}


def _describe(server: Served) -> dict[str, object]:
    config = server.model.config
    return {
        "id": server.settings.served_model_name,
        "object": "model",
        "created": _started,
        "owned_by": "mixtral",
        "max_model_len": server.context,
        "dtype": server.model.weight_type,
        "num_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.top_k,
        "chat_format": server.chat_format,
        "tool_format": server.tool_format,
    }
