"""Arguments of the model's methods, as the C++ side takes them."""

import operator
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

# Text, or token ids: any integers, also as an array or tensor [N].
Prompt = str | Sequence[int] | Tensor

_PROMPTS = "prompts expected text, token ids, or several of these, got "


def prompt_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or many -> many. A list whose first element is an integer is one prompt of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        hint = "; pass its input_ids" if isinstance(prompts, Mapping) else ""
        raise TypeError(f"generate: {_PROMPTS}{type(prompts).__name__}{hint}")
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
    one = len(prompts) > 0 and hasattr(prompts[0], "__index__") and getattr(prompts[0], "ndim", 0) == 0
    return [prompts] if one else prompts


def experts_or_default(experts_per_token: int | None) -> int:
    """As the C++ side has it: 0 is the checkpoint's."""
    if experts_per_token is not None and experts_per_token < 1:
        raise ValueError(f"experts_per_token must be >= 1, got {experts_per_token}")
    return experts_per_token or 0


def token_ids(prompt: Iterable[int]) -> list[int]:
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    try:
        return [operator.index(token_id) for token_id in ids]
    except TypeError:
        shown = repr(prompt)[:60]
        raise TypeError(f"generate: {_PROMPTS}{type(prompt).__name__} {shown}") from None
