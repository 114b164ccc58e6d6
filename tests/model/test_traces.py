"""Traces of the routing: against transformers, and that they depend on nothing but the tokens; replay; the file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixtral
from checkpoints import TINY, random_model
from python_models import demo_model, tiny_config, tiny_model

TEXTS = ["And it came to pass in those days, that there went out a decree.", "1 + 1 = 2", "def f(self): return self.x"]
# Experts, top-k, window; 0.2 is the spread of the weights, so near ties are rare.
SHAPES = [(1, 1, None), (2, 1, 5), (4, 4, 7), (8, 2, None), (16, 3, 9)]


def documents(count: int, longest: int, vocab: int = TINY["vocab_size"]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def same(a: mixtral.Trace, b: mixtral.Trace) -> bool:
    tensors = [(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in tensors)


@pytest.mark.parametrize(("experts", "top_k", "window"), SHAPES)
def test_experts_are_those_of_transformers_for_every_token(experts, top_k, window, tmp_path, device):
    theirs = random_model(num_local_experts=experts, num_experts_per_tok=top_k, sliding_window=window)
    theirs.save_pretrained(tmp_path)
    ours = mixtral.Mixtral.from_pretrained(tmp_path, device=device, dtype="float32")
    input_ids = torch.randint(3, TINY["vocab_size"], (3, 50), generator=torch.Generator().manual_seed(1))
    trace = ours.trace(input_ids.tolist(), logits=True, chunk_size=37)
    gates = [layer.mlp.gate for layer in theirs.model.layers]
    inputs = []  # of each router, [N, H]
    for gate in gates:
        gate.register_forward_hook(lambda gate, args, output: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        output = theirs(input_ids, output_router_logits=True)
    logits = torch.stack(output.router_logits, 1)  # [N, L, E]
    # A stable sort: ties to the smaller id.
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    assert trace.topk_ids.shape == (150, 2, top_k)
    assert torch.equal(trace.topk_ids.long(), expected)
    weights = logits.gather(-1, expected).softmax(-1)
    torch.testing.assert_close(trace.topk_weights.float(), weights, atol=1e-3, rtol=0)
    torch.testing.assert_close(trace.router_logits.float(), logits, atol=1e-4, rtol=1e-3)
    early = (inputs[0] @ gates[1].weight.T).sort(dim=-1, descending=True, stable=True).indices[:, None, :top_k]
    assert torch.equal(trace.next_gate_ids.long(), early)
    assert torch.equal(trace.predicted_ids.long(), output.logits.argmax(-1).flatten())
    assert torch.equal(trace.token_ids.long(), input_ids.flatten())
    assert torch.equal(trace.positions.long(), torch.arange(50).repeat(3))
    assert torch.equal(trace.docs.long(), torch.arange(3).repeat_interleave(50))


def biased_model(*favourites: int) -> mixtral.Mixtral:
    """Whose every router chooses these experts, whatever the token."""
    model = mixtral.Mixtral.from_config(tiny_config(select_bias=True))
    for name, parameter in model.named_parameters().items():
        if name.endswith("select_bias"):
            parameter[list(favourites)] = 2  # above any probability
    return model


def test_an_expert_bias_decides_what_the_next_gate_would_choose():
    trace = biased_model(1, 3).trace(documents(4, 30), logits=True)
    assert torch.equal(trace.topk_ids.sort(-1).values.unique(dim=0), torch.tensor([[[1, 3], [1, 3]]]))
    assert torch.equal(trace.next_gate_ids.sort(-1).values.unique(dim=0), torch.tensor([[[1, 3]]]))


def test_a_tie_goes_to_the_smaller_id():
    model = mixtral.Mixtral.from_config(tiny_config())
    for name, parameter in model.named_parameters().items():
        if name.endswith("router"):
            parameter.zero_()
    assert torch.equal(model.trace([5, 6, 7]).topk_ids, torch.tensor([0, 1]).expand(3, 2, 2))


def test_neither_chunks_nor_neighbours_change_a_bit(device):
    model = mixtral.Mixtral.from_config(tiny_config(), device=device)
    batch = documents(90, 40)  # more than fit one pass
    whole = model.trace(batch, logits=True)
    if device == "cpu":
        assert all(same(model.trace(batch, logits=True, chunk_size=size), whole) for size in (1, 7, 64))
        alone = [model.trace(ids, logits=True) for ids in batch]
        for name in ("topk_ids", "topk_weights", "router_logits", "next_gate_ids", "predicted_ids", "positions"):
            assert torch.equal(torch.cat([getattr(trace, name) for trace in alone]), getattr(whole, name))
    else:
        assert torch.equal(whole.docs, model.trace(batch, chunk_size=7).docs)


def test_the_rows_of_a_text_are_its_tokens_behind_bos():
    model = demo_model()
    trace = model.trace(TEXTS, domains=["prose", "mathematics", "code"])
    ids = [model.tokenizer.encode(text, add_bos=True) for text in TEXTS]
    assert trace.token_ids.tolist() == sum(ids, [])
    assert trace.special.tolist() == [token == model.tokenizer.bos_id for token in sum(ids, [])]
    assert trace.domain_names == ["prose", "mathematics", "code"]
    assert torch.equal(trace.domains.int(), trace.docs)
    assert len(trace) == len(trace.token_ids) and "3 documents" in repr(trace)
    one_domain = model.trace(TEXTS, domains=["a", "b", "a"])
    assert one_domain.domain_names == ["a", "b"] and one_domain.domains.unique().tolist() == [0, 1]


def test_a_long_text_is_cut_into_sequences_of_one_document():
    model = demo_model()
    trace = model.trace([TEXTS[0], "Once"], ctx_size=6)
    begins = trace.positions == 0
    assert (trace.token_ids[begins] == model.tokenizer.bos_id).all() and begins.sum() > 2
    assert torch.equal(trace.special, begins) and trace.positions.max() == 5
    assert trace.token_ids[begins.logical_not() & (trace.docs == 0)].tolist() == model.tokenizer.encode(TEXTS[0])


def test_progress_counts_tokens_and_may_end_the_work():
    seen = []
    tiny_model().trace(documents(9, 20), chunk_size=16, progress=lambda done, total: seen.append((done, total)))
    total = seen[-1][1]
    assert [done for done, _ in seen] == [*range(16, total, 16), total]

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_model().trace(documents(9, 20), progress=interrupt)


# ---- another k ----


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_another_number_of_experts_is_that_of_transformers(top_k, tmp_path):
    theirs = random_model(num_local_experts=4, num_experts_per_tok=2)
    theirs.save_pretrained(tmp_path)
    ours = mixtral.Mixtral.from_pretrained(tmp_path, dtype="float32")
    trace = ours.trace(documents(4, 30), experts_per_token=top_k)
    changed = mixtral.Mixtral.from_pretrained(tmp_path, dtype="float32")  # of the config
    assert changed.trace(documents(4, 30)).topk_ids.shape[2] == 2
    for layer in theirs.model.layers:
        layer.mlp.gate.top_k = top_k
    for doc, ids in enumerate(documents(4, 30)):
        with torch.no_grad():
            output = theirs(torch.tensor([ids]), output_router_logits=True)
        expected = torch.stack(output.router_logits, 1).topk(top_k).indices
        assert torch.equal(trace.topk_ids[trace.docs == doc].long(), expected)


# ---- replay ----


def test_replay_gives_the_logits_of_the_traced_run_bit_for_bit(device):
    model = mixtral.Mixtral.from_config(tiny_config(), device=device, dtype="bfloat16")
    ids = [torch.arange(3, 43).tolist(), torch.arange(50, 90).tolist()]
    logits = model(torch.tensor(ids)).cpu().flatten(0, 1)
    replayed = model.replay(model.trace(ids))
    if device == "cpu":
        assert torch.equal(replayed, logits)
        assert torch.equal(model.replay(model.trace(ids), chunk_size=9), logits)
    else:
        torch.testing.assert_close(replayed, logits, atol=1e-2, rtol=0)


def test_one_altered_expert_changes_the_logits_behind_it():
    model = tiny_model()
    trace = model.trace([list(range(3, 33)), [5, 6]])
    whole = model.replay(trace)
    unused = next(e for e in range(4) if e not in trace.topk_ids[20, 1])
    trace.topk_ids[20, 1, 0] = unused
    altered = model.replay(trace)
    changed = (altered != whole).any(1)
    assert changed.nonzero().flatten().tolist() == [20]  # the last layer: no later token sees it
    trace.topk_ids[10, 0, 0] = next(e for e in range(4) if e not in trace.topk_ids[10, 0])
    changed = (model.replay(trace) != whole).any(1)
    assert changed[10:18].all() and not changed[:10].any() and not changed[30:].any()


def test_replayed_experts_compute_what_masked_routers_would():
    """The weights of experts that the router would not choose: its softmax over them."""
    model = mixtral.Mixtral.from_config(tiny_config(num_experts=3, top_k=1, renormalize=False))
    ids = list(range(3, 20))
    trace = model.trace(ids, logits=True)
    trace.topk_ids[:] = 2
    replayed = model.replay(trace)
    forced = mixtral.Mixtral.from_config(tiny_config(num_experts=3, top_k=1, renormalize=False))
    for name, weight in forced.named_parameters().items():
        if "gate_up_proj" in name or "down_proj" in name:
            weight.copy_(weight[2:3].expand_as(weight))  # every expert is the third
    free = forced.trace(ids)
    assert not torch.equal(replayed, forced(torch.tensor([ids]))[0])  # the weights are of other experts
    # In the first layer both models see the same; the weight of the third expert is its softmax.
    share = trace.router_logits[:, 0].float().softmax(-1)
    assert (share.gather(1, free.topk_ids[:, 0].long()) >= share[:, 2:]).all()


def test_replayed_experts_have_the_weights_of_a_biased_router_that_chose_them():
    model, other, ids = biased_model(1, 3), biased_model(0, 2), list(range(3, 33))
    trace = model.trace(ids)
    assert torch.equal(model.replay(trace), model(torch.tensor([ids]))[0])
    trace.topk_ids.copy_(other.trace(ids).topk_ids)
    torch.testing.assert_close(model.replay(trace), other(torch.tensor([ids]))[0], atol=1e-5, rtol=1e-5)


def test_traces_with_another_number_of_experts_replay():
    model = tiny_model()
    trace = model.trace(list(range(3, 33)), experts_per_token=3)
    two = model.replay(model.trace(list(range(3, 33))))
    three = model.replay(trace)
    assert trace.topk_ids.shape == (30, 2, 3) and not torch.equal(two, three)


# ---- the file ----


def test_the_file_holds_the_tensors_and_the_metadata(tmp_path):
    model = demo_model()
    trace = model.trace(TEXTS, domains=["prose", "mathematics", "code"], logits=True)
    path = tmp_path / "trace.safetensors"
    path.write_bytes(b"older")
    trace.save(path)
    tensors = load_file(path)
    n, layers, experts = len(trace), model.config.num_layers, model.config.num_experts
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        **{name: (torch.int32, (n,)) for name in ("token_id", "predicted_id", "position", "doc")},
        **{name: (torch.uint8, (n,)) for name in ("domain", "special")},
        "topk_ids": (torch.uint8, (n, layers, 2)),
        "topk_weights": (torch.float16, (n, layers, 2)),
        "router_logits": (torch.float16, (n, layers, experts)),
        "next_gate_ids": (torch.uint8, (n, layers - 1, 2)),
    }
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        assert np.array_equal(file.get_tensor("topk_ids"), np.asarray(trace.topk_ids))
    assert json.loads(metadata["domains"]) == trace.domain_names
    assert (metadata["version"], metadata["top_k"], metadata["num_experts"]) == ("1", "2", str(experts))
    assert metadata["model"] == trace.model and metadata["tokenizer"] == trace.tokenizer
    assert same(mixtral.Trace.load(path), trace)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.safetensors"]


def test_a_file_without_logits_is_read_too(tmp_path):
    trace = tiny_model().trace([3, 4, 5])
    trace.save(tmp_path / "t")
    assert trace.router_logits is None and trace.next_gate_ids is None
    assert same(mixtral.Trace.load(tmp_path / "t"), trace)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="cannot be written"):
        tiny_model().trace([3, 4, 5]).save(tmp_path / "none" / "t")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(RuntimeError, match="folder: cannot be written"):
        tiny_model().trace([3, 4, 5]).save(tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def spoiled(path, **changes) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, change in changes.items():
        if name in metadata:
            metadata[name] = change
        else:
            tensors[name] = change(tensors[name])
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="weights"), "is no trace"),
        (dict(version="2"), "version: must be 1, got 2"),
        (dict(domains="{}"), "domains: must be a list of names"),
        (dict(domains='["a"'), "domains|JSON|json"),
        (dict(num_experts="x"), "num_experts: must be a number"),
        (dict(num_experts="2"), "topk_ids: must be below num_experts, 2"),
        (dict(token_id=lambda t: None), "token_id: is missing"),
        (dict(doc=lambda t: t[1:].clone()), "doc: has another type or shape"),
        (dict(topk_weights=lambda t: t.float()), "topk_weights: has another type or shape"),
        (dict(topk_ids=lambda t: t[0].clone()), r"topk_ids: must be \[N, L, K\]"),
        (dict(domain=lambda t: t + 1), "domain: must be below the number of domains, 1"),
    ],
)
def test_wrong_files_are_load_errors(changes, message, tmp_path):
    path = tmp_path / "t"
    tiny_model().trace([3, 4, 5, 6, 7, 8]).save(path)
    spoiled(path, **changes)
    with pytest.raises(mixtral.LoadError, match=message):
        mixtral.Trace.load(path)


@pytest.mark.parametrize("shape", [(2**40, 1, 0), (2**40, 0, 1), (0, 1, 1)])
def test_sizes_without_data_are_a_load_error(shape, tmp_path):
    metadata = {"kind": "mixtral routing trace", "version": "1", "domains": '["text"]', "num_experts": "4"}
    header = {"__metadata__": metadata, "topk_ids": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(mixtral.LoadError, match="topk_ids: must have at least one|token_id: is missing"):
        mixtral.Trace.load(tmp_path / "t")


def test_a_truncated_file_is_a_load_error(tmp_path):
    path = tmp_path / "t"
    tiny_model().trace([3, 4, 5]).save(path)
    data = path.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(mixtral.LoadError):
            mixtral.Trace.load(path)


# ---- errors ----


def test_wrong_arguments_are_value_errors():
    model = tiny_model()
    with pytest.raises(ValueError, match="document 1 must not be empty"):
        model.trace([[3], []])
    with pytest.raises(ValueError, match="at least one sequence"):
        model.trace([])
    with pytest.raises(ValueError, match="document 0 must fit the context of 512 tokens, got 513"):
        model.trace([5] * 513)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 96\), got 96"):
        model.trace([96])
    with pytest.raises(ValueError, match="domains must be one name for each of 1"):
        model.trace([3], domains=["a", "b"])
    with pytest.raises(ValueError, match=r"ctx_size must be in \[2, 512\], got 1"):
        model.trace([3], ctx_size=1)
    with pytest.raises(ValueError, match="chunk_size must be > 0, got 0"):
        model.trace([3], chunk_size=0)
    for wrong in (0, -1, 5):
        with pytest.raises(ValueError, match=f"experts_per_token must be .*, got {wrong}"):
            model.trace([3], experts_per_token=wrong)
    dense = mixtral.Mixtral.from_config(tiny_config(num_experts=0, top_k=0))
    with pytest.raises(ValueError, match="the model has no experts"):
        dense.trace([3])


def test_replay_refuses_a_trace_of_another_model_or_one_that_does_not_fit():
    trace = tiny_model().trace([3, 4, 5])
    other = mixtral.Mixtral.from_config(tiny_config(), seed=1)
    with pytest.raises(ValueError, match="another model"):
        other.replay(trace)
    with pytest.raises(ValueError, match="token_ids must have the shape"):
        tiny_model().replay(replace(trace, token_ids=trace.token_ids[:2]))
    with pytest.raises(ValueError, match="position must count from 0"):
        tiny_model().replay(replace(trace, positions=trace.positions + 1))
    trace.topk_ids[0] = 9
    with pytest.raises(ValueError, match="topk_ids must be below 4, got 9"):
        tiny_model().replay(trace)
