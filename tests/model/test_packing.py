"""Packed and quantised weights through the Python interface: what they are, and that packing changes no bit."""

import pytest
import torch

import mixtral
from checkpoints import random_model, save_consolidated
from conftest import int8_weight

LAYOUTS = ["hugging face v4 names", "hugging face v5 names", "consolidated", "shards"]
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
PROMPTS = [IDS[0, :25].tolist(), IDS[1, :3].tolist()]


def packable_model(dense: bool = False, **overrides):
    """In transformers: all sizes are multiples of 32."""
    settings = dict(intermediate_size=96, sliding_window=9, **({} if dense else dict(num_local_experts=4)))
    return random_model(dense, **{**settings, **overrides})


def save(model, folder, layout: str) -> None:
    if layout == "consolidated":
        save_consolidated(model, folder)
    elif layout == "shards":
        model.save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        model.save_pretrained(folder, save_original_format=layout == "hugging face v4 names")


def load(folder, dtype: str, pack: bool = True) -> mixtral.Mixtral:
    return mixtral.Mixtral.from_pretrained(folder, dtype=dtype, pack=pack)


def packed(weight: torch.Tensor, quantize: str | None = None) -> torch.Tensor:
    """[N, K] or [E, N, K] -> what the model keeps."""
    return torch.ops.mixtral.pack_weight(weight if weight.dim() == 3 else weight[None], quantize)


