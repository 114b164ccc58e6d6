"""What the routers do: the experts of a request's tokens, totals of all requests, and the page that shows both."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from ..model import Generation
from .bridge import Progress
from .served import served
from .token_texts import TokenTexts

router = APIRouter()
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE, headers={"Cache-Control": "no-cache", "X-Frame-Options": "DENY"})


@router.get("/v1/routing/stats")
async def stats(request: Request) -> dict[str, object]:
    """How evenly the tokens of all requests since the start went to the experts of each layer."""
    server = served(request)
    counts = server.model.engine.routing_counts()
    tokens, first, chosen = counts or (None, [], [])
    return {
        "model": server.settings.served_model_name,
        "num_experts": server.model.config.num_experts,
        "experts_per_token": server.model.config.top_k,
        "tokens": tokens,
        "layers": [layer_load(*layer) for layer in zip(first, chosen, strict=True)],
    }


def layer_load(first: list[int], chosen: list[int]) -> dict[str, object]:
    """Counts [E] of a layer's tokens by first choice, and by any choice; measures of the latter's balance as of
    docs/routing.md, None before the first token."""
    load: dict[str, object] = {"first": first, "chosen": chosen, "entropy": None, "jain": None, "max_violation": None}
    if total := sum(chosen):
        shares = [count / total for count in chosen]
        bits = -sum(share * math.log2(share) for share in shares if share)
        load["entropy"] = bits / math.log2(len(shares)) if len(shares) > 1 else 1.0
        load["jain"] = 1 / (len(shares) * sum(share * share for share in shares))
        load["max_violation"] = len(shares) * max(shares) - 1
    return load


class RoutedTokens:
    """The fields of ``return_routed_experts`` for one choice: a row for each token that the model read."""

    def __init__(self, prompt: Sequence[int], texts: TokenTexts | None) -> None:
        self._ids = list(prompt)
        self._prompt = len(prompt)
        self._texts = texts
        self._rows = 0  # that were taken
        self._experts: list[torch.Tensor] = []  # [rows, L, K] each, of those that were not
        self._weights: list[torch.Tensor] = []

    def add(self, new: Generation | Progress) -> None:
        self._ids += new.token_ids
        whole = new if isinstance(new, Generation) else new.outcome and new.outcome.result()
        if not whole:
            self._experts += new.routed_experts
            self._weights += new.routed_weights
        elif whole.routed_experts is not None:  # the rows of the last pass come with the end alone
            begin = self._rows + sum(map(len, self._experts))
            self._experts.append(whole.routed_experts[begin:])
            self._weights.append(whole.routed_weights[begin:])

    def take(self) -> dict[str, list]:
        """What was added since the last call. The last token that was generated has no row: nothing read it."""
        experts = [row for rows in self._experts for row in rows.tolist()]
        weights = [row for rows in self._weights for row in rows.tolist()]
        tokens = [self._token(place) for place in range(self._rows, self._rows + len(experts))]
        self._rows += len(experts)
        self._experts, self._weights = [], []
        return {"routed_experts": experts, "routed_weights": weights, "routed_tokens": tokens}

    def _token(self, place: int) -> dict[str, object]:
        token = self._ids[place]
        text = self._texts.bytes(token) if self._texts else []
        return {"id": token, "bytes": text, "prompt": place < self._prompt}


def routed_tokens(prompts: Sequence[Sequence[int]], texts: TokenTexts | None) -> list[RoutedTokens]:
    return [RoutedTokens(prompt, texts) for prompt in prompts]
