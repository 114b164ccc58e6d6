"""Mixtral's operators as an experts and an attention implementation of Hugging Face transformers 5.

    mixtral.integrations.transformers.register()
    AutoModelForCausalLM.from_pretrained(path, experts_implementation="mixtral", attn_implementation="mixtral")

Experts: any SwiGLU experts with concatenated gate and up projections and no biases (Mixtral, Qwen-MoE, OLMoE, ...).
Attention: causal self-attention, with the sliding window of the layer or without one; grouped-query heads; padding on
the left or the right; packed sequences; the dynamic cache. What does not fit is an error, never a silent fallback.

Both have gradients: a model trains under ``Trainer``, with PEFT (experts too) and gradient checkpointing.
``correct_load_balance_loss`` repairs the loss that keeps the load of the experts even.

Letters as in ``mixtral.ops``; Sq and Sk are the padded lengths of queries and keys in a batch of B rows.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral

from .. import ops
from ..train.cross_entropy import IGNORED
from ..train.losses import load_balance_loss

PADDING = -1  # the segment of a key that is no token


def register() -> None:
    """Make ``"mixtral"`` a value of ``experts_implementation`` and of ``attn_implementation``; may be called again."""
    ALL_EXPERTS_FUNCTIONS.register("mixtral", experts_forward)
    AttentionInterface.register("mixtral", attention_forward)
    AttentionMaskInterface.register("mixtral", key_segments)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one layer: ``ops.moe_mlp`` on the module's own weights.

    Args:
        self: experts module with gate_up_proj [E, 2I, H] and down_proj [E, H, I].
        hidden_states: [T, H], float.
        top_k_index, top_k_weights: [T, K].

    Returns:
        [T, H], dtype of ``hidden_states``.

    Raises:
        ValueError: the module has other experts than concatenated SwiGLU ones without biases.
    """
    swiglu = self.has_gate and self.is_concatenated and isinstance(self.act_fn, (nn.SiLU, SiLUActivation))
    if not swiglu or self.has_bias or self.is_transposed:
        raise ValueError(
            "mixtral experts: module expected SwiGLU experts, [gate; up] weights in nn.Linear layout without biases, "
            f"got {type(self).__name__} with has_gate={self.has_gate}, is_concatenated={self.is_concatenated}, "
            f"has_bias={self.has_bias}, is_transposed={self.is_transposed}, act_fn={type(self.act_fn).__name__}"
        )
    return ops.moe_mlp(hidden_states, top_k_weights.float(), top_k_index, self.gate_up_proj, self.down_proj)


def key_segments(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: object = None,
    **kwargs: object,
) -> Tensor | None:
    """The mask that transformers makes once per forward pass and hands to ``attention_forward``.

    Returns:
        None when every row is one sequence without padding; else int64 [B, Sk]: which sequence each key belongs to,
        numbered over the whole batch in rising order, or ``PADDING``.

    Raises:
        ValueError: a cache of fixed size, a custom or chunked mask, or a padding mask with a hole.
    """
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError("mixtral attention: past_key_values expected a DynamicCache, got a cache of fixed size")
    if use_vmap or getattr(config, "attention_chunk_size", None):
        raise ValueError("mixtral attention: mask expected causal or sliding-window, got a custom or chunked one")
    rows = torch.arange(batch_size, device=device)[:, None]  # [B, 1]
    if attention_mask is not None:
        return padded_segments(attention_mask[:, kv_offset : kv_offset + kv_length], rows)
    if q_offset > 0:
        return None
    # Without padding and cache, rows may hold several packed sequences: one starts where a token does not see the
    # token before it.
    keys = torch.arange(kv_length, device=device)[None]  # [1, S]
    sees_previous = mask_function(rows, torch.zeros_like(rows), keys, (keys - 1).clamp(min=0)).expand(batch_size, -1)
    starts = ~sees_previous
    starts[:, 0] = True
    return None if starts.sum() == batch_size else starts.flatten().cumsum(0).view(batch_size, -1) - 1


