"""The bits of the bundled model's results, pinned for every instruction set and weight type.

A change that is meant to move code, not numbers, leaves them as they are. They are the same on every x86-64 processor
with FMA: each sum has one documented order (docs/numerics.md), and of the C library only ``cosf``, ``sinf`` and ``pow``
are called. Where results are meant to change, ``python tests/model/test_checksums.py`` prints the new table for
``tests/data/checksums.json``.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/ops"))
from isa import available_isas, run_under_isa  # noqa: E402

PINNED = ROOT / "tests/data/checksums.json"
DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8", "int4")
COMPUTE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checksums import checksums
import json
print(json.dumps(checksums()))
"""


def checksums() -> dict[str, dict[str, str]]:
    """Of the logits of a text computed whole, and of a generation through the rolling cache, by weight type."""
    import torch

    import mixtral

    text = (ROOT / "tests/data/held_out/bible.txt").read_text()[:1500]
    result = {}
    for dtype in DTYPES:
        model = mixtral.Mixtral.from_pretrained(ROOT / "models/demo", dtype=dtype)
        ids = model.tokenizer.encode(text, add_bos=True)
        logits = model(torch.tensor([ids]))
        generation = model.generate([ids[:200], ids[200:207]], max_tokens=24, logprobs=3, ignore_eos=True)
        tokens = [(g.token_ids, [(p.logprob, p.top) for p in g.logprobs]) for g in generation]
        result[dtype] = {
            "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16],
            "generation": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
        }
    return result


def checksums_under(isa: str) -> dict[str, dict[str, str]]:
    result = run_under_isa(isa, COMPUTE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("isa", available_isas())
def test_bits_are_those_pinned(isa):
    pinned = json.loads(PINNED.read_text())
    found = checksums_under(isa)
    if isa in pinned:
        assert found == pinned[isa]
    else:  # amx: products of float32 and float16 have the order of avx512, on whatever processor
        for dtype in ("float32", "float16"):
            assert found[dtype] == pinned["avx512"][dtype], dtype


def test_weight_types_and_orders_of_sums_differ():
    """The checksums tell results apart at all."""
    pinned = json.loads(PINNED.read_text())
    logits = [by_type["logits"] for by_type in pinned["avx2"].values()]
    assert len(set(logits)) == len(DTYPES)
    assert pinned["avx512"]["bfloat16"] != pinned["avx512_bf16"]["bfloat16"]


if __name__ == "__main__":
    print(json.dumps({isa: checksums_under(isa) for isa in available_isas()}, indent=1))
