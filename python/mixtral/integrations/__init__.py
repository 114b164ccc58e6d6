"""Mixtral's operators inside other libraries. Each submodule needs its library and is imported when it is asked for."""

from importlib import import_module

_SUBMODULES = ("lm_eval", "transformers")


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'mixtral.integrations' has no attribute {name!r}")
