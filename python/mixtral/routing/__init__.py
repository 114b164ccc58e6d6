"""What the router of a model does: the analysis behind ``mixtral route``, and its results for Python.

    trace = model.trace(texts, domains=names)
    metrics = mixtral.routing.analyse(trace)     # as metrics.json
    tables = mixtral.routing.load(folder)        # a folder of mixtral route, as pandas frames

Needs numpy, scipy, pandas and matplotlib: ``pip install 'mixtral[routing]'``. docs/routing.md describes every number.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analysis import analyse as analyse
    from .counts import analyse_counts as analyse_counts
    from .reader import load as load
    from .report import write_report as write_report

_MODULE_OF = {"analyse": "analysis", "analyse_counts": "counts", "load": "reader", "write_report": "report"}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'mixtral.routing' has no attribute {name!r}")
