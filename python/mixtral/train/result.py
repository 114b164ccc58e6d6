"""What a finished run leaves: the model folder, and its card with what it was trained on and how it scores."""

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..model import Config
from . import metrics
from .checkpoint import WriteError
from .data import Domain
from .loop import Outcome
from .metrics import FILE
from .model import Mixtral
from .output import RUN_FILES
from .settings import Settings
from .toml_tables import SettingsError

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation{license}
---

# {title}

{total:.2f} M parameters, {active:.2f} M active per token. {num_layers} layers, hidden size {hidden_size}, {num_heads} \
query heads and
{num_kv_heads} key/value heads of {head_dim}, {experts}, {window}, vocabulary of {vocab_size}.
{sample}{text}
## Training

| domain | documents | tokens | share | held-out documents | sha256 |
|---|---|---|---|---|---|
{domains}

{steps:,} steps, {tokens:,} tokens, {seconds:,.0f} seconds on {device}. Documents begin with BOS and end with EOS, are \
packed, and do
not see each other; the longest has {context} tokens. {optimizer}, peak learning rate {lr}, {dtype}. {versions}.
All settings are in `train.toml`, for `mixtral train`.

## Evaluation

Held-out documents, never trained on, each on its own, beside `xz -9` of the same bytes:

| domain | bits per byte | `xz -9` | perplexity per token | tokens | bytes |
|---|---|---|---|---|---|
{scores}
{load}"""


def save_model(model: Mixtral, settings: Settings, tokenizer_file: Path) -> None:
    """Puts the model and its tokenizer into the output folder; the configuration, which makes it a model, last.

    Raises:
        WriteError: the disk is full.
    """
    out = Path(settings.output.folder)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=out) as aside:
        folder = Path(aside) / "model"
        try:
            if settings.output.dtype != "auto":
                model = model.to(getattr(torch, settings.output.dtype))
            model.save_pretrained(folder, settings.output.format)
            source = tokenizer_file.parent
            for name in (
                "tokenizer_config.json",
                "special_tokens_map.json",
                "chat_template.jinja",
                tokenizer_file.name,
            ):
                if (source / name).is_file() and source != out and not (folder / name).exists():
                    shutil.copyfile(source / name, folder / name)
            files = [f for f in folder.iterdir() if f.is_file() and f.name not in RUN_FILES]
            for file in sorted(files, key=lambda f: f.name in ("config.json", "params.json")):
                shutil.copymode(out / FILE, file)  # safetensors makes files that only their owner reads
                os.replace(file, out / file.name)
        except OSError as error:
            raise WriteError(f"{out}: the model cannot be written: {error}; --resume tries again") from None


def sample(out: Path, prompt: str) -> str:
    """What the saved model writes after a prompt, greedily."""
    from ..model import Mixtral as Inference

    return prompt + Inference.from_pretrained(out).generate([prompt], max_tokens=60, temperature=0.0)[0].text


def card_text(settings: Settings, source: Path) -> str:
    """The text of ``output.card``; read before the run, so that a wrong name does not show after it."""
    if not settings.output.card:
        return ""
    try:
        return (source.parent / settings.output.card).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{source}: output.card: {error.filename}: {error.strerror}") from None


def card(settings: Settings, config: Config, domains: list[Domain], outcome: Outcome, text: str, sample: str) -> str:
    """The text of README.md.

    Args:
        text: what the configuration wants to say: sources, licences, limits. Markdown.
        sample: what the model writes, to show.
    """
    total = sum(d.weight for d in domains)
    shares = {d.name: (1 - settings.data.passkeys) * d.weight / total for d in domains}
    rows = [
        f"| {d.name} | {len(d.train):,} | {int(d.train.lengths().sum()):,} | {shares[d.name]:.3f} "
        f"| {len(d.held_out):,} | `{d.train.digest}` |"
        for d in domains
    ]
    if settings.data.passkeys:
        rows.append(f"| passkey documents, generated | | | {settings.data.passkeys:.3f} | | |")
    scores = [
        f"| {name} | {s['bits_per_byte']:.3f} | {s['xz_bits_per_byte']:.3f} | {s['perplexity']:.2f} | {s['tokens']:,} "
        f"| {s['bytes']:,} |"
        for name, s in outcome.scores.items()
    ]
    names = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    experts = f"{config.num_experts} experts of intermediate size {config.intermediate_size}, top-{config.top_k}"
    return _CARD.format(
        **{name: getattr(config, name) for name in names},
        license=f"\nlicense: {settings.output.license}" if settings.output.license else "",
        title=settings.output.title,
        total=config.total_parameters / 1e6,
        active=config.active_parameters / 1e6,
        experts=experts if config.is_moe else f"intermediate size {config.intermediate_size}",
        window=f"sliding window {config.window}" if config.window else "no sliding window",
        sample="\n" + "\n".join(f"> {line}".rstrip() for line in sample.splitlines()) + "\n" if sample else "",
        text=f"\n{text.strip()}\n" if text else "",
        domains="\n".join(rows),
        steps=outcome.step,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        device=_device(settings.train.device),
        context=settings.train.context,
        optimizer={"adamw": "AdamW", "muon": "Muon and AdamW"}[settings.train.optimizer],
        lr=settings.train.lr,
        dtype=settings.train.dtype,
        versions=", ".join(f"{name} {_version(name)}" for name in ("mixtral", "torch", "sentencepiece")),
        scores="\n".join(scores) or "| none | | | | | |",
        load=_load(Path(settings.output.folder)),
    )


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from source"


def _load(out: Path) -> str:
    rows = [row for row in metrics.read(out) if "max_violation" in row]
    if not rows:
        return ""
    last = rows[-1]
    return (
        f"\nLoad of the experts in the last step: MaxVio {last['max_violation']:.2f}, coefficient of variation "
        f"{last['load_cv']:.2f}, {last['dead_experts']} dead.\n"
    )
