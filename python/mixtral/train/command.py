"""``mixtral train``: a model from text or token files, by a configuration in TOML."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait waste a shared machine

from ..command_line import OK, Parser, require_packages, run_command

PACKAGES = ("numpy", "safetensors", "sentencepiece")

EPILOG = """\
CONFIG.toml has the sections [model], [router], [data], [train] and [output]; docs/train_command.md explains every key.
Paths in it are relative to the file itself. DIR gets the model as a Hugging Face folder, checkpoints/, metrics.jsonl,
loss.svg, and tensorboard/ where that is installed. Ctrl-C finishes the step and saves it; --resume then gives the same
bits as a run without interruption. Several processes: torchrun --nproc-per-node N -m mixtral train CONFIG.toml

Examples:
  mixtral train docs/worked_run/dense.toml --out build/dense
  mixtral train docs/worked_run/dense.toml --out build/dense --resume
  mixtral train docs/worked_run/dense.toml --out build/small --steps 200 --set train.lr=1e-3 --set model.num_layers=2"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status. Errors are one line on stderr."""
    return run_command(lambda: _run(arguments))


def _parser() -> Parser:
    parser = Parser("train", "Train a model from text or token files, by a configuration in TOML.", EPILOG)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the configuration, a .toml file")
    add("--out", metavar="DIR", help="folder to write, instead of output.folder")
    add("--steps", metavar="N", type=int, help="length of the run, instead of train.steps, minutes or tokens")
    add("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="another value: train.lr=1e-3; may be repeated")
    add("-t", "--threads", metavar="N", type=int, help="CPU threads; 0: one per core")
    return parser


def _run(arguments: Sequence[str]) -> int:
    flags = _parser().parse_intermixed_args(arguments)
    require_packages("train", PACKAGES, "train")
    from .settings import read_settings

    overrides = list(flags.set)
    if flags.out is not None:
        overrides.append(f"output.folder='{Path(flags.out).absolute()}'")
    if flags.steps is not None:
        overrides += [f"train.steps={flags.steps}", "train.minutes=0.0", "train.tokens=0"]
    if flags.threads is not None:
        overrides.append(f"train.threads={flags.threads}")
    settings = read_settings(flags.config, overrides)
    from .parallel import Ranks

    ranks = Ranks(settings.train.device)
    try:
        return train(settings, Path(flags.config), ranks, flags.resume)
    finally:
        ranks.close()


def train(settings: Any, source: Path, ranks: Any, resume: bool) -> int:
    """The whole command, with settings that have been read from ``source``."""
    import torch

    from ..tokenizer import Tokenizer
    from . import checkpoint, data, loop, prepare, result
    from .evaluation import Evaluator
    from .settings import share_microbatches
    from .toml_tables import to_toml

    options, root = settings.train, source.parent
    share_microbatches(options, ranks.size)
    out = root / settings.output.folder
    settings.output.folder = str(out)
    checkpoint.check_folder(out, resume)
    text = result.card_text(settings, source)
    if options.threads:
        torch.set_num_threads(options.threads)
    texts = data.load_texts(settings.data, root, str(source))
    tokenizer_file = prepare.prepare_tokenizer(settings, texts, source, ranks, resume)
    tokenizer = Tokenizer(tokenizer_file)
    domains = data.load_domains(settings.data, texts, tokenizer, root, str(source))
    del texts
    model = prepare.build_model(settings, tokenizer, source)
    batches = data.Mixture(domains, settings.data, options, tokenizer, str(source))
    evaluator = Evaluator(domains, tokenizer, options.context, options.tokens_per_step, options.device)
    digests = {"tokenizer": prepare.file_digest(tokenizer_file), "data": data.digest(domains)}
    outcome = loop.run(
        model,
        batches,
        options,
        settings.output,
        identity=prepare.run_identity(settings) | digests,
        evaluate=evaluator,
        resume=resume,
        ranks=ranks,
    )
    if outcome.status == OK and ranks.is_first:
        if prepare.round_weights(model, settings):
            with torch.no_grad():
                outcome.scores = evaluator(model.eval())
        result.save_model(model, settings, tokenizer_file)
        sample = result.sample(out, settings.output.prompt) if settings.output.prompt else ""
        card = result.card(settings, model.config, domains, outcome, text, sample)
        checkpoint.replace_file(out / "README.md", card.encode())
        checkpoint.replace_file(out / "train.toml", to_toml(settings).encode())
        print(f"{out}: {outcome.step:,} steps, {outcome.tokens:,} tokens, {outcome.seconds:,.0f} seconds")
        for name, score in outcome.scores.items():
            print(f"{name}: {score['bits_per_byte']:.4f} bits per byte, xz -9 {score['xz_bits_per_byte']:.4f}")
    return outcome.status
