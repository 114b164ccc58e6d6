"""``mixtral distill``: a small model that learns from a large one (Switch Transformers, 2101.03961, section 4.2).

The student takes the teacher's weights outside of the feed-forward blocks, and learns 3/4 from the text and 1/4 from
the teacher's probabilities. What counts is the share of the teacher's gain that it keeps: how far it comes from the
loss of the same student trained on the text alone to that of its teacher.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait waste a shared machine

from ..command_line import OK, Parser, require_packages, run_command  # noqa: E402
from .run_flags import add_train_flags, train_settings  # noqa: E402

if TYPE_CHECKING:
    from .loop import LossFunction, Outcome
    from .model import Mixtral
    from .parallel import Ranks

EPILOG = """\
--into names a folder, whose feed-forward blocks the student keeps, or a configuration of `mixtral train`, whose [model]
it has, with new feed-forward blocks. All other weights are the teacher's, so sizes and layers must be the same. FILE is
text, .jsonl with a "text" a line, or token ids, as for `mixtral train`. OUT gets the student as a Hugging Face folder,
checkpoints/, metrics.jsonl, loss.svg, and distill.json with the losses. Ctrl-C saves the step; --resume goes on.

Examples:
  mixtral distill ./moe --into ./dense ./student --data text.jsonl --steps 2000 --baseline train
  mixtral distill ./moe --into small.toml ./student --data text.jsonl --held-out held_out.txt --baseline 2.31"""


@dataclass(frozen=True)
class DistillSettings:
    """Of what a student is made and how it learns.

    Attributes:
        teacher, into: folders, or for ``into`` a .toml with [model].
        data, held_out: files of text; without ``held_out``, ``held_out_share`` of the documents of ``data``.
        separator: cuts text files into documents; "": none.
        alpha: share of the teacher's probabilities in the loss.
        temperature: of teacher and student there.
        init: "teacher": weights outside of the feed-forward blocks are the teacher's; "student": all are its own.
        baseline: held-out loss of the same student trained without a teacher, in nats per token; "train": train it.
    """

    teacher: Path
    into: Path
    data: list[str]
    held_out: list[str]
    held_out_share: float = 0.05
    separator: str = ""
    alpha: float = 0.25
    temperature: float = 1.0
    init: str = "teacher"
    baseline: str | None = None


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status. Errors are one line on stderr."""
    return run_command(lambda: _run(arguments))


def _parser() -> Parser:
    parser = Parser("distill", "Train a small model with a large one as its teacher.", EPILOG)
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="folder of the teacher")
    add("out", metavar="OUT", help="folder to write")
    add("--into", metavar="DENSE|CONFIG", required=True, help="folder of the student, or a .toml with its sizes")
    add("--data", metavar="FILE", nargs="+", required=True, help="text to learn from")
    add("--held-out", metavar="FILE", nargs="+", default=[], help="text to score, never trained on")
    add("--held-out-share", metavar="X", type=float, default=0.05, help="without --held-out: of FILE (default: 0.05)")
    add("--separator", metavar="TEXT", default="", help="cuts text files into documents; \\n is a line end")
    add("--alpha", metavar="X", type=float, default=0.25, help="share of the teacher in the loss (default: 0.25)")
    add("--temperature", metavar="X", type=float, default=1.0, help="of both in that share (default: 1)")
    add("--init", choices=("teacher", "student"), default="teacher", help="weights outside of the feed-forward blocks")
    add(
        "--baseline", metavar="LOSS|train", help="held-out nats per token of the student without a teacher, or train it"
    )
    add_train_flags(add, steps=1000, lr=1e-3)
    return parser


def _run(arguments: Sequence[str]) -> int:
    flags = _parser().parse_intermixed_args(arguments)
    require_packages("distill", ("numpy", "safetensors"), "train")
    if not 0 <= flags.alpha <= 1:
        raise ValueError(f"--alpha must be in [0, 1], got {flags.alpha}")
    if not flags.temperature > 0:
        raise ValueError(f"--temperature must be more than 0, got {flags.temperature}")
    if flags.baseline not in (None, "train"):
        try:
            float(flags.baseline)
        except ValueError:
            raise ValueError(f"--baseline must be a number or train, got {flags.baseline}") from None
    from .. import _C
    from .parallel import Ranks

    settings = DistillSettings(
        Path(_C.find_model(flags.teacher)),
        Path(flags.into) if flags.into.endswith(".toml") else Path(_C.find_model(flags.into)),
        flags.data,
        flags.held_out,
        flags.held_out_share,
        flags.separator.replace("\\n", "\n"),
        flags.alpha,
        flags.temperature,
        flags.init,
        flags.baseline,
    )
    ranks = Ranks(flags.device)
    try:
        return _Distillation(flags, settings, ranks).run()
    finally:
        ranks.close()


