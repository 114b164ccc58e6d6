"""The Python interface: loading, logits, tokenizer; what a user calls, and what they see when a call is wrong."""

import os
import shutil
import threading
import time

import pytest
import torch

import mixtral
from python_models import DEMO, demo_model, tiny_config, tiny_model


@pytest.fixture
def demo() -> mixtral.Mixtral:
    return demo_model()


@pytest.fixture
def tiny() -> mixtral.Mixtral:
    return tiny_model()


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_from_pretrained_reads_device_dtype_and_config(demo):
    assert (demo.device, demo.dtype) == (torch.device("cpu"), torch.float32)
    assert (demo.config.num_experts, demo.config.top_k, demo.config.window) == (8, 2, 128)
    assert demo.config.active_parameters < demo.config.total_parameters
    assert demo.config.total_parameters == sum(p.numel() for p in demo.named_parameters().values())


def test_dtype_auto_is_the_dtype_of_the_files():
    assert mixtral.Mixtral.from_pretrained(str(DEMO)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_dtype_and_device_are_names_or_torch_objects(dtype, device):
    assert mixtral.Mixtral.from_config(tiny_config(), device=device, dtype=dtype).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["int3", "half", torch.float64])
def test_unknown_dtype_is_a_value_error(dtype):
    name = str(dtype).removeprefix("torch.")
    message = f"dtype must be auto, float32, bfloat16, float16, int8, fp8 or int4, got {name}"
    with pytest.raises(ValueError, match=message):
        mixtral.Mixtral.from_pretrained(DEMO, dtype=dtype)


def test_progress_ends_at_the_size_of_the_weights():
    calls = []
    mixtral.Mixtral.from_pretrained(DEMO, progress=lambda done, total: calls.append((done, total)))
    done, total = calls[-1]
    assert done == total > 0
    assert calls == sorted(calls)


def test_an_error_in_progress_reaches_the_caller():
    def fail(done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mixtral.Mixtral.from_pretrained(DEMO, progress=fail)


def test_load_error_has_file_item_and_reason(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_local_experts": 8', '"num_local_experts": -8'))
    with pytest.raises(mixtral.LoadError) as error:
        mixtral.Mixtral.from_pretrained(tmp_path / "model")
    assert error.value.file == str(config)
    assert error.value.item == "num_local_experts"
    assert error.value.reason and error.value.reason in str(error.value)


def test_load_error_survives_a_file_name_that_is_not_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(folder)
    with pytest.raises(mixtral.LoadError):
        mixtral.Mixtral.from_pretrained(folder)


def test_config_rejects_unknown_and_missing_fields():
    with pytest.raises(TypeError, match="hiden_size"):
        mixtral.Config(hiden_size=64)
    with pytest.raises(mixtral.LoadError):
        tiny_config(num_heads=3)


@pytest.mark.parametrize("dtype", ["float32", "int8", "fp8", "int4"])
def test_from_config_is_random_and_repeatable(dtype):
    config = tiny_config(intermediate_size=64)
    first, same, other = (mixtral.Mixtral.from_config(config, dtype=dtype, seed=seed) for seed in (1, 1, 2))
    name = "layers.0.moe.gate_up_proj"
    weights, same_weights, other_weights = (
        model.named_parameters()[name].view(torch.uint8) for model in (first, same, other)
    )
    assert torch.equal(weights, same_weights) and not torch.equal(weights, other_weights)
    assert 0.01 < first(torch.tensor([[1, 2, 3]])).std() < 1


def test_random_packed_weights_repeat_one_draw():
    config = tiny_config(hidden_size=512, intermediate_size=4096, num_layers=1)  # 16 M values in gate_up_proj
    weight = mixtral.Mixtral.from_config(config, dtype="int8").named_parameters()["layers.0.moe.gate_up_proj"]
    drawn, others = weight.flatten(0, 1).split(2**22 // (32 * 512))[:2]
    assert torch.equal(drawn, others) and len(drawn.unique(dim=0)) == len(drawn)


def test_named_parameters_are_the_weights_themselves():
    model = mixtral.Mixtral.from_config(tiny_config())
    model.named_parameters()["lm_head"].data.zero_()
    assert model(torch.tensor([[1, 2]])).abs().max() == 0


def test_changing_a_config_does_not_change_a_model(tiny):
    copy = tiny._model.config
    copy.vocab_size = 1
    assert tiny._model.config.vocab_size == 96


# ---- logits ----------------------------------------------------------------------------------------------------------


def test_logits_shape_dtype_and_rows_of_their_own(tiny):
    ids = torch.randint(96, (3, 20))
    logits = tiny(ids)
    assert logits.shape == (3, 20, 96) and logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.equal(tiny(ids[1:2])[0], logits[1])


@pytest.mark.parametrize(
    "bad", [torch.ones(2, 3), torch.ones(3, dtype=torch.int64), torch.tensor([[96]]), torch.tensor([[-1]])]
)
def test_bad_input_ids_are_a_value_error(tiny, bad):
    with pytest.raises(ValueError, match="got"):
        tiny(bad)


def test_forward_lets_other_threads_run():
    model = mixtral.Mixtral.from_config(
        tiny_config(hidden_size=256, intermediate_size=512, window=0, max_position=4096)
    )
    ids, ticks, done = torch.randint(96, (1, 2048)), [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.monotonic()
    model(ids)
    end = time.monotonic()
    done.set()
    ticker.join()
    assert sum(begin < t < end for t in ticks) >= 3, f"{len(ticks)} ticks while the model ran {end - begin:.3f} s"


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def test_tokenizer_from_file_or_folder():
    text = "Il était une fois, 12 [INST]"
    tokenizers = [mixtral.Tokenizer(path) for path in (DEMO, str(DEMO / "tokenizer.model"))]
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text, add_bos=True, add_eos=True)
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert ids[1:-1] == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.vocab_size == 4096
        assert "".join(tokenizer.piece(i) for i in tokenizer.encode("a b")).replace("▁", " ").strip() == "a b"


def test_tokenizer_errors(tmp_path):
    tokenizer = mixtral.Tokenizer(DEMO)
    for call in (tokenizer.piece, lambda id: tokenizer.decode([id])):
        with pytest.raises(IndexError):
            call(-1)
        assert call(4096) == ""
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(mixtral.LoadError, match="tokenizer.model"):
        mixtral.Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="v9"):
        mixtral.Tokenizer(DEMO, version="v9")


def test_apply_chat_gives_a_prompt_and_names_what_is_wrong():
    tokenizer = mixtral.Tokenizer(DEMO)
    ids = tokenizer.apply_chat([{"role": "user", "content": "Hi"}])
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert "Hi" in tokenizer.decode(ids)
    with pytest.raises(ValueError):
        tokenizer.apply_chat([{"role": "nobody", "content": "Hi"}])
    with pytest.raises(ValueError, match=r"messages\[0\].*text"):
        tokenizer.apply_chat([{"role": "user", "text": "Hi"}])
    for wrong, message in [("Hi", "must be a list of dictionaries, got str"), (["Hi"], r"\[0\] must be a dictionary")]:
        with pytest.raises(TypeError, match=message):
            tokenizer.apply_chat(wrong)
