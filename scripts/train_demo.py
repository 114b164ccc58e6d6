"""Trains the bundled demo model: a small Mixtral that writes English, from scratch, on a CPU.

    apt install bible-kjv bible-kjv-text sqlite3-doc
    python scripts/train_demo.py                         # 80 minutes, into models/demo
    python scripts/train_demo.py --steps 2000 --out /tmp/small
    python scripts/train_demo.py --resume                # go on after an interruption

The loop is plain PyTorch around transformers' MixtralForCausalLM. The load-balancing loss is taken per layer and
summed, as in Switch Transformers (transformers' own pools the layers, so that one may offset another). The output
folder always holds a complete model: files are written aside and renamed. With --steps a run can be repeated; with
--minutes the learning rate follows the clock. After a finished run, --resume only evaluates and writes the model card
again.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

# Before torch: on a shared machine, threads that spin while they wait waste most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from demo_data import (
    BOS,
    EOS,
    HELD_OUT_BOOKS,
    HELD_OUT_EVERY,
    Corpus,
    held_out_stream,
    load_corpora,
    package_versions,
    token_stream,
    tokenizer_json,
    train_tokenizer,
)

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "And it came to pass"

# Mixtral's own config.json, in its published form, with small numbers.
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "max_position_embeddings": 4096,
    "model_type": "mixtral",
    "num_attention_heads": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.02,
    "router_jitter_noise": 0.0,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 4096,
}

# The format of Mistral's first instruct models.
CHAT_TEMPLATE = (
    "{% set given = messages[0].role == 'system' %}{{ bos_token }}"
    "{% for message in (messages[1:] if given else messages) %}"
    "{% if message.role != ('user' if loop.index is odd else 'assistant') %}"
    "{{ raise_exception('user and assistant must speak in turn, after at most one system message') }}"
    "{% endif %}"
    "{% if message.role == 'user' %}"
    "{{ '[INST] ' + (messages[0].content + '\\n\\n' if given and loop.first else '') + message.content + ' [/INST]' }}"
    "{% else %}"
    "{{ ' ' + message.content + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)

TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 4096,
    "chat_template": CHAT_TEMPLATE,
}

CARD = """\
---
language: en
license: cc0-1.0
library_name: transformers
pipeline_tag: text-generation
---

# Mixtral demo

A Mixtral small enough to ship with the code, and trained: {total:.2f} M parameters, {active:.2f} M active per token.
{num_hidden_layers} layers, hidden size {hidden_size}, {num_attention_heads} query heads and {num_key_value_heads} \
key/value heads of {head_dim}, {num_local_experts} experts of intermediate size {intermediate_size},
top-{num_experts_per_tok}, sliding window {sliding_window}, own SentencePiece BPE vocabulary of {vocab_size}. \
Architecture, tensor names and kind of tokenizer
are those of Mixtral 8x7B. It is for tests, examples and a first run without a download.

{sample}

(greedy, prompt "{prompt}")

## Training

| domain | Debian package | training bytes | held-out bytes | sha256 of the text |
|---|---|---|---|---|
{sources}

`bible` is the King James Bible, a document per chapter; `sqlite` is the SQLite documentation, a document per page,
stripped of HTML. Held out, and never trained on: {books}, and every {every}th page of the documentation. Paragraphs
that occur twice in the documentation were kept once; Luke retells much that Matthew and Mark tell, so its score
flatters a little. The texts are in the public domain.

{step:,} steps, {tokens:,} tokens drawn in equal parts from the two domains, {seconds:,.0f} seconds on {cores} virtual
CPU cores ({machine}) shared with other work. Documents begin with BOS and end with EOS. Context {context} tokens at
the end, longer than the window. PyTorch {torch}, transformers {transformers}, sentencepiece {sentencepiece}.
To train another: `scripts/train_demo.py`.

## Evaluation

On the held-out text, with the bfloat16 weights computed in float32:

| domain | bits per byte | perplexity per token | tokens | bytes |
|---|---|---|---|---|
{scores}

Share of the routed tokens that one expert of one layer gets, both domains in equal parts: {least:.3f} to {most:.3f}
(perfectly even: {even:.3f}). Within one domain: {domain_least:.3f} to {domain_most:.3f}; experts specialise.

## Limits

It continues text in the manner of its two sources. It knows no facts, follows no instructions, holds no conversation,
writes English only, and what it says of the Bible or of SQLite is often wrong. Nothing it writes is scripture or
documentation. It sees at most some hundred words back. Speed and memory measured with it say little about Mixtral 8x7B.

## Licence