class _Distillation:
    """One run of the command."""

    def __init__(self, flags: argparse.Namespace, settings: DistillSettings, ranks: "Ranks") -> None:
        import torch

        from ..model import Config
        from ..tokenizer import Tokenizer
        from . import checkpoint, data, prepare
        from .evaluation import Evaluator
        from .settings import DataSettings, DomainSettings, share_microbatches

        self.flags, self.settings, self.ranks, self.out = flags, settings, ranks, Path(flags.out)
        self.train = train_settings(flags, Config.from_folder(settings.teacher).max_position, "distill")
        share_microbatches(self.train, ranks.size)
        checkpoint.check_folder(self.out, flags.resume)
        if self.train.threads:
            torch.set_num_threads(self.train.threads)
        self.tokenizer = Tokenizer(settings.teacher)
        share = 0.0 if settings.held_out else settings.held_out_share
        source = DataSettings(
            separator=settings.separator,
            domains={"text": DomainSettings(settings.data, held_out=settings.held_out, held_out_share=share)},
        )
        texts = data.load_texts(source, Path(), "distill")
        self.domains = data.load_domains(source, texts, self.tokenizer, Path(), "distill")
        self.batches = data.Mixture(self.domains, source, self.train, self.tokenizer)
        tokens = self.train.tokens_per_step // self.train.accumulation
        self.evaluate = Evaluator(self.domains, self.tokenizer, self.train.context, tokens, self.train.device)
        if not self.evaluate.domains:
            raise ValueError("distill: no text is held out: name some with --held-out, or give --held-out-share")
        self.digests = {
            "data": data.digest(self.domains),
            "tokenizer": prepare.file_digest(prepare.tokenizer_file(settings.teacher)),
        }

    def run(self) -> int:
        from .student import distill_loss

        teacher = self._load_teacher()
        student = self._new_student(teacher, self.settings.init)
        losses = {"teacher": self._loss(teacher), "untrained": self._loss(student)}
        if self.settings.baseline == "train":
            status, losses["baseline"] = self._train_baseline(teacher)
            if status != OK:
                return status
        elif self.settings.baseline is not None:
            losses["baseline"] = float(self.settings.baseline)
        loss = distill_loss(teacher, self.settings.alpha, self.settings.temperature)
        outcome = self._loop(student, self.out, self.flags.resume, loss)
        if outcome.status == OK and self.ranks.is_first:
            losses["student"] = nats_per_token(outcome.scores)
            self._write(teacher, student, losses, outcome)
        return outcome.status

    def _load_teacher(self) -> "Mixtral":
        from .model import Mixtral

        teacher = Mixtral.from_pretrained(self.settings.teacher, self.train.dtype, self.train.device)
        return teacher.eval().requires_grad_(False)

    def _new_student(self, teacher: "Mixtral", init: str) -> "Mixtral":
        from .student import make_student

        return make_student(teacher, self.settings.into, init, self.train, self.tokenizer)

    def _train_baseline(self, teacher: "Mixtral") -> tuple[int, float]:
        """The student on its own: its own weights, the text alone, in the same order. In OUT/baseline."""
        from . import checkpoint, loop

        student = self._new_student(teacher, init="student")
        folder = self.out / "baseline"
        outcome = self._loop(student, folder, bool(checkpoint.paths(folder)), loop.train_loss)
        return outcome.status, nats_per_token(outcome.scores) if outcome.scores else math.nan

    def _loop(self, student: "Mixtral", out: Path, resume: bool, loss: "LossFunction") -> "Outcome":
        from . import loop
        from .settings import OutputSettings

        flags = self.flags
        return loop.run(
            student.train(),
            self.batches,
            self.train,
            OutputSettings(str(out), flags.checkpoint_every, evaluate_every=flags.evaluate_every),
            identity=self._identity(),
            loss_fn=loss,
            evaluate=self.evaluate,
            resume=resume,
            ranks=self.ranks,
        )

    def _identity(self) -> dict[str, Any]:
        """What a run must share with the one that it resumes; length, speed and place are free."""
        names = "lr warmup weight_decay tokens_per_step accumulation context seed dtype alpha temperature init".split()
        return {name: getattr(self.flags, name) for name in names} | self.digests

    def _loss(self, model: "Mixtral") -> float:
        import torch

        with torch.no_grad():
            return nats_per_token(self.evaluate(model.eval()))

    def _write(self, teacher: "Mixtral", student: "Mixtral", losses: dict[str, float], outcome: "Outcome") -> None:
        from . import checkpoint
        from .output import put_model

        put_model(student, self.out)
        kept = share_kept(losses) if "baseline" in losses else None
        sizes = {"teacher": teacher.config.total_parameters, "student": student.config.total_parameters}
        report = {"teacher": str(self.settings.teacher), "into": str(self.settings.into), "parameters": sizes}
        report |= {"alpha": self.settings.alpha, "temperature": self.settings.temperature, "init": self.settings.init}
        report |= {"steps": outcome.step, "tokens": outcome.tokens, "seconds": outcome.seconds}
        report |= {"nats_per_token": losses, "share_of_gain_kept": kept}
        text = _card(report)
        checkpoint.replace_file(self.out / "distill.json", (json.dumps(report, indent=2) + "\n").encode())
        checkpoint.replace_file(self.out / "README.md", f"# {self.out.name}\n\n{text}".encode())
        print(f"{self.out}: {text}", end="")


def nats_per_token(scores: dict[str, dict[str, Any]]) -> float:
    """The mean loss of ``evaluation.Evaluator``'s scores."""
    tokens = sum(score["tokens"] for score in scores.values())
    return sum(math.log(score["perplexity"]) * score["tokens"] for score in scores.values()) / tokens


def share_kept(losses: dict[str, float]) -> float | None:
    """(baseline - student) / (baseline - teacher) of held-out losses; None where the teacher is no better."""
    gain = losses["baseline"] - losses["teacher"]
    return (losses["baseline"] - losses["student"]) / gain if gain > 0 else None


def _card(report: dict[str, Any]) -> str:
    """The losses in words."""
    losses, sizes, kept = report["nats_per_token"], report["parameters"], report["share_of_gain_kept"]
    lines = [
        f"{sizes['student']:,} parameters, distilled from {sizes['teacher']:,} in {report['steps']:,} steps.",
        "Held-out nats per token: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()) + ".",
    ]
    if kept is not None:
        lines.append(f"It keeps {kept:.1%} of the teacher's gain over the student without a teacher.")
    elif "baseline" in losses:
        lines.append("The teacher is no better than the student without a teacher: there is no gain to keep.")
    return "\n".join(lines) + "\n"
