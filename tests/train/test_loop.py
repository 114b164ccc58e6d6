"""The training loop: the same bits after an interruption, and what stops a run."""

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mixtral._C import Config
from mixtral.errors import LoadError
from mixtral.train import Batch, Mixtral, RouterOptions, checkpoint, loop, metrics
from mixtral.train.optimizer import Optimizer, learning_rate, sum_of_squares
from mixtral.train.settings import TrainSettings
from mixtral.train.toml_tables import SettingsError
from tiny_run import assert_same_run, run_tiny, settings, tensors_of

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
SIZES |= {"vocab_size": 40, "max_position": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4}


def tiny_model(router: RouterOptions | None = None, experts: int = 4, top_k: int = 2, **options: object) -> Mixtral:
    config = Config(**SIZES, num_experts=experts, top_k=top_k if experts else 0)
    return Mixtral.from_config(config, seed=0, router=router or RouterOptions(), **options)


def batches(microbatches: int = 1) -> Callable[[int, int], list[Batch]]:
    """Four random documents a step, shared by the microbatches."""

    def of_step(step: int, context: int) -> list[Batch]:
        rng = np.random.default_rng(step)
        documents = [rng.integers(3, 40, rng.integers(4, 20)).tolist() for _ in range(4)]
        return [Batch.from_documents(documents[i::microbatches]) for i in range(microbatches)]

    return of_step


