"""``report.html``: one page with every figure, that needs neither network nor JavaScript."""

from html import escape
from typing import TYPE_CHECKING

from . import coloured
from .gallery import drawn

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer
    from ..trace import Trace

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--faint:#d9dde3;--page:#fff;--muted:#5a6372}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ec;--faint:#3a414d;--page:#14181f;--muted:#9aa3b2}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:78rem;padding:1rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin:0 0 .3rem}h3{font-size:1rem;margin:1rem 0 .2rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:2rem}
figure{margin:0;min-width:0}figure svg{display:block;width:100%;height:auto}
figcaption,.note{color:var(--muted);font-size:.9rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.15rem .6rem;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.6 ui-monospace,monospace;margin:0}
section{margin:2rem 0}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def report(metrics: dict, trace: "Trace | None" = None, tokenizer: "Tokenizer | None" = None) -> str:
    """The page.

    Args:
        metrics: as ``metrics.json``.
        trace, tokenizer: for the coloured text; None: without it.
    """
    figures = "".join(
        f"<figure><h2>{escape(title)}</h2>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for title, caption, svg in drawn(metrics)
    )
    layers = metrics["layers"]
    parts = [f'<section class="figures">{figures}</section>', _information_table(layers)]
    if "locality" in layers[0]:
        parts.insert(0, _locality_table(metrics))
    if trace is not None:
        parts.append(_coloured(trace, tokenizer, [layer["layer"] for layer in layers]))
    style = _STYLE + coloured.styles(metrics["experts"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Routing</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body><h1>Routing</h1>{_head(metrics)}{''.join(parts)}</body></html>\n"
    )


def write_report(metrics: dict, path: str, trace: "Trace | None" = None, tokenizer: "Tokenizer | None" = None) -> None:
    """Write ``report`` into a file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(report(metrics, trace, tokenizer))


def _head(metrics: dict) -> str:
    domains = ", ".join(f"{escape(name)} ({size:,} tokens)" for name, size in metrics["domains"].items())
    of = f"{metrics['top_k']} of {metrics['experts']}" if metrics["top_k"] else f"some of {metrics['experts']}"
    languages = f" Parallel texts: {escape(', '.join(metrics['languages']))}." if metrics["languages"] else ""
    source = escape(metrics.get("source") or f"model {metrics.get('model', '')}")
    return (
        f"<p>{source}: {len(metrics['layers'])} layers, {of} experts per token. Domains: {domains}.{languages}</p>"
        f'<p class="note">Bands and bars are {metrics["confidence"]:.0%} intervals.</p>'
    )


def _locality_table(metrics: dict) -> str:
    """Table 5 of the paper."""
    shown = coloured.shown_layers([layer["layer"] for layer in metrics["layers"]])
    layers = [layer for layer in metrics["layers"] if layer["layer"] in shown]
    names = [(name, layer) for name in ("first", "either") for layer in layers]
    head = "".join(f"<th>{name}, layer {layer['layer']}</th>" for name, layer in names)
    rows = "".join(
        f"<tr><td>{escape(domain)}</td>"
        + "".join(f"<td>{_percent(layer['locality'][domain], name)}</td>" for name, layer in names)
        + "</tr>"
        for domain in layers[0]["locality"]
    )
    note = (
        "Share of neighbouring tokens with the same first choice, or with an expert in common, in per cent; in"
        " brackets: independent tokens with the same loads. Table 5 of the paper."
    )
    return _table("Neighbours", note, f"<th>domain</th>{head}", rows)


def _information_table(layers: list[dict]) -> str:
    causes = list(layers[0]["information"])
    head = "".join(f"<th>{escape(cause.replace('_', ' '))}</th>" for cause in causes)
    rows = "".join(
        f"<tr><td>{layer['layer']}</td>"
        + "".join(f"<td>{_bits(layer['information'][cause])}</td>" for cause in causes)
        + "</tr>"
        for layer in layers
    )
    note = "Of one of a token's experts; domain first: of its first choice."
    return _table("Bits about the expert", note, f"<th>layer</th>{head}", rows)


def _table(title: str, note: str, head: str, rows: str) -> str:
    table = f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    return f'<section><h2>{title}</h2><p class="note">{note}</p>{table}</section>'


def _coloured(trace: "Trace", tokenizer: "Tokenizer | None", layers: list[int]) -> str:
    legend = " ".join(f'<span class="e{expert}">&nbsp;{expert}&nbsp;</span>' for expert in range(trace.num_experts))
    return (
        '<section><h2>Tokens by expert</h2><p class="note">Coloured by first choice, as Fig. 8 of the paper.'
        f" Experts: {legend}</p>{coloured.html(trace, tokenizer, layers)}</section>"
    )


def _percent(found: dict, name: str) -> str:
    value, null = found[name], found[f"null_{name}"]
    return "–" if value is None else f"{100 * value:.1f} ({100 * null:.1f})"


def _bits(found: dict) -> str:
    if found["value"] is None:
        return "–"
    return f"{found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})"