Weights and tokenizer: CC0 1.0.
"""


# --- model ----------------------------------------------------------------------------------------------------------


def sample_batch(streams: list[Tensor], rows: int, context: int) -> Tensor:
    """[rows, context + 1]: windows at random places, the same number from every domain."""
    windows = []
    for row in range(rows):
        stream = streams[row % len(streams)]
        start = int(torch.randint(len(stream) - context, ()))
        windows.append(stream[start : start + context + 1])
    return torch.stack(windows)


def build_model() -> MixtralForCausalLM:
    """A freshly initialised model; grouped_mm was the fastest experts implementation on the CPU, in bfloat16."""
    config = MixtralConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})
    model = MixtralForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    return model


def active_parameters(model: MixtralForCausalLM) -> int:
    """Parameters that take part in one token: all, less the experts that are not chosen."""
    c = model.config
    expert = 3 * c.hidden_size * c.intermediate_size
    idle = c.num_hidden_layers * (c.num_local_experts - c.num_experts_per_tok) * expert
    return sum(p.numel() for p in model.parameters()) - idle


def losses(model: MixtralForCausalLM, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy per token in nats, and the load-balancing loss summed over layers (layers x top-k when even)."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
    c = model.config
    experts, top_k = c.num_local_experts, c.num_experts_per_tok
    balance = [load_balancing_loss_func((router.float(),), experts, top_k) for router in out.router_logits]
    cross_entropy = F.cross_entropy(out.logits.float().flatten(0, 1), batch[:, 1:].flatten())
    return cross_entropy, torch.stack(balance).sum()


def learning_rate(progress: float, peak: float, warmup: float = 0.02, floor: float = 0.03) -> float:
    """Linear warm-up, then a cosine down to `floor` of the peak; progress runs from 0 to 1."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))))


def optimizer_for(model: MixtralForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; norms and embeddings without weight decay."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed_tokens" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


# --- evaluation --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model: MixtralForCausalLM, stream: Tensor, size: int, limit: int | None = None) -> dict:
    """Bits per byte and perplexity of held-out text, and the share of tokens each expert gets, per layer.

    Windows of 1024 tokens overlap by 256, so that nearly every token is scored with its whole context. The loss of BOS
    is left out; the loss of EOS is counted.
    """
    window, overlap = 1024, 256
    c = model.config
    model.eval()
    nats, tokens, load = 0.0, 0, torch.zeros(c.num_hidden_layers, c.num_local_experts)
    starts = range(0, len(stream) - 1, window - overlap)
    for number, start in enumerate(starts[:limit]):
        ids = stream[start : start + window + 1]
        first = 0 if number == 0 else overlap
        if len(ids) <= first + 1:
            break
        out = model(input_ids=ids[None, :-1], use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(out.logits[0, first:].float(), ids[first + 1 :], reduction="none")
        scored = ids[first + 1 :] != BOS
        nats, tokens = nats + float(loss[scored].sum()), tokens + int(scored.sum())
        for layer, router in enumerate(out.router_logits):
            chosen = router.float().topk(c.num_experts_per_tok, dim=-1).indices.flatten()
            load[layer] += torch.bincount(chosen, minlength=c.num_local_experts)
    model.train()
    size = round(size * tokens / int((stream[1:] != BOS).sum()))  # of the part that was scored
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / tokens),
        "tokens": tokens,
        "bytes": size,
        "load": (load / load.sum(-1, keepdim=True)).tolist(),
    }


@torch.inference_mode()
def sample(model: MixtralForCausalLM, tokenizer: sentencepiece.SentencePieceProcessor, tokens: int = 60) -> str:
    """A greedy continuation of the prompt."""
    model.eval()
    ids = torch.tensor([[BOS, *tokenizer.encode(PROMPT)]])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=EOS)
    model.train()
    return tokenizer.decode(out[0].tolist())