def unpacked(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.ops.mixtral.unpack_weight(weight).view_as(like)


def assert_same_results(a: mixtral.Mixtral, b: mixtral.Mixtral) -> None:
    """Equal bits of all logits, and equal tokens and log-probabilities, greedy and drawn."""
    assert torch.equal(a(IDS), b(IDS)) and a(IDS).isfinite().all()
    for temperature in (0.0, 1.0):
        options = dict(max_tokens=12, temperature=temperature, seed=1, logprobs=2, ignore_eos=True)
        for x, y in zip(a.generate(PROMPTS, **options), b.generate(PROMPTS, **options), strict=True):
            assert x.token_ids == y.token_ids and len(x.token_ids) == 12
            assert [token.logprob for token in x.logprobs] == [token.logprob for token in y.logprobs]


def assert_packed(model: mixtral.Mixtral, plain: dict[str, torch.Tensor], quantize: str | None = None) -> None:
    """Matrices are what pack_weight makes of ``plain``; whatever else there is has the values of ``plain``."""
    ours = model.named_parameters()
    assert ours.keys() == plain.keys()
    for name, weight in plain.items():
        if name.endswith(MATRICES):
            assert torch.equal(ours[name], packed(weight, quantize)), name
        else:
            assert torch.equal(ours[name], weight.to(ours[name].dtype)), name


@pytest.mark.parametrize("layout", [*LAYOUTS, "dense"])
def test_packed_weights_give_the_bits_of_plain_ones(layout, dtype, tmp_path):
    theirs = packable_model(dense=layout == "dense")
    save(theirs, tmp_path, layout)
    ours, plain = load(tmp_path, str(dtype).removeprefix("torch.")), load(tmp_path, dtype, pack=False)
    assert_same_results(ours, plain)
    assert_packed(ours, plain.named_parameters())
    gate_up = next(name for name in ours.named_parameters() if name.endswith("gate_up_proj"))
    weight = plain.named_parameters()[gate_up]
    assert torch.equal(unpacked(ours.named_parameters()[gate_up], weight), weight)
    if dtype == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", [*LAYOUTS, "dense"])
def test_int4_model_is_a_bfloat16_model_with_the_round_trip_of_its_matrices(layout, tmp_path):
    save(packable_model(dense=layout == "dense"), tmp_path, layout)
    ours, exact = load(tmp_path, "int4"), load(tmp_path, "float32", pack=False).named_parameters()
    assert (ours.weight_type, ours.dtype) == ("int4", torch.bfloat16)
    assert_packed(ours, exact, "int4")
    rounded = load(tmp_path, "bfloat16", pack=False)
    for name, weight in rounded.named_parameters().items():
        if name.endswith(MATRICES):
            weight.copy_(unpacked(packed(exact[name], "int4"), weight))
    assert_same_results(ours, rounded)


@pytest.mark.parametrize("layout", [*LAYOUTS, "dense"])
def test_int8_model_is_nearer_to_its_matrices_than_a_bfloat16_model_with_them(layout, tmp_path):
    save(packable_model(dense=layout == "dense"), tmp_path, layout)
    ours, rounded = load(tmp_path, "int8"), load(tmp_path, "bfloat16", pack=False)
    oracle = load(tmp_path, "float32", pack=False)
    assert (ours.weight_type, ours.dtype) == ("int8", torch.bfloat16)
    assert_packed(ours, oracle.named_parameters(), "int8")
    for name, weight in oracle.named_parameters().items():
        if name.endswith(MATRICES):
            weight.copy_(int8_weight(packed(weight, "int8")).view_as(weight))
            rounded.named_parameters()[name].copy_(weight)
    exact = oracle(IDS)
    assert (ours(IDS) - exact).norm() < (rounded(IDS) - exact).norm()
    assert torch.equal(ours(IDS[1:]), ours(IDS)[1:])


@pytest.mark.parametrize("layout", [*LAYOUTS, "dense"])
def test_fp8_model_rounds_its_matrices_and_what_meets_them(layout, tmp_path):
    save(packable_model(dense=layout == "dense"), tmp_path, layout)
    ours, exact = load(tmp_path, "fp8"), load(tmp_path, "float32", pack=False).named_parameters()
    assert (ours.weight_type, ours.dtype) == ("fp8", torch.bfloat16)
    assert_packed(ours, exact, "fp8")
    rounded = load(tmp_path, "bfloat16", pack=False)
    for name, weight in rounded.named_parameters().items():
        if name.endswith(MATRICES):
            weight.copy_(unpacked(ours.named_parameters()[name], weight))
    logits = ours(IDS)
    assert logits.isfinite().all() and not torch.equal(rounded(IDS), logits)
    assert torch.equal(ours(IDS[1:]), logits[1:])


def test_auto_packs_and_keeps_the_dtype_of_the_files(tmp_path):
    packable_model().to(torch.float16).save_pretrained(tmp_path)
    model = load(tmp_path, "auto")
    assert (model.weight_type, model.dtype) == ("float16", torch.float16)
    assert_packed(model, load(tmp_path, "auto", pack=False).named_parameters())


# ---- sizes that are no multiples of 32 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(hidden_size=80), "hidden_size 80"),
        (dict(intermediate_size=48), "intermediate_size 48"),
        (dict(num_attention_heads=3, num_key_value_heads=1), r"num_heads \* head_dim 48"),
        (dict(num_key_value_heads=1), r"num_kv_heads \* head_dim 16"),
    ],
    ids=["hidden", "intermediate", "heads", "kv_heads"],
)
def test_other_sizes_stay_plain_and_cannot_be_quantised(sizes, words, tmp_path):
    theirs = packable_model(**sizes)
    theirs.save_pretrained(tmp_path)
    ours, plain = load(tmp_path, "float32").named_parameters(), load(tmp_path, "float32", pack=False).named_parameters()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path, "float32")(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
    for dtype in ("int8", "fp8", "int4"):
        with pytest.raises(ValueError, match=f"dtype {dtype} needs sizes that are multiples of 32, got {words}"):
            load(tmp_path, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
@pytest.mark.parametrize("head", ["vocabulary of 101", "tied"])
def test_lm_head_alone_stays_plain(head, dtype, tmp_path):
    overrides = dict(vocab_size=101) if head == "vocabulary of 101" else dict(tie_word_embeddings=True)
    theirs = packable_model(**overrides)
    theirs.save_pretrained(tmp_path)
    ours, exact = load(tmp_path, dtype), load(tmp_path, "float32", pack=False).named_parameters()
    quantize = dtype if dtype == "int4" else None
    plain = load(tmp_path, "bfloat16", pack=False)
    parameters = ours.named_parameters()
    for name, weight in plain.named_parameters().items():
        if name == "lm_head" or not name.endswith(MATRICES):
            assert torch.equal(parameters[name], weight), name
        else:
            source = exact[name] if quantize else weight
            assert torch.equal(parameters[name], packed(source, quantize)), name
            weight.copy_(unpacked(parameters[name], weight))
    assert ("lm_head" in parameters) == (head != "tied")
    assert_same_results(ours, plain)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_cannot_be_quantised(value, tmp_path):
    theirs = packable_model()
    theirs.model.layers[1].self_attn.k_proj.weight.data[3, 5] = value
    theirs.save_pretrained(tmp_path)
    assert load(tmp_path, "bfloat16").weight_type == "bfloat16"
    with pytest.raises(mixtral.LoadError, match="must be finite to be quantised, got inf or NaN") as error:
        load(tmp_path, "int4")
    assert error.value.item == "model.layers.1.self_attn.k_proj.weight"