def padded_segments(is_token: Tensor, rows: Tensor) -> Tensor | None:
    """From a padding mask, bool [B, Sk], to the segments of ``key_segments``: row b is sequence b. rows: [B, 1]."""
    if is_token.all():
        return None
    runs = (is_token.int().diff(prepend=is_token.new_zeros(len(is_token), 1).int()) == 1).sum(1)  # [B]
    if (runs > 1).any():
        raise ValueError(
            "mixtral attention: attention_mask expected one run of ones in each row, got "
            f"{int(runs.max())} runs (pad prompts on the left to generate)"
        )
    return torch.where(is_token, rows, PADDING)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of one layer: ``ops.sliding_window_attention`` over the tokens that are not padding.

    Args:
        query: [B, Nq, Sq, D], float.
        key, value: [B, Nkv, Sk, D]; the last query of a row stands at its last key.
        attention_mask: what ``key_segments`` gave.
        sliding_window: keys a query sees, itself included; None: all before it.

    Returns:
        ([B, Sq, Nq, D], None); zeros where the query is padding.

    Raises:
        ValueError: the layer asks for something this attention does not have.
    """
    check_plain(attention_mask, dropout, module.is_causal if is_causal is None else is_causal, kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, Sq | Sk, heads, D]
    batch, q_length, k_length = q.shape[0], q.shape[1], k.shape[1]
    options = {"window": sliding_window or 0, "scale": scaling}
    if attention_mask is None:
        each = torch.arange(batch + 1, dtype=torch.int32, device=q.device)  # [B+1]
        out = ops.sliding_window_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), each * q_length, each * k_length, **options
        )
        return out.view(q.shape), None

    k_segments, q_segments = attention_mask, attention_mask[:, -q_length:]  # [B, Sk], [B, Sq]
    is_key, is_query = k_segments != PADDING, q_segments != PADDING
    count = int(k_segments.max()) + 1
    cu_seqlens_q = cumulative_lengths(q_segments[is_query], count)
    cu_seqlens_k = cumulative_lengths(k_segments[is_key], count)
    out = ops.sliding_window_attention(q[is_query], k[is_key], v[is_key], cu_seqlens_q, cu_seqlens_k, **options)
    return torch.zeros_like(q).masked_scatter(is_query[:, :, None, None], out), None


def cumulative_lengths(segments: Tensor, count: int) -> Tensor:
    """From the sequence of each token, int64 [T], to int32 [count+1]: where each sequence begins, and T."""
    lengths = torch.bincount(segments, minlength=count)
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def check_plain(attention_mask: object, dropout: float, is_causal: bool, extras: dict[str, object]) -> None:
    """Raise ValueError unless a layer asks for plain causal softmax attention."""
    if attention_mask is not None and attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"mixtral attention: attention_mask expected 2 dimensions (padding), got shape {shape}")
    if dropout:
        raise ValueError(f"mixtral attention: dropout expected 0, got {dropout}")
    if not is_causal:
        raise ValueError("mixtral attention: is_causal expected True, got False")
    for name in ("softcap", "s_aux", "position_bias", "output_attentions"):
        if not (extras.get(name) is None or extras[name] is False):
            raise ValueError(f"mixtral attention: {name} expected none, got {type(extras[name]).__name__}")


def correct_load_balance_loss(convention: str = "mixtral") -> ExitStack:
    """Train Mixtral models of transformers with ``mixtral.train.load_balance_loss``, until the result is closed.

    As it is, transformers 5 leaves the loss out unless ``output_router_logits`` is set; pools all layers, so that
    layers with opposite loads hide each other; and adds it once for every microbatch of an accumulated step, while
    cross-entropy is divided by the labels of the whole step. From now on a model in training mode that is given labels
    has the loss whenever ``router_aux_loss_coef`` is not zero and ``output_router_logits`` is not given as False;
    each microbatch counts by its share of the step's labels.

        with correct_load_balance_loss():
            trainer.train()

    Args:
        convention: how it counts, a key of ``mixtral.train.CONVENTIONS``. The default is 1 for an even load, half of
            transformers' value for two experts per token.

    Returns:
        Its ``close()``, or leaving it as a context, puts transformers' own loss back.

    Raises:
        RuntimeError: it is in force already.
        ValueError: the convention is not known.
    """
    model_class, original = modeling_mixtral.MixtralForCausalLM, modeling_mixtral.MixtralForCausalLM.forward
    if hasattr(original, "load_balance_convention"):
        raise RuntimeError("correct_load_balance_loss: in force already; close the first one before")
    load_balance_loss([torch.zeros(1, 1)], 1, convention)  # raises for an unknown convention

    parameters = signature(original)

    def loss(gate_logits, num_experts=None, top_k=2, attention_mask=None):
        if not isinstance(gate_logits, tuple):
            return 0
        mask = None if attention_mask is None else attention_mask.flatten().bool()
        return load_balance_loss([logits.float() for logits in gate_logits], top_k, convention, mask)

    @wraps(original)
    def forward(self, *args, return_dict=None, num_items_in_batch=None, **kwargs):
        call = parameters.bind(self, *args, **kwargs)
        labels = call.arguments.get("labels")
        wanted = labels is not None and self.training and self.router_aux_loss_coef != 0
        if wanted and call.arguments.get("output_router_logits") is None:
            call.arguments["output_router_logits"] = True
        outputs = original(*call.args, **call.kwargs, num_items_in_batch=num_items_in_batch, return_dict=True)
        if num_items_in_batch is not None and labels is not None and outputs.aux_loss is not None:
            share = (call.kwargs.get("shift_labels", labels[:, 1:]) != IGNORED).sum() / num_items_in_batch
            outputs.loss = outputs.loss + (share - 1) * self.router_aux_loss_coef * outputs.aux_loss
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if as_dict else outputs.to_tuple()

    forward.load_balance_convention = convention
    undo = ExitStack()
    undo.callback(setattr, model_class, "forward", original)
    undo.callback(setattr, modeling_mixtral, "load_balancing_loss_func", modeling_mixtral.load_balancing_loss_func)
    model_class.forward, modeling_mixtral.load_balancing_loss_func = forward, loss
    return undo