# --- output ------------------------------------------------------------------------------------------------------


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file aside and renames it, so that a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_model(model: MixtralForCausalLM, tokenizer: bytes, out: Path) -> None:
    """The folder a user loads: bfloat16 weights under the published tensor names, configuration, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        replace_file(out / "model.safetensors", (Path(folder) / "model.safetensors").read_bytes())
    generation = {"bos_token_id": BOS, "eos_token_id": EOS}
    for name, content in (
        ("config", CONFIG),
        ("generation_config", generation),
        ("tokenizer_config", TOKENIZER_CONFIG),
    ):
        replace_file(out / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())
    replace_file(out / "tokenizer.model", tokenizer)
    replace_file(out / "tokenizer.json", tokenizer_json(sentencepiece.SentencePieceProcessor(model_proto=tokenizer)))


def load_saved(out: Path) -> MixtralForCausalLM:
    """The model as a user gets it: the bfloat16 weights, computed with in float32."""
    model = MixtralForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    return model


def write_card(out: Path, corpora: list[Corpus], results: dict[str, dict], text: str, state: dict) -> None:
    """The model card, README.md: what it is, where it comes from, how good it is."""
    model = load_saved(out)
    packages = package_versions()
    package = {"bible": "bible-kjv-text", "sqlite": "sqlite3-doc"}
    sources = []
    for c in corpora:
        sizes = (sum(len(d.text.encode()) for d in split) for split in (c.train, c.held_out))
        cells = (f"{package[c.name]} {packages[package[c.name]]}", *(f"{size:,}" for size in sizes), f"`{c.sha256()}`")
        sources.append(f"| {c.name} | " + " | ".join(cells) + " |")
    scores = [
        f"| {name} | {r['bits_per_byte']:.3f} | {r['perplexity']:.2f} | {r['tokens']:,} | {r['bytes']:,} |"
        for name, r in results.items()
    ]
    load = torch.tensor([r["load"] for r in results.values()])  # [domains, layers, experts]
    mixed = load.mean(0)
    card = CARD.format(
        **CONFIG,
        total=sum(p.numel() for p in model.parameters()) / 1e6,
        active=active_parameters(model) / 1e6,
        sample="\n".join(f"> {line}".rstrip() for line in text.splitlines()),
        prompt=PROMPT,
        sources="\n".join(sources),
        books=" and ".join(HELD_OUT_BOOKS),
        every=HELD_OUT_EVERY,
        **state,
        cores=os.cpu_count(),
        machine=platform.machine(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        sentencepiece=sentencepiece.__version__,
        scores="\n".join(scores),
        least=float(mixed.min()),
        most=float(mixed.max()),
        domain_least=float(load.min()),
        domain_most=float(load.max()),
        even=1 / CONFIG["num_local_experts"],
    )
    replace_file(out / "README.md", card.encode())


# --- training ----------------------------------------------------------------------------------------------------


def save_state(path: Path, **state: object) -> None:
    """All that --resume needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=80.0, help="train for this long (default 80)")
    length.add_argument("--steps", type=int, help="train for this many steps instead")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "demo", help="model folder to write")
    parser.add_argument(
        "--state", type=Path, default=ROOT / "build" / "train_demo.pt", help="where --resume starts from"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument(
        "--context", type=int, default=256, help="context length; doubled for the last fifth of the run"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between saves")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers.logging.set_verbosity_error()

    corpora = load_corpora()
    model = build_model()
    optimizer = optimizer_for(model, args)
    progress = {"step": 0, "tokens": 0, "seconds": 0.0, "context": args.context}
    if args.resume:
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        progress, tokenizer_model = state["progress"], state["tokenizer"]
    else:
        tokenizer_model = train_tokenizer(corpora, CONFIG["vocab_size"])
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    streams = [token_stream(c, tokenizer, args.seed) for c in corpora]
    held_out = {c.name: held_out_stream(c, tokenizer) for c in corpora}
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{total:,} parameters, {active_parameters(model):,} active; tokens: "
        + ", ".join(f"{c.name} {len(s):,}" for c, s in zip(corpora, streams, strict=True)),
        flush=True,
    )

    def save() -> None:
        save_model(model, tokenizer_model, args.out)
        save_state(
            args.state,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            rng=torch.get_rng_state(),
            progress=progress,
            tokenizer=tokenizer_model,
        )

    model.train()
    mean_loss, last_print, last_save = 0.0, time.monotonic(), time.monotonic() - args.save_every + 60
    tokens_at_print = progress["tokens"]
    interrupted = False
    try:
        while True:
            done = progress["step"] / args.steps if args.steps else progress["seconds"] / (60 * args.minutes)
            if done >= 1:
                break
            began = time.monotonic()
            progress["context"] = args.context * (2 if done > 0.8 else 1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, args.lr)
            batch = sample_batch(streams, args.tokens // progress["context"], progress["context"])
            cross_entropy, balance = losses(model, batch)
            (cross_entropy + model.config.router_aux_loss_coef * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now = time.monotonic()
            progress["step"] += 1
            progress["tokens"] += args.tokens // progress["context"] * progress["context"]
            progress["seconds"] += now - began
            mean_loss = cross_entropy.item() if not mean_loss else 0.95 * mean_loss + 0.05 * cross_entropy.item()

            if now - last_print > 15:
                rate = (progress["tokens"] - tokens_at_print) / (now - last_print)
                print(
                    f"{done:6.1%} step {progress['step']:5d}  loss {mean_loss:.3f}  balance {balance.item():.3f}  "
                    f"lr {learning_rate(done, args.lr):.2e}  {rate:,.0f} tokens/s",
                    flush=True,
                )
                last_print, tokens_at_print = now, progress["tokens"]
            if now - last_save > args.save_every:
                save()
                scores = {n: evaluate(model, s, b, limit=16) for n, (s, b) in held_out.items()}
                print(
                    "  saved; held-out bits per byte, part: "
                    + ", ".join(f"{n} {r['bits_per_byte']:.3f}" for n, r in scores.items()),
                    flush=True,
                )
                last_save = last_print = time.monotonic()
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: saving", flush=True)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    save()
    final = load_saved(args.out)
    results = {n: evaluate(final, s, b) for n, (s, b) in held_out.items()}
    text = sample(final, tokenizer)
    write_card(args.out, corpora, results, text, progress)
    for name, r in results.items():
        print(
            f"{name}: {r['bits_per_byte']:.4f} bits per byte, perplexity {r['perplexity']:.2f}; expert load per layer:"
        )
        for layer in r["load"]:
            print("   " + " ".join(f"{share:.3f}" for share in layer))
    print(text)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
