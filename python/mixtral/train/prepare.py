"""What stands before a run: its tokenizer, its model, and what makes it the run that it is."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from ..errors import LoadError
from ..model import Config
from ..tokenizer import Tokenizer
from .model import Mixtral
from .parallel import Ranks
from .settings import ModelSettings, Settings
from .tokenizer_training import train_tokenizer, write_tokenizer
from .toml_tables import SettingsError

# Of [train], what changes no result: precision, length and data are what a run is, speed is not.
FREE = ("steps", "minutes", "tokens", "threads", "device", "recompute", "gradient_checkpointing")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.json")


def tokenizer_file(path: Path) -> Path:
    """The file of a tokenizer: itself, or the one in a folder.

    Raises:
        SettingsError: there is none.
    """
    candidates = [path / name for name in TOKENIZER_FILES] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise SettingsError(f"{path}: no tokenizer: expected a file, or a folder with {' or '.join(TOKENIZER_FILES)}")


def prepare_tokenizer(settings: Settings, texts: dict, source: Path, ranks: Ranks, resume: bool) -> Path:
    """The file of the tokenizer; trains one into the output folder when the configuration asks for it.

    Args:
        texts: of ``data.load_texts``.
        resume: take the one that the run trained.

    Raises:
        SettingsError: none is named, or there is too little text for a new one.
    """
    data, root = settings.data, source.parent
    if data.train_tokenizer is None:
        named = data.tokenizer or settings.model.from_
        if not named:
            raise SettingsError(f"{source}: name a tokenizer in data.tokenizer, or train one: data.train_tokenizer")
        return tokenizer_file(root / named)
    out = Path(settings.output.folder)
    if ranks.is_first and not resume:
        documents = [text for train, _ in texts.values() for text in train]
        if not documents:
            raise SettingsError(f"{source}: data.train_tokenizer needs text files: token files have no text")
        try:
            model = train_tokenizer(documents, data.train_tokenizer.vocab_size)
        except ValueError as error:
            raise SettingsError(f"{source}: data.train_tokenizer: {error}") from None
        write_tokenizer(out, model, settings.model.max_position or settings.train.context)
    ranks.wait()  # for the file
    return tokenizer_file(out / "tokenizer.model")


def build_model(settings: Settings, tokenizer: Tokenizer, source: Path) -> Mixtral:
    """A new model, or the one of ``model.from``, in training mode.

    Raises:
        SettingsError: sizes that do not fit each other, or a vocabulary that does not fit the tokenizer.
        LoadError: a damaged folder.
    """
    train = settings.train
    options: dict[str, Any] = {
        "dtype": train.dtype,
        "device": train.device,
        "router": settings.router,
        "recompute": train.recompute,
        "gradient_checkpointing": train.gradient_checkpointing,
    }
    if settings.model.from_:
        model = Mixtral.from_pretrained(source.parent / settings.model.from_, **options)
        config = model.config
    else:
        config = new_config(settings.model, train.context, tokenizer, source)
        model = Mixtral.from_config(config, seed=train.seed, **options)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        raise SettingsError(f"{source}: vocabulary mismatch: {sizes}: take the model's own tokenizer")
    if config.max_position < train.context:
        sizes = f"train.context {train.context} exceeds max_position {config.max_position} of the model"
        raise SettingsError(f"{source}: {sizes}")
    return model.train()


def new_config(sizes: ModelSettings, context: int, tokenizer: Tokenizer, source: Path) -> Config:
    """The architecture that [model] describes."""
    fields = {f.name: getattr(sizes, f.name) for f in dataclasses.fields(sizes) if f.name != "from_"}
    fields["vocab_size"] = sizes.vocab_size or tokenizer.vocab_size
    fields["max_position"] = sizes.max_position or context
    fields["num_kv_heads"] = sizes.num_kv_heads or sizes.num_heads
    fields["head_dim"] = sizes.head_dim or sizes.hidden_size // sizes.num_heads
    if not sizes.num_experts:
        fields["top_k"] = 0
    try:
        return Config(**fields, bos_token_id=tokenizer.bos_id, eos_token_ids=[tokenizer.eos_id])
    except (LoadError, ValueError) as error:
        raise SettingsError(f"{source}: [model]: {str(error).removeprefix('Config: ')}") from None


def run_identity(settings: Settings) -> dict[str, Any]:
    """The settings that a resumed run must share, as "section.key": value."""
    identity = {}
    for section in ("model", "router", "train", "data"):
        for key, value in dataclasses.asdict(getattr(settings, section)).items():
            if section == "train" and key in FREE or section == "data" and key == "domains":
                continue
            identity[f"{section}.{key.removesuffix('_')}"] = value
    for name, domain in settings.data.domains.items():
        identity[f"data.domains.{name}.weight"] = domain.weight
    return identity


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def round_weights(model: Mixtral, settings: Settings) -> bool:
    """Rounds the weights to what the output folder holds, in place; returns whether that may change a score."""
    wanted = settings.output.dtype
    if wanted in ("auto", settings.train.dtype) or wanted == "float32":
        return False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return True
