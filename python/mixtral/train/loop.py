"""The training loop that every command shares.

    outcome = loop.run(model, batches, settings.train, settings.output, identity=identity, evaluate=evaluate)

A step is a function of its number: ``batches(step, context)`` gives its microbatches, the random numbers of a
microbatch are seeded by (seed, step, its index), and the learning rate follows the share of the run that has passed. So
a run that is resumed from a checkpoint computes the same bits as one that was never interrupted. Several ranks share
the microbatches, and compute the same but for the order of sums.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, metrics
from .batch import Batch, Losses, StepTotals
from .optimizer import Optimizer, learning_rate
from .parallel import Ranks
from .settings import OutputSettings, TrainSettings, share_microbatches
from .signals import stop_signals
from .toml_tables import SettingsError

# Microbatches of a step, all of them on every rank: of step number and context, which the curriculum may shorten.
Batches = Callable[[int, int], list[Batch]]
# The losses of a microbatch as shares of the step's, and more scalars to report, which add over microbatches too.
LossFunction = Callable[[nn.Module, Batch, StepTotals], tuple[Losses, dict[str, Tensor]]]
# Scores by domain: {"bible": {"bits_per_byte": 1.4, ...}}.
Evaluate = Callable[[nn.Module], dict[str, dict[str, Any]]]


class TrainingError(RuntimeError):
    """A run that cannot go on; its message names the step and the last checkpoint."""


@dataclasses.dataclass
class Outcome:
    """How a run ended.

    ``status`` is 0, or 130 and 143 when SIGINT and SIGTERM ended it, after a checkpoint. ``scores`` are those of the
    last evaluation.
    """

    step: int
    tokens: int
    seconds: float
    status: int
    scores: dict[str, dict[str, Any]]


def train_loss(model: nn.Module, batch: Batch, totals: StepTotals) -> tuple[Losses, dict[str, Tensor]]:
    """The loss of ``mixtral train``: cross-entropy, balance and z terms."""
    return model.loss(batch, totals), {}


def run(
    model: nn.Module,
    batches: Batches,
    settings: TrainSettings,
    output: OutputSettings,
    *,
    identity: dict[str, Any],
    loss_fn: LossFunction = train_loss,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> Outcome:
    """Trains the parameters of ``model`` that require a gradient.

    Writes into ``output.folder``: checkpoints/, metrics.jsonl, tensorboard/ when it is installed, loss.svg, loss.png.

    Args:
        model: ``mixtral.train.Mixtral``, or a module with its ``loss``, ``expert_load``, ``config`` and ``router``.
        identity: what must be equal for a run to be resumed: digests of data and tokenizer, settings; flat.
        evaluate: called every ``evaluate_every`` steps and at the end, on the first rank.
        resume: go on from the last checkpoint of the folder.

    Raises:
        TrainingError: the loss or a gradient is not finite.
        SettingsError: nothing to resume from, a run of another identity, a folder that holds a run already.
        checkpoint.WriteError: the disk is full.
    """
    loop = _Loop(model, batches, settings, output, identity, loss_fn, evaluate, ranks or Ranks(settings.device))
    loop.start(resume)
    with stop_signals() as pending:
        try:
            while loop.done < 1 and not pending.number(loop.ranks):
                loop.train_step()
            return loop.finish(pending.number(loop.ranks))
        finally:
            loop.reporter.close()


class _Loop:
    """The state of a run between two steps."""

    def __init__(self, model, batches, settings, output, identity, loss_fn, evaluate, ranks) -> None:  # noqa: ANN001
        self.model, self.batches, self.settings, self.output = model, batches, settings, output
        self.identity, self.loss_fn, self.evaluate, self.ranks = identity, loss_fn, evaluate, ranks
        share_microbatches(settings, ranks.size)
        self.out = Path(output.folder)
        self.steps = settings.steps or math.ceil(settings.tokens / settings.tokens_per_step)  # 0: by the clock
        self.optimizer = Optimizer(model, settings)
        self.flops = metrics.flops_per_token(model)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.saved: int | None = None
        self.evaluated: int | None = None
        self.scores: dict[str, dict[str, Any]] = {}

    @property
    def done(self) -> float:
        """The share of the run that has passed."""
        return self.step / self.steps if self.steps else self.seconds / (60 * self.settings.minutes)

    def start(self, resume: bool) -> None:
        """Takes the last checkpoint, or makes sure that there is none."""
        checkpoint.check_folder(self.out, resume)
        self.ranks.wait()  # what the first one writes is no other run to the others
        if resume:
            self._restore(checkpoint.paths(self.out)[-1])
        self.reporter = metrics.Reporter(self.out, self.step, self.steps or None, self.ranks.is_first)
        if not resume:  # the last good checkpoint exists before the first step
            self.save()

    def _restore(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        if other := checkpoint.differences(state["identity"], self.identity):
            raise SettingsError(f"{path} is of another run: {'; '.join(other)}")
        try:
            self.optimizer.load_state(tensors, state["step"])
        except ValueError as error:
            raise SettingsError(f"{path} is of another model: {error}") from None
        buffers = dict(self.model.named_buffers())
        for name, tensor in tensors.items():
            if name.startswith("buffer."):
                buffers[name.removeprefix("buffer.")].copy_(tensor)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.saved = self.step
        for row in metrics.read(self.out):
            if row["step"] == self.step and "evaluation" in row:
                self.scores, self.evaluated = row["evaluation"], self.step

    def save(self) -> None:
        """Writes a checkpoint of this step, unless there is one."""
        if self.saved != self.step and self.ranks.is_first:
            buffers = {f"buffer.{n}": b for n, b in self.model.named_buffers() if n in self.model.state_dict()}
            state = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "identity": self.identity}
            checkpoint.save(self.out, self.optimizer.state() | buffers, state, self.output.keep)
        self.saved = self.step

    # --- one step -----------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """One update of the weights."""
        began = time.monotonic()
        all_batches = self.batches(self.step, self._context())
        totals = step_totals(all_batches)
        device = self.settings.device
        mine = [(i, b.to(device)) for i, b in enumerate(all_batches) if i % self.ranks.size == self.ranks.rank]
        counts = 1.0 if mine else 0.0  # a rank without a microbatch computes the first one, which does not count there
        mine = mine or [(0, all_batches[0].to(device))]
        if self.model.config.is_moe and self.model.router.balance == "global" and len(all_batches) > 1:
            totals = totals._replace(load=self._route(mine, counts))
        sums: dict[str, Tensor] = {}
        load, max_logit = None, -math.inf
        for index, batch in mine:
            self._seed(index)
            losses, extra = self.loss_fn(self.model, batch, totals)
            (counts * losses.total).backward()
            self.optimizer.accumulate()
            terms = {
                "loss": losses.total,
                "cross_entropy": losses.cross_entropy,
                "balance": losses.balance,
                "z": losses.z,
            }
            for name, value in (terms | extra).items():
                value = counts * torch.as_tensor(value).detach().double()
                sums[name] = sums[name] + value if name in sums else value
            if losses.load.numel():
                one = counts * losses.load.double()
                load = one if load is None else load + one
                max_logit = max(max_logit, float(losses.max_logit.max()))
        self._finish_step(began, totals, sums, load, max_logit)

    def _context(self) -> int:
        """The context of this step: the curriculum's, or the whole."""
        started = [c for share, c in self.settings.context_curriculum if share <= self.done]
        return int(started[-1]) if started else self.settings.context

    def _seed(self, index: int) -> None:
        """Jitter and expert dropout of a microbatch are functions of (seed, step, index)."""
        torch.manual_seed((self.settings.seed * 1_000_003 + self.step) * 4099 + index)

    @torch.no_grad()
    def _route(self, batches: list[tuple[int, Batch]], counts: float) -> Tensor:
        """The load of the whole step, [L, E]: balance over all microbatches needs it before the first backward."""
        load = None
        for index, batch in batches:
            self._seed(index)
            one = counts * self.model.expert_load(batch).double()
            load = one if load is None else load + one
        self.ranks.add([load])
        return load

    def _finish_step(self, began: float, totals: StepTotals, sums: dict, load: Tensor | None, max_logit: float) -> None:
        names = list(sums)
        values = torch.stack([sums[name] for name in names])
        self.ranks.add([values])
        self.ranks.add(self.optimizer.gradients())
        if load is not None:
            self.ranks.add([load])
            max_logit = self.ranks.largest(max_logit)
        terms = dict(zip(names, values.tolist(), strict=True))
        norm = self.optimizer.norm()
        self._check_finite(terms, norm)

        ahead = (self.step + 1) / self.steps if self.steps else self.done + 1e-3
        lr = learning_rate(ahead, self.settings)
        self.optimizer.step(lr, norm)
        if load is not None and self.model.router.balance == "loss_free":
            self.model.update_balance(load)

        seconds = self.ranks.largest(time.monotonic() - began)  # all ranks see the same clock
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + int(totals.tokens), self.seconds + seconds
        row = {"step": self.step, "tokens": self.tokens, "lr": lr, **terms, "grad_norm": norm}
        if load is not None:
            row |= {"balance_sum": terms["balance"] * len(load), "max_logit": max_logit}
            row |= metrics.expert_statistics(load)
        row |= {
            "seconds": self.seconds,
            "tokens_per_second": totals.tokens / seconds,
            "flops_per_second": self.flops * totals.tokens / seconds,
            "memory_bytes": metrics.peak_memory(self.settings.device),
        }
        self._after_step(row)

    def _check_finite(self, terms: dict[str, float], norm: float) -> None:
        bad = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
        if not math.isfinite(norm):
            bad.append(f"the norm of the gradient is {norm}")
        if bad:
            last = f"the last checkpoint is of step {self.saved}"
            hint = "lower train.lr, or raise router.z_coefficient"
            raise TrainingError(f"step {self.step + 1}: {bad[0]}; {last}, {hint}")

    def _after_step(self, row: dict[str, Any]) -> None:
        every = self.output
        if self.step % every.log_every == 0:
            self.reporter.row(row)
        self.reporter.progress(self.step, self.done, row)
        if every.evaluate_every and self.step % every.evaluate_every == 0:
            self._score()
        if every.checkpoint_every and self.step % every.checkpoint_every == 0:
            self.save()

    def _score(self) -> None:
        """Evaluates, on the first rank; the others wait for it in the next sum."""
        if self.evaluate is None or self.evaluated == self.step or not self.ranks.is_first:
            return
        self.model.eval()
        with torch.no_grad():
            self.scores = self.evaluate(self.model)
        self.model.train()
        self.evaluated = self.step
        self.reporter.row({"step": self.step, "evaluation": self.scores})
        bits = {d: s["bits_per_byte"] for d, s in self.scores.items() if s.get("bits_per_byte") is not None}
        if bits:
            text = ", ".join(f"{domain} {value:.4f}" for domain, value in bits.items())
            self.reporter.say(f"step {self.step}: held-out bits per byte: {text}")

    def finish(self, signalled: int) -> Outcome:
        """The last checkpoint; after a whole run also the last evaluation and the figure."""
        self.save()
        if not signalled:
            self._score()
            if self.ranks.is_first:
                try:
                    metrics.draw(self.out)
                except ImportError:
                    self.reporter.say("no figure of the loss: it needs matplotlib: pip install 'mixtral[train]'")
        else:
            self.reporter.say(f"stopped after step {self.step}, which is saved: --resume goes on")
        status = 128 + signalled if signalled else 0
        return Outcome(self.step, self.tokens, self.seconds, status, self.scores)


def step_totals(batches: list[Batch]) -> StepTotals:
    """Targets and tokens of the whole step; the load is not known yet."""
    return StepTotals(sum(float(batch.targets) for batch in batches), sum(batch.tokens for batch in batches))
