"""``mixtral route``: trace texts, analyse the routing, write a trace, ``metrics.json`` and ``report.html``."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..command_line import OK, Parser, require_packages, run_command

PACKAGES = ("matplotlib", "numpy", "pandas", "scipy")

EPILOG = """\
Each file is UTF-8 text, cut into documents of --ctx-size tokens behind a BOS token of their own. Intervals are of 99 %,
by documents. docs/routing.md explains every number and the schema of metrics.json; mixtral.routing.load(DIR) reads it.

Examples:
  mixtral route --domain bible=bible.txt --domain sqlite=sqlite.txt --out routing
  mixtral route ./Mixtral-8x7B-v0.1 --domain code=code.py --parallel en=en.txt --parallel fr=fr.txt --tokens 200k
  mixtral route --domain text=held_out.txt --reference earlier/trace.safetensors --out later
  mixtral route --domain text=held_out.txt --ansi --layers 0,3
  mixtral route --counts expert_counts.json#mistral --out counts"""


def _count(text: str) -> int:
    """200000, 200k or 1m."""
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        value = int(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number such as 200k, got {text}") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {text}")
    return value


def _layers(text: str) -> list[int] | None:
    """all, or 0,7,15, or 0-3,31."""
    if text == "all":
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"expected all, or numbers such as 0,7,15 or 0-3, got {text}")
        numbers += range(int(first), int(last if dash else first) + 1)
    if not numbers or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"expected each layer once, got {text}")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "route", "Analyse what the router does: writes trace.safetensors, metrics.json and report.html.", EPILOG
    )
    model = "folder or .gguf file; without it, that of MIXTRAL_MODEL or the bundled demo model"
    parser.add_argument("path", metavar="MODEL", nargs="?", help=model)
    parser.add_argument("-m", "--model", metavar="MODEL", help="the same as a flag")
    add = parser.add_flag
    add("--domain", metavar="NAME=FILE", action="append", default=[], help="a text; may be given several times")
    add("--parallel", metavar="LANG=FILE", action="append", default=[], help="one language of a text, line by line")
    add("--counts", metavar="FILE[#KEY]", help="analyse bare counts of assignments instead; needs no model")
    add("--tokens", metavar="N", type=_count, default=0, help="of all texts together, in equal parts; 0: everything")
    add("--layers", metavar="LIST", type=_layers, help="analyse these alone: 0,7,15 or 0-3 (default: all)")
    add("--reference", metavar="TRACE", help="trace.safetensors of another checkpoint on the same texts: saturation")
    add("--knockout", metavar="N", type=_count, default=0, help="score N tokens without each expert: L·E + E passes")
    add("--ansi", action="store_true", help="print the texts coloured by expert; write files with --out alone")
    add("--out", metavar="DIR", help="folder to write; made if there is none (default: routing)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    add("--dtype", default="auto", help="type of the weights; auto: the checkpoint's")
    add("-t", "--threads", metavar="N", type=_count, default=0, help="CPU threads; 0: one per core")
    add("-c", "--ctx-size", metavar="N", type=_count, default=512, help="tokens of a document (default: 512)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status. Errors are one line on stderr."""
    return run_command(lambda: _run(_parser().parse_intermixed_args(arguments)))


def _run(flags: argparse.Namespace) -> int:
    require_packages("route", PACKAGES, "routing")
    if flags.counts:
        return _run_counts(flags)
    if not flags.domain and not flags.parallel:
        raise ValueError("route: give a text with --domain NAME=FILE (see mixtral route --help)")
    return _run_model(flags)


def _run_counts(flags: argparse.Namespace) -> int:
    others = ("path", "model", "domain", "parallel", "tokens", "reference", "knockout", "ansi")
    if given := [name for name in others if getattr(flags, name)]:
        name = "MODEL" if given[0] in ("path", "model") else f"--{given[0]}"
        raise ValueError(f"--counts: goes without {name}: counts are all that is analysed")
    file, _, key = flags.counts.rpartition("#") if "#" in flags.counts else (flags.counts, "", "")
    from .counts import analyse_counts

    metrics = analyse_counts(file, key, flags.layers)
    from .report import report

    out = _out(flags)
    _write(out / "metrics.json", json.dumps(metrics, indent=1))
    _write(out / "report.html", report(metrics))
    print(f"{out}: metrics.json, report.html")
    return OK


def _run_model(flags: argparse.Namespace) -> int:
    from . import collect

    if flags.path and flags.model:
        raise ValueError(f"unexpected argument {flags.path}: --model names the model")
    if flags.ctx_size < 2:
        raise ValueError(f"--ctx-size: must be >= 2, got {flags.ctx_size}")
    domains = collect.read_texts("--domain", flags.domain)
    languages = collect.read_texts("--parallel", flags.parallel)
    if len(languages) == 1:
        raise ValueError("--parallel: expected at least two languages, got one")

    import mixtral

    reference = mixtral.Trace.load(flags.reference) if flags.reference else None
    out = None if flags.ansi and not flags.out else _out(flags)
    model = _load_model(flags)
    from .analysis import analyse, plain
    from .tokens import LEAST_TOKENS, checked_layers

    checked_layers(flags.layers, model.config.num_layers)

    trace = collect.trace_texts(
        model,
        domains,
        languages,
        tokens=flags.tokens,
        document_tokens=min(flags.ctx_size, model.config.max_position),
        least=1 if out is None else LEAST_TOKENS,
        progress=_progress("tracing"),
    )
    if flags.ansi:
        from .coloured import ansi

        print(ansi(trace, model.tokenizer, flags.layers), end="")
    if out is None:
        return OK
    metrics = analyse(
        trace,
        layers=flags.layers,
        languages=[text.name for text in languages],
        reference=reference,
        progress=_progress("analysing"),
    )
    if flags.knockout:
        from .knockout import knockout

        analysed = [layer["layer"] for layer in metrics["layers"]]
        found = plain(knockout(model, trace, flags.knockout, analysed, _progress("masking experts")))
        for layer in metrics["layers"]:
            layer["knockout"] = found["layers"][str(layer["layer"])]
        metrics["experts_per_token"] = found["experts_per_token"]
    from .report import report

    html = report(metrics, trace, model.tokenizer)
    trace.save(out / "trace.safetensors")
    _write(out / "metrics.json", json.dumps(metrics, indent=1))
    _write(out / "report.html", html)
    print(f"{out}: {len(trace)} tokens in trace.safetensors, metrics.json, report.html")
    return OK


def _load_model(flags: argparse.Namespace) -> object:
    import torch

    import mixtral

    if flags.threads:
        torch.set_num_threads(flags.threads)
    path = flags.model or flags.path or os.environ.get("MIXTRAL_MODEL") or demo_model()
    return mixtral.Mixtral.from_pretrained(
        path, flags.device, flags.dtype, pack=not flags.knockout, progress=_progress("loading")
    )


def demo_model() -> Path:
    """The bundled model's folder: that of MIXTRAL_DEMO_MODEL, in the package, or in the source tree.

    Raises:
        ValueError: it is not there.
    """
    if named := os.environ.get("MIXTRAL_DEMO_MODEL"):
        return Path(named)
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "models" / "demo", package.parents[1] / "models" / "demo"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError("no MODEL given, and the demo model is not installed: name a model folder")


def _out(flags: argparse.Namespace) -> Path:
    """The folder, before long work: a place that cannot be written is an error at once."""
    out = Path(flags.out or "routing")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot make {out}: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out: cannot write into {out}")
    return out


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".incomplete")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _progress(what: str) -> Callable[[int, int], None]:
    """A line on a terminal that shows how far the work is. Elsewhere too, being called lets signals end the work."""
    terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if terminal:
            end = "\r\033[K" if done >= total else ""
            print(f"\r\033[K{what} {100 * done // max(total, 1)} %{end}", end="", file=sys.stderr, flush=True)

    return show
