"""Mixtral: sparse mixture-of-experts operators for CPU and CUDA, and the model built on them.

    import mixtral
    model = mixtral.Mixtral.from_pretrained(folder)
    model.generate(["Once"], max_tokens=64)[0].text

Each name below is loaded when it is first used. ``mixtral.ops``, ``mixtral.reference`` and ``mixtral.integrations``
work without the model library and with torch 2.11 or later; the rest needs torch 2.11.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import integrations as integrations
    from . import long_context as long_context
    from . import ops as ops
    from . import reference as reference
    from . import routing as routing
    from . import train as train
    from .engine import Engine as Engine
    from .errors import LoadError as LoadError
    from .errors import QueueFull as QueueFull
    from .errors import RankError as RankError
    from .model import Config as Config
    from .model import Generation as Generation
    from .model import Mixtral as Mixtral
    from .model import Score as Score
    from .model import Timings as Timings
    from .model import TokenLogprob as TokenLogprob
    from .tokenizer import Tokenizer as Tokenizer
    from .trace import Trace as Trace

__version__ = "0.1.0"

_MODULE_OF = {
    "Engine": "engine",
    "LoadError": "errors",
    "QueueFull": "errors",
    "RankError": "errors",
    "Config": "model",
    "Generation": "model",
    "Mixtral": "model",
    "Score": "model",
    "Timings": "model",
    "TokenLogprob": "model",
    "Tokenizer": "model",
    "Trace": "model",
}
_SUBMODULES = ("integrations", "long_context", "ops", "reference", "routing", "train")

__all__ = [*_MODULE_OF, *_SUBMODULES]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'mixtral' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
