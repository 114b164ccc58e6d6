"""``mixtral finetune``: LoRA adapters, or a whole model, from conversations in JSONL."""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait waste a shared machine

from ..command_line import OK, Parser, require_packages, run_command  # noqa: E402
from .run_flags import add_train_flags, train_settings  # noqa: E402

EPILOG = """\
FILE has a JSON object a line, as mistral-finetune reads them: {"messages": [{"role": ..., "content": ...}, ...]},
{"prompt": ..., "completion": ...} or {"text": ...}. Only answers and completions are scored. OUT gets an adapter in
PEFT's files, for --lora, PEFT and transformers; with --lora 0 it gets the model. Beside it: checkpoints/,
metrics.jsonl, loss.svg, and finetune.json with the loss before and after. Ctrl-C finishes the step and saves it;
--resume goes on.

Examples:
  mixtral finetune ./Mixtral-8x7B-v0.1 ./adapter --data chat.jsonl --steps 200
  mixtral finetune ./Mixtral-8x7B-v0.1 ./adapter --data chat.jsonl --targets attention --lora 64 --merge
  mixtral finetune ./small ./tuned --data chat.jsonl --lora 0 --lr 1e-5
  mixtral chat ./Mixtral-8x7B-v0.1 --lora ./adapter"""


@dataclass(frozen=True)
class FinetuneSettings:
    """What is tuned, and on what; the rest is in ``settings.TrainSettings``.

    Attributes:
        data, held_out: files of examples; without ``held_out``, every ``held_out_every``-th line of ``data`` (0: none).
        chat_template: as of ``Tokenizer.apply_chat``.
        lora: rank of the adapters; 0: train all weights but the routers'.
        alpha: the adapters are scaled by alpha / rank.
        targets: of the adapters: "attention", "experts".
        train_router: train the routers too.
        merge: write the model with the adapter in it, OUT/merged.
    """

    data: list[str]
    held_out: list[str] = field(default_factory=list)
    held_out_every: int = 20
    chat_template: str | None = None
    lora: int = 16
    alpha: float = 32.0
    targets: list[str] = field(default_factory=lambda: ["attention", "experts"])
    train_router: bool = False
    merge: bool = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status. Errors are one line on stderr."""
    return run_command(lambda: _run(arguments))


def _parser() -> Parser:
    parser = Parser("finetune", "Train LoRA adapters, or a whole model, on conversations.", EPILOG)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of the model, or org/name in the Hugging Face cache")
    add("out", metavar="OUT", help="folder to write")
    add("--data", metavar="FILE", nargs="+", required=True, help="examples, .jsonl")
    add("--held-out", metavar="FILE", nargs="+", default=[], help="examples to score, never trained on")
    add("--held-out-every", metavar="N", type=int, default=20, help="without --held-out: every N-th line; 0: none")
    add("--chat-template", metavar="NAME|FILE", help="format of conversations (default: the model's)")
    add("--lora", metavar="R", type=int, default=16, help="rank of the adapters; 0: train the weights (default: 16)")
    add("--alpha", metavar="X", type=float, default=32.0, help="adapters count alpha / R (default: 32)")
    add("--targets", metavar="LIST", type=_list, default=["attention", "experts"], help="default: attention,experts")
    add("--train-router", choices=("yes", "no"), default="no", help="default: no")
    add("--merge", action="store_true", help="write the model with the adapter in it too, OUT/merged")
    add_train_flags(add, steps=100, lr=1e-4)
    return parser


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _run(arguments: Sequence[str]) -> int:
    flags = _parser().parse_intermixed_args(arguments)
    require_packages("finetune", ("numpy", "safetensors", *(["peft"] if flags.lora else [])), "train")
    from .parallel import Ranks

    settings = FinetuneSettings(
        flags.data, flags.held_out, flags.held_out_every, flags.chat_template, flags.lora, flags.alpha, flags.targets,
        flags.train_router == "yes", flags.merge,
    )  # fmt: skip
    ranks = Ranks(flags.device)
    try:
        return _finetune(flags, settings, ranks)
    finally:
        ranks.close()


def _finetune(flags: argparse.Namespace, settings: FinetuneSettings, ranks: object) -> int:
    import torch

    from ..model import Config
    from ..tokenizer import Tokenizer
    from . import adapters, checkpoint, example_batches, loop
    from .model import Mixtral
    from .options import RouterOptions
    from .output import drop_run_files, put_model
    from .settings import OutputSettings, share_microbatches

    out = Path(flags.out)
    folder = _model_folder(flags.model)
    config = Config.from_folder(folder)
    train = train_settings(flags, config.max_position, "finetune")
    share_microbatches(train, ranks.size)
    _check(settings, config)
    checkpoint.check_folder(out, flags.resume)
    if train.threads:
        torch.set_num_threads(train.threads)
    documents, held_out = _documents(settings, Tokenizer(folder), train.context)
    batches = example_batches.ExampleBatches(documents, train.tokens_per_step, train.accumulation, train.seed)
    model = Mixtral.from_pretrained(
        folder,
        train.dtype,
        train.device,
        router=RouterOptions(balance="none", z_coefficient=0.0),
        gradient_checkpointing=train.gradient_checkpointing,
    )
    wrapper = None
    if settings.lora:
        rank, alpha, targets = settings.lora, settings.alpha, settings.targets
        wrapper = adapters.add_lora(model, rank, alpha, targets, settings.train_router, train.seed)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(settings.train_router or not name.endswith("mlp.gate.weight"))
    evaluate = example_batches.ExampleLoss(held_out, train.tokens_per_step, train.device)
    before = evaluate(model.eval())
    outcome = loop.run(
        model.train(),
        batches,
        train,
        OutputSettings(str(out), flags.checkpoint_every, evaluate_every=flags.evaluate_every),
        identity=_identity(flags, settings, folder),
        evaluate=evaluate,
        resume=flags.resume,
        ranks=ranks,
    )
    if outcome.status == OK and ranks.is_first:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = config.total_parameters
        if wrapper is not None:
            adapters.save_adapter(wrapper, out)
        else:
            put_model(model, out)
        if settings.merge:
            del model, wrapper
            Mixtral.from_pretrained(folder, lora=out).save_pretrained(out / "merged")
            drop_run_files(out / "merged")
        report = {"model": str(folder), "steps": outcome.step, "tokens": outcome.tokens, "seconds": outcome.seconds}
        report |= {"trained_parameters": trained, "parameters": total, "examples": len(documents)}
        report |= {"before": before.get("held_out"), "after": outcome.scores.get("held_out")}
        report["settings"] = asdict(settings)
        checkpoint.replace_file(out / "finetune.json", (json.dumps(report, indent=2) + "\n").encode())
        _print(out, report)
    return outcome.status


def _print(out: Path, report: dict) -> None:
    share = report["trained_parameters"] / report["parameters"]
    print(
        f"{out}: {report['steps']:,} steps on {report['examples']:,} documents, {report['trained_parameters']:,} "
        f"trained parameters ({share:.2%} of the model), {report['seconds']:,.0f} seconds"
    )
    if report["after"]:
        before, after = (report[key]["cross_entropy"] for key in ("before", "after"))
        print(f"held-out loss: {before:.4f} -> {after:.4f} nats per scored token, of {report['after']['targets']:,}")
    if template := report["settings"]["chat_template"]:
        print(f"chat with --chat-template {template}")


def _model_folder(model: str) -> Path:
    from .. import _C

    return Path(_C.find_model(model)).absolute()


def _check(settings: FinetuneSettings, config: object) -> None:
    """Before anything is read: what cannot be meant."""
    from .adapters import check_lora

    if settings.lora < 0:
        raise ValueError(f"--lora must be at least 0, got {settings.lora}")
    if settings.lora:
        check_lora(config, settings.lora, settings.targets, settings.train_router)
    elif settings.merge:
        raise ValueError("--merge: with --lora 0 there is no adapter to merge: OUT is the model")
    if settings.held_out_every < 0 or settings.held_out_every == 1:
        raise ValueError(f"--held-out-every must be 0 or at least 2, got {settings.held_out_every}")
    for file in (*settings.data, *settings.held_out):
        if not Path(file).exists():
            raise ValueError(f"{file}: no such file")


def _documents(settings: FinetuneSettings, tokenizer: object, context: int) -> tuple[list, list]:
    """Documents to train on, and held out; those without a scored token in ``context`` are left out, with a warning."""
    import warnings

    from .conversations import cut, read_examples, split_held_out

    examples = [e for file in settings.data for e in read_examples(file, tokenizer, settings.chat_template)]
    every = 0 if settings.held_out else settings.held_out_every
    documents, held_out = split_held_out(examples, every) if every else ([d for e in examples for d in e], [])
    for file in settings.held_out:
        held_out += [d for e in read_examples(file, tokenizer, settings.chat_template) for d in e]
    if long := sum(len(document.ids) > context for document in documents + held_out):
        warnings.warn(f"{long} documents have more than {context} tokens: the rest of them is cut off", stacklevel=2)
    return list(cut(documents, context)), list(cut(held_out, context))


def _identity(flags: argparse.Namespace, settings: FinetuneSettings, folder: Path) -> dict:
    """What a run must share with the one that it resumes; length, speed and place are free."""
    free = ("out", "resume", "steps", "threads", "device", "gradient_checkpointing", "checkpoint_every")
    flat = {name: value for name, value in vars(flags).items() if name not in (*free, "evaluate_every", "merge")}
    flat["model"] = str(folder)
    for name in ("data", "held_out"):
        flat[name] = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in getattr(settings, name)]
    return flat
