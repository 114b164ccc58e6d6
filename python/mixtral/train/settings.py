"""Settings of the training commands, and what of them cannot be meant."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Literal

from .options import RouterOptions
from .toml_tables import SettingsError, parse, read_table


@dataclass
class ModelSettings:
    """[model]: the sizes of a new model, or the folder of one to continue from.

    ``from`` excludes the sizes. ``vocab_size`` 0 is the tokenizer's, ``head_dim`` 0 is hidden_size / num_heads,
    ``num_kv_heads`` 0 is num_heads, ``max_position`` 0 is the context of [train]. ``num_experts`` 0 is a dense model.
    """

    from_: str = ""
    hidden_size: int = 0
    intermediate_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    max_position: int = 0
    num_experts: int = 8
    top_k: int = 2
    renormalize: bool = True
    router_in_f32: bool = True
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    window: int = 0
    tie_word_embeddings: bool = False


@dataclass
class DomainSettings:
    """[data.domains.NAME]: one kind of text, and its share of the tokens.

    ``files`` are paths or globs, relative to the configuration: .jsonl with a document a line, .npy and .bin with token
    ids, anything else UTF-8 text. ``held_out`` are more of them, never trained on; ``held_out_share`` takes them evenly
    from ``files`` instead.
    """

    files: list[str] = field(default_factory=list)
    weight: float = 1.0
    held_out: list[str] = field(default_factory=list)
    held_out_share: float = 0.0


@dataclass
class TokenizerSettings:
    """[data] train_tokenizer: a SentencePiece BPE of the training documents."""

    vocab_size: int = 4096


@dataclass
class DataSettings:
    """[data]: the tokenizer, the domains, and the share of passkey documents.

    ``separator`` cuts text files into documents; "" makes each file one. ``token_type`` is that of .bin files.
    ``passkeys`` is a share of the tokens; ``passkey_weight`` multiplies the loss of the answer's digits;
    ``passkey_context`` is the longest of them, 0: the context of the step.
    """

    tokenizer: str = ""
    train_tokenizer: TokenizerSettings | None = None
    separator: str = ""
    text_field: str = "text"
    token_type: Literal["uint16", "uint32"] = "uint16"
    domains: dict[str, DomainSettings] = field(default_factory=dict)
    passkeys: float = 0.0
    passkey_weight: float = 5.0
    passkey_context: int = 0


@dataclass
class TrainSettings:
    """[train]: length of the run, optimizer, precision.

    Exactly one of ``steps``, ``minutes`` and ``tokens`` says when it ends; with ``minutes`` the schedule follows the
    clock, and no second run gives the same weights. ``warmup`` is a share of the run; the cosine ends at ``min_lr``.
    ``context`` is the longest document, in tokens; ``context_curriculum`` is a list of [share of the run, context] from
    which smaller ones hold. ``accumulation`` is the number of microbatches of a step; ranks share them; 0: one for each
    rank. ``optimizer`` "muon" takes the matrices of attention and experts; AdamW keeps the rest.
    """

    steps: int = 0
    minutes: float = 0.0
    tokens: int = 0
    tokens_per_step: int = 8192
    accumulation: int = 0
    context: int = 512
    context_curriculum: list[list[float]] = field(default_factory=list)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: float = 0.03
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: Literal["none", "act", "all"] = "act"
    gradient_checkpointing: bool = False
    threads: int = 0


@dataclass
class OutputSettings:
    """[output]: where the run goes, and how often it is saved and evaluated.

    ``checkpoint_every`` and ``evaluate_every`` count steps, 0: at the end alone. ``keep`` checkpoints stay.
    ``dtype`` is that of the weights in the final folder; "auto": that of the run. ``format`` names the tensors as
    transformers 5 ("huggingface") or 4 does, or as Mistral's own files. The rest is for the model card: ``card`` is a
    Markdown file to put into it, ``prompt`` the beginning of an example.
    """

    folder: str = ""
    checkpoint_every: int = 200
    keep: int = 2
    evaluate_every: int = 0
    log_every: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    format: Literal["huggingface", "huggingface_v4", "consolidated"] = "huggingface"
    title: str = "Mixtral"
    license: str = ""
    card: str = ""
    prompt: str = ""


@dataclass
class Settings:
    """The configuration of ``mixtral train``."""

    model: ModelSettings = field(default_factory=ModelSettings)
    router: RouterOptions = field(default_factory=RouterOptions)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    output: OutputSettings = field(default_factory=OutputSettings)


def read_settings(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Settings:
    """The configuration of ``mixtral train``, checked as a whole; files in it are relative to the file itself.

    Raises:
        SettingsError: what cannot be meant, with the key.
    """
    settings = parse(Settings, read_table(path, overrides), path)
    check_train(settings.train, path)
    _check_model(settings.model, path)
    _check_data(settings.data, path)
    if not settings.output.folder:
        raise SettingsError(f"{path}: output.folder is missing: name one, or give --out")
    if settings.output.keep < 1:
        raise SettingsError(f"{path}: output.keep must be at least 1, got {settings.output.keep}")
    return settings


def check_train(train: TrainSettings, source: str | PathLike[str]) -> None:
    """Raises SettingsError for values of [train] that no run can have."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise SettingsError(f"{source}: {message}")

    lengths = {name: getattr(train, name) for name in ("steps", "minutes", "tokens")}
    given = [name for name, value in lengths.items() if value]
    require(
        len(given) == 1, f"[train] needs exactly one of steps, minutes and tokens, got {' and '.join(given) or 'none'}"
    )
    for name in (*given, "tokens_per_step", "context", "lr", "eps", "clip"):
        require(getattr(train, name) > 0, f"train.{name} must be positive, got {getattr(train, name)}")
    require(train.accumulation >= 0, f"train.accumulation must not be negative, got {train.accumulation}")
    require(train.context >= 2, f"train.context must be at least 2, got {train.context}")
    require(0 <= train.min_lr <= train.lr, f"train.min_lr must be in [0, train.lr], got {train.min_lr}")
    require(0 <= train.warmup < 1, f"train.warmup is a share of the run, in [0, 1), got {train.warmup}")
    require(train.weight_decay >= 0, f"train.weight_decay must not be negative, got {train.weight_decay}")
    require(train.threads >= 0, f"train.threads must not be negative, got {train.threads}")
    require(
        len(train.betas) == 2 and all(0 <= b < 1 for b in train.betas),
        f"train.betas must be two numbers in [0, 1), got {train.betas}",
    )
    before = -1.0
    for stage in train.context_curriculum:
        require(
            len(stage) == 2 and before < stage[0] < 1 and stage[1] >= 2 and stage[1] == int(stage[1]),
            f"train.context_curriculum must be a list of [share of the run, context], rising, got {stage}",
        )
        require(stage[1] <= train.context, f"train.context_curriculum exceeds train.context {train.context}: {stage}")
        before = stage[0]
    require(
        train.tokens_per_step >= max(train.accumulation, 1) * 2,
        f"train.tokens_per_step {train.tokens_per_step} is too small for {train.accumulation} microbatches",
    )


