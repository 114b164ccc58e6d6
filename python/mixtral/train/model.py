"""Mixtral as a ``torch.nn.Module`` on ``mixtral.ops``, with the parameter names of Hugging Face transformers 5.

On the CPU its logits are, bit for bit, those of the C++ model, which is the one for inference. Letters as in
``mixtral.ops``.
"""

import copy
import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model import Config
from . import folders
from .batch import Batch, Losses, StepTotals
from .cross_entropy import IGNORED, linear_cross_entropy
from .layers import Decoder, Linear, Routing
from .losses import router_sums
from .objective import share_of_step
from .options import RouterOptions

VocabularyLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # hidden, weight, labels, weights -> sum


class Mixtral(nn.Module):
    """A Mixtral, Mistral or Switch-style model for training; a new one is in training mode.

    Attributes:
        config: its architecture.
        router: how its routers are trained.
        gradient_checkpointing: keep the inputs of each layer alone and compute it again in backward.
        folder: where it was loaded from; None when it is new.
    """

    def __init__(
        self,
        config: Config,
        router: RouterOptions = RouterOptions(),  # noqa: B008
        gradient_checkpointing: bool = False,
        recompute: str = "act",
    ) -> None:
        """Users call ``from_config`` or ``from_pretrained``, with these options.

        Args:
            config: of a model that is not quantised.
            router: how its routers are trained.
            gradient_checkpointing: as the attribute, which may be set at any time.
            recompute: what backward computes again of each expert layer (:func:`mixtral.ops.moe_mlp`).
        """
        super().__init__()
        config = copy.copy(config)
        config.select_bias |= router.balance == "loss_free"
        self.config, self.router, self.gradient_checkpointing = config, router, gradient_checkpointing
        self.folder: Path | None = None
        self.model = Decoder(config, router, recompute)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_config(
        cls,
        config: Config,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        **options: object,
    ) -> "Mixtral":
        """A new model: weights from a normal distribution of deviation 0.02, cut at three deviations; norms of 1."""
        with torch.device(device):
            model = cls(config, **options)
        model.init_weights(seed)
        return model.to_dtype(dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        lora: str | PathLike[str] | None = None,
        **options: object,
    ) -> "Mixtral":
        """A model of any folder or file that ``mixtral.Mixtral.from_pretrained`` reads and that is not quantised.

        Args:
            folder: as there.
            dtype: float32, bfloat16 or float16; "auto": as in the files. Routers stay in f32 unless the model says
                otherwise.
            lora: folder of an adapter of PEFT or mistral-finetune, which is merged into the weights in f32.
            options: those of the constructor.

        Raises:
            LoadError: a file is missing, wrong or quantised; it names the file, the item and the reason.
            ValueError: an unknown dtype.
        """
        return folders.load(cls, folder, dtype, device, lora, **options)

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        format: str = "huggingface",
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a folder that transformers and the C++ model load; it appears whole or not at all.

        Args:
            folder: must not exist or be empty.
            format: "huggingface" (names of transformers 5), "huggingface_v4" (a tensor for each expert) or
                "consolidated" (Mistral's own).
            state_dict: saved instead of the model's own, as where FSDP's shards were gathered.

        Raises:
            ValueError: an unknown format, or ``folder`` is in use.
            OSError: it cannot be written.
        """
        folders.save(self, folder, format, self.state_dict() if state_dict is None else state_dict)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew, in f32 before they are rounded, and set biases of selection to zero."""
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        scale = self.router.init_scale
        for name, weight in self.named_parameters():
            of_router = scale is not None and name.endswith("mlp.gate.weight")
            deviation = math.sqrt(scale / weight.shape[1]) if of_router else 0.02
            if weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                nn.init.trunc_normal_(weight, 0, deviation, -3 * deviation, 3 * deviation, generator)
        for bias in self.buffers():
            bias.zero_()

    def to_dtype(self, dtype: torch.dtype | str) -> "Mixtral":
        """Convert all weights but those of f32 routers: selective precision (Switch Transformers, section 2.4)."""
        dtype = folders.float_dtype(dtype)
        for name, weight in self.named_parameters():
            if not (self.config.router_in_f32 and name.endswith("mlp.gate.weight")):
                weight.data = weight.data.to(dtype)
        return self

    def loss(
        self, batch: Batch, step: StepTotals | None = None, vocabulary_loss: VocabularyLoss = linear_cross_entropy
    ) -> Losses:
        """The losses of a batch. With ``step``, its totals, they are the batch's share in the step's losses.

        Args:
            vocabulary_loss: what takes the place of the cross-entropy, with the arguments and the result of
                :func:`linear_cross_entropy`, such as a part of :func:`distill_cross_entropy`.
        """
        return self(batch, step, vocabulary_loss)

    def forward(
        self,
        inputs: Tensor | Batch,
        step: StepTotals | None = None,
        vocabulary_loss: VocabularyLoss = linear_cross_entropy,
    ) -> Tensor | Losses:
        """input_ids int64 [B, S] -> logits f32 [B, S, vocab]; or a batch -> its losses, as wrappers such as DDP need.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        if isinstance(inputs, Batch):
            hidden, routings = self._hidden_states(inputs)
            cross_entropies = self._sum_of_cross_entropies(hidden, inputs, vocabulary_loss)
            return share_of_step(cross_entropies, routings, inputs, step, self.config.top_k, self.router)
        return self.logits(Batch.from_padded(inputs)).view(*inputs.shape, -1)

    def logits(self, batch: Batch) -> Tensor:
        """f32 [T, vocab], after every token of a batch."""
        return self.lm_head(self._hidden_states(batch)[0]).float()

    def expert_load(self, batch: Batch) -> Tensor:
        """int64 [L, E]: the tokens of a batch that choose each expert, as in its losses."""
        logits, ids = zip(*self._hidden_states(batch)[1], strict=True)
        return router_sums(logits, self.config.top_k, topk_ids=ids).load

    def _hidden_states(self, batch: Batch) -> tuple[Tensor, list[Routing]]:
        folders.check_ids(batch.input_ids, self.config.vocab_size)
        return self.model(batch, self.gradient_checkpointing)

    def _sum_of_cross_entropies(self, hidden: Tensor, batch: Batch, vocabulary_loss: VocabularyLoss) -> Tensor:
        if isinstance(self.lm_head, Linear):
            return vocabulary_loss(hidden, self.lm_head.weight, batch.labels, batch.weights)
        rows = batch.labels != IGNORED  # the head is a wrapper, of PEFT for one: what it computes counts
        losses = functional.cross_entropy(self.lm_head(hidden[rows]).float(), batch.labels[rows], reduction="none")
        return (losses if batch.weights is None else losses * batch.weights[rows]).sum()

    @torch.no_grad()
    def update_balance(self, load: Tensor) -> None:
        """After a step of "loss_free": raise the bias of experts below the mean load, lower it of those above.

        Args:
            load: [L, E], of the whole step.
        """
        for layer, counts in zip(self.model.layers, load.float(), strict=True):
            step = self.router.bias_update_rate * torch.sign(counts.mean() - counts)
            layer.mlp.gate.e_score_correction_bias += step