def stopping(step: int, act: Callable[[], None]) -> loop.LossFunction:
    """The loss of training; before that of step number ``step``, ``act`` is called."""
    calls = 0

    def loss(model: nn.Module, batch: Batch, totals: object) -> tuple:
        nonlocal calls
        calls += 1
        if calls == step:
            act()
        return loop.train_loss(model, batch, totals)

    return loss


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("balance", "optimizer"), [("switch", "adamw"), ("loss_free", "adamw"), ("switch", "muon")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, balance: str, optimizer: str, dtype: str) -> None:
    """Also with jitter and expert dropout, whose random numbers are functions of the step."""
    router = RouterOptions(balance=balance, jitter=0.1, expert_dropout=0.1)
    run_tiny(tiny_model(router, dtype=dtype), batches(), settings(tmp_path / "whole", optimizer=optimizer))
    found = settings(tmp_path / "halves", optimizer=optimizer)
    interrupt = stopping(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    torch.manual_seed(7)
    assert run_tiny(tiny_model(router, dtype=dtype), batches(), found, loss_fn=interrupt).step == 4
    torch.manual_seed(8)
    assert run_tiny(tiny_model(router, dtype=dtype), batches(), found, resume=True).step == 6
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step(tmp_path: Path, number: int, status: int) -> None:
    before = signal.getsignal(number)
    stop = stopping(3, lambda: os.kill(os.getpid(), number))
    outcome = run_tiny(tiny_model(), batches(), settings(tmp_path), loss_fn=stop)
    assert (outcome.status, outcome.step) == (status, 3)
    assert checkpoint.load(checkpoint.paths(tmp_path)[-1])[1]["step"] == 3
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_tiny(tiny_model(), batches(), settings(tmp_path), loss_fn=stopping(4, twice))
    assert checkpoint.load(checkpoint.paths(tmp_path)[-1])[1]["step"] == 2


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(tmp_path: Path, value: float, place: str) -> None:
    model = tiny_model()

    def loss(model: nn.Module, batch: Batch, totals: object) -> tuple:
        losses, extra = loop.train_loss(model, batch, totals)
        if (tmp_path / "checkpoints" / "step-00000004.safetensors").exists():
            if place == "loss":
                losses = losses._replace(total=losses.total * value)
            else:
                losses.total.register_hook(lambda grad: grad * value)
        return losses, extra

    with pytest.raises(loop.TrainingError, match="step 5: .*(nan|inf).*last checkpoint is of step 4"):
        run_tiny(model, batches(), settings(tmp_path), loss_fn=loss)
    good = tensors_of(tmp_path)
    assert all(t.isfinite().all() for t in good.values())
    assert all(torch.equal(p, good[f"weight.{name}"]) for name, p in model.named_parameters())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The limit on the size of a file fails writes as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = stopping(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        with pytest.raises(
            checkpoint.WriteError, match="step 4: .*cannot be written: .*last good one is step-00000002"
        ):
            run_tiny(tiny_model(), batches(), settings(tmp_path), loss_fn=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()].count("step-00000002.safetensors") == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert checkpoint.load(checkpoint.paths(tmp_path)[-1])[1]["step"] == 2
    run_tiny(tiny_model(), batches(), settings(tmp_path / "whole"))
    run_tiny(tiny_model(), batches(), settings(tmp_path), resume=True)
    assert_same_run(tmp_path, tmp_path / "whole")


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    run_tiny(tiny_model(), batches(), settings(tmp_path, steps=9))
    names = [p.name for p in checkpoint.paths(tmp_path)]
    assert names == ["step-00000008.safetensors", "step-00000009.safetensors"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run_tiny(tiny_model(), batches(), settings(tmp_path))
    last = checkpoint.paths(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(
        LoadError, match="step-00000006.safetensors: not a checkpoint.*remove it to resume from the one before"
    ):
        run_tiny(tiny_model(), batches(), settings(tmp_path), resume=True)
    last.unlink()
    assert run_tiny(tiny_model(), batches(), settings(tmp_path), resume=True).step == 6


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no checkpoint to resume from"):
        run_tiny(tiny_model(), batches(), settings(tmp_path), resume=True)
    run_tiny(tiny_model(), batches(), settings(tmp_path, steps=2))
    with pytest.raises(SettingsError, match="holds a run already: --resume goes on with it"):
        run_tiny(tiny_model(), batches(), settings(tmp_path))
    with pytest.raises(SettingsError, match="of another model: .*mlp.gate"):
        run_tiny(tiny_model(experts=8), batches(), settings(tmp_path), resume=True)
    found = settings(tmp_path)
    with pytest.raises(SettingsError, match="of another run: seed was 0 and is 1; tokenizer was None and is abc"):
        loop.run(
            tiny_model(), batches(), found.train, found.output, identity={"seed": 1, "tokenizer": "abc"}, resume=True
        )


# --- accumulation and precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [4, 0])
def test_microbatches_add_up_to_the_step(tmp_path: Path, experts: int) -> None:
    """Balance over the whole step too: its product is formed of the sums of all microbatches."""
    router = RouterOptions(balance="global", balance_coefficient=0.5)
    for parts in (1, 4):
        found = settings(tmp_path / str(parts), accumulation=parts, steps=4)
        run_tiny(tiny_model(router, experts), batches(parts), found)
    one, four = tensors_of(tmp_path / "1"), tensors_of(tmp_path / "4")
    for name, tensor in one.items():
        if name.startswith("exp_avg."):  # linear in the gradients
            assert (four[name] - tensor).norm() <= 2e-5 * tensor.norm() + 1e-9, name
    for first, second in zip(metrics.read(tmp_path / "1"), metrics.read(tmp_path / "4"), strict=True):
        for name in ("loss", "cross_entropy", "balance", "z", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-5), name


@pytest.mark.parametrize("size", [(64, 40), (1, 1025), (3000,), (7, 333, 5)])
def test_bits_do_not_depend_on_threads(size: tuple[int, ...]) -> None:
    """Neither those of the norm nor those of AdamW."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            module = nn.Module()
            module.w = nn.Parameter(torch.randn(*size).repeat(50, *[1] * (len(size) - 1)))
            optimizer = Optimizer(module, TrainSettings(steps=1))
            for _ in range(3):
                module.w.grad = torch.randn_like(module.w)
                norm = optimizer.norm()
                optimizer.step(1e-3, norm)
            results.append((norm, module.w.detach().clone()))
    finally:
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_the_norm_is_that_of_torch() -> None:
    x = torch.randn(333, 1000)
    assert float(sum_of_squares(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-12)
    assert float(sum_of_squares(torch.zeros(0))) == 0


def test_the_optimizer_is_adamw_of_torch() -> None:
    """Matrices decay; norms and the embedding do not; the gradient is clipped."""
    model, other = tiny_model(), tiny_model()
    decayed = [p for n, p in other.named_parameters() if p.dim() > 1 and "embed" not in n]
    rest = [p for n, p in other.named_parameters() if p.dim() == 1 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    optimizer = Optimizer(model, TrainSettings(steps=1, clip=0.3))
    for step in range(3):
        for m in (model, other):
            m.loss(batches()(step, 0)[0]).total.backward()
        norm = optimizer.norm()
        expected = nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        assert norm == pytest.approx(float(expected), rel=1e-5)
        optimizer.step(1e-2, norm)
        reference.step()
        reference.zero_grad()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_what_a_step_is_too_small_for(tmp_path: Path) -> None:
    """Updates far below half an ulp of bfloat16 add up in the float32 masters."""
    model = tiny_model(dtype="bfloat16")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run_tiny(model, batches(), settings(tmp_path, lr=1e-6, min_lr=1e-6, steps=2, weight_decay=0.0))
    saved = tensors_of(tmp_path)
    moved = [n for n in before if not torch.equal(saved[f"weight.{n}"], before[n].float())]
    kept = [n for n, p in model.named_parameters() if p.dtype == torch.bfloat16 and torch.equal(p, before[n])]
    assert "model.norm.weight" in moved and "model.norm.weight" in kept
    for name, p in model.named_parameters():
        assert torch.equal(p, saved[f"weight.{name}"].to(p.dtype))


def test_only_parameters_with_a_gradient_are_trained_and_saved(tmp_path: Path) -> None:
    model = tiny_model()
    frozen = {n: p.requires_grad_("embed" in n).detach().clone() for n, p in model.named_parameters()}
    run_tiny(model, batches(), settings(tmp_path))
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, frozen[n])]
    assert changed == ["model.embed_tokens.weight"]
    assert {n.partition(".")[2] for n in tensors_of(tmp_path)} == set(changed)


# --- schedule and metrics ---------------------------------------------------------------------------------------------


def test_warmup_and_cosine() -> None:
    options = TrainSettings(lr=1.0, min_lr=0.1, warmup=0.1)
    assert [round(learning_rate(d, options), 6) for d in (0.05, 0.1, 0.55, 1.0, 1.1)] == [0.5, 1.0, 0.55, 0.1, 0.1]


def test_the_context_grows(tmp_path: Path) -> None:
    seen = []
    of_step = batches()

    def spy(step: int, context: int) -> list[Batch]:
        seen.append(context)
        return of_step(step, context)

    found = settings(tmp_path, steps=10, context=64, context_curriculum=[[0, 16], [0.5, 32], [0.8, 64]])
    run_tiny(tiny_model(), spy, found)
    assert seen == [16] * 5 + [32] * 3 + [64] * 2


def test_every_step_is_reported(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> dict:
        assert not model.training and not torch.is_grad_enabled()
        return {"x": {"bits_per_byte": 2.0, "xz_bits_per_byte": 3.0}}

    found = settings(tmp_path)
    found.output.evaluate_every = 4
    outcome = run_tiny(tiny_model(), batches(), found, evaluate=evaluate)
    rows = metrics.read(tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == set(
        "step tokens lr loss cross_entropy balance z grad_norm balance_sum max_logit load_cv max_violation "
        "max_load_share dead_experts seconds tokens_per_second flops_per_second memory_bytes".split()
    )
    first = steps[0]
    assert first["cross_entropy"] == pytest.approx(np.log(40), abs=0.1)
    assert first["loss"] == pytest.approx(
        first["cross_entropy"] + 1e-2 * first["balance"] + 1e-3 * first["z"], rel=1e-6
    )
    assert first["balance_sum"] == 2 * first["balance"]
    assert first["tokens"] == batches()(0, 0)[0].tokens
    assert [row["step"] for row in rows if "evaluation" in row] == [4, 6]
    assert outcome.scores == {"x": {"bits_per_byte": 2.0, "xz_bits_per_byte": 3.0}}
    assert (tmp_path / "loss.svg").read_text().startswith("<?xml")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("cross_entropy")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in board.Scalars("evaluation/x/bits_per_byte")] == [2.0, 2.0]


def test_expert_statistics() -> None:
    found = metrics.expert_statistics(torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0]]))
    assert found == {
        "load_cv": pytest.approx(np.sqrt(3) / 2),
        "max_violation": 3.0,
        "max_load_share": 1.0,
        "dead_experts": 3,
    }


def test_flops_count_the_chosen_experts() -> None:
    model = tiny_model()
    config = model.config
    embedding = config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    assert metrics.flops_per_token(model) == 6 * (config.active_parameters - embedding - norms)


def test_without_matplotlib_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(out: Path) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr(metrics, "draw", missing)
    assert run_tiny(tiny_model(), batches(), settings(tmp_path, steps=1)).status == 0
    assert "it needs matplotlib: pip install 'mixtral[train]'" in capsys.readouterr().err


def test_a_cut_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert metrics.read(tmp_path) == [{"step": 1}]