def share_microbatches(train: TrainSettings, ranks: int) -> None:
    """One microbatch for each rank where ``accumulation`` does not say how many.

    Raises:
        SettingsError: the ranks cannot share them evenly.
    """
    train.accumulation = train.accumulation or ranks
    if train.accumulation % ranks:
        raise SettingsError(
            f"train.accumulation {train.accumulation} is not a multiple of the {ranks} ranks, which share microbatches"
        )


def _check_model(model: ModelSettings, source: str | PathLike[str]) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
    if model.from_:
        default = ModelSettings(from_=model.from_)
        given = [f.name for f in dataclasses.fields(model) if getattr(model, f.name) != getattr(default, f.name)]
        if given:
            raise SettingsError(f"{source}: model.from takes the sizes from its folder: remove {', '.join(given)}")
        return
    for name in sizes:
        if getattr(model, name) <= 0:
            raise SettingsError(f"{source}: model.{name} is missing; or give model.from, a folder to continue from")


def _check_data(data: DataSettings, source: str | PathLike[str]) -> None:
    if bool(data.tokenizer) and data.train_tokenizer is not None:
        raise SettingsError(f"{source}: data.tokenizer and data.train_tokenizer exclude each other")
    if not data.domains:
        raise SettingsError(f"{source}: no [data.domains.NAME]: name at least one, with files")
    for name, domain in data.domains.items():
        if not domain.files:
            raise SettingsError(f"{source}: data.domains.{name}.files is missing")
        if domain.weight <= 0:
            raise SettingsError(f"{source}: data.domains.{name}.weight must be positive, got {domain.weight}")
        if not 0 <= domain.held_out_share < 1:
            share = domain.held_out_share
            raise SettingsError(f"{source}: data.domains.{name}.held_out_share must be in [0, 1), got {share}")
        if domain.held_out and domain.held_out_share:
            raise SettingsError(f"{source}: data.domains.{name}: held_out and held_out_share exclude each other")
    if not 0 <= data.passkeys < 1:
        raise SettingsError(f"{source}: data.passkeys is a share of the tokens, in [0, 1), got {data.passkeys}")
    if data.passkey_context < 0:
        raise SettingsError(f"{source}: data.passkey_context must not be negative, got {data.passkey_context}")
    if data.passkey_weight <= 0:
        raise SettingsError(f"{source}: data.passkey_weight must be positive, got {data.passkey_weight}")
