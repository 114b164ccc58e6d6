"""``report.html``: one page that needs nothing else."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from mixtral.routing.analysis import analyse
from mixtral.routing.gallery import ENTRIES
from mixtral.routing.report import report
from planted import blocks, draw_pairs, trace_of

N, LAYERS = 1800, 3


@pytest.fixture(scope="module")
def metrics_and_trace() -> tuple[dict, object]:
    """A trace of which every group can be measured; knock-out is filled in by hand."""
    rng = np.random.default_rng(0)
    experts = np.stack([draw_pairs(rng, N, np.arange(1, 9)) for _ in range(LAYERS)], 1)
    names = ["<b>", "en", "fr"]
    logits, early = torch.randn(N, LAYERS, 8).half(), torch.from_numpy(experts[:, 1:].astype(np.uint8))
    trace = trace_of(experts, blocks(N, 3), domain_names=names, router_logits=logits, next_gate_ids=early)
    metrics = analyse(trace, languages=["en", "fr"], reference=trace)
    for layer in metrics["layers"]:
        layer["knockout"] = {name: [0.1] * 8 for name in ("delta", "half_width", "similarity")}
    metrics["experts_per_token"] = {"k": [1, 2], "nll": [3.0, 2.9]}
    return metrics, trace


@pytest.fixture(scope="module")
def page(metrics_and_trace: tuple[dict, object]) -> str:
    return report(*metrics_and_trace)


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]


def test_every_figure_is_there(page: str) -> None:
    assert page.count("<figure>") == len(ENTRIES) == page.count("<svg ")
    for entry in ENTRIES:
        assert f"<h2>{entry.title}</h2>" in page


def test_figures_are_svg_of_any_width(page: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ElementTree.fromstring(svg.replace("&nbsp;", " "))
        assert root.get("viewBox") and root.get("width") is None and root.get("height") is None
        assert root.findall(".//{*}path")


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    elements = Elements(page)
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in elements.tags}
    for _, attributes in elements.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert "@import" not in page and "default-src 'none'" in page
    assert not re.findall(r"url\((?!#)", page)


def test_ids_are_unique_and_references_lead_to_them(page: str) -> None:
    ids = Elements(page).ids
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)


def test_figures_take_the_colours_of_the_page(page: str) -> None:
    """What is drawn in black or white could not be seen in one of the two."""
    assert "prefers-color-scheme:dark" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--ink)" in drawn and "var(--faint)" in drawn
    assert not re.findall(r"(?:fill|stroke): ?(?:#000000|#ffffff|black|white)\b(?![^<]*opacity: ?0)", drawn)


def test_names_are_escaped(page: str) -> None:
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_tokens_are_coloured_by_their_first_choice(page: str, metrics_and_trace: tuple[dict, object]) -> None:
    trace = metrics_and_trace[1]
    spans = re.findall(r'<span class="e(\d)" title="token (\d+); expert (\d):', page)
    first = trace.topk_ids[:300, 0, 0].tolist()
    assert [int(e) for e, _, _ in spans[:300]] == first == [int(e) for _, _, e in spans[:300]]
    assert [int(t) for _, t, _ in spans[:300]] == trace.token_ids[:300].tolist()
    assert len(spans) == 3 * 3 * 300


def test_the_same_metrics_give_the_same_numbers(page: str, metrics_and_trace: tuple[dict, object]) -> None:
    layer = metrics_and_trace[0]["layers"][0]
    shown = layer["locality"]["<b>"]
    assert f"{100 * shown['first']:.1f} ({100 * shown['null_first']:.1f})" in page
    assert f"{layer['information']['token']['value']:.4f} (" in page
