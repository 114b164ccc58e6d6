"""Bodies that two readers could take differently are refused."""

import pytest

from mixtral.server.errors import ApiError
from mixtral.server.strict_json import MAX_DEPTH, loads


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": 1} {"a": 1}',
        b'{"a": 1, "a": 1}',
        b'{"x": {"\\u0061": 1, "a": 1}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b"\xff\xfe",
        b'{"a": "\xed\xa0\x80"}',
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
    ],
)
def test_is_refused(text):
    with pytest.raises(ApiError) as error:
        loads(text)
    assert (error.value.status, error.value.code) == (400, "invalid_json")


def test_what_is_json_is_read():
    depth = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert loads(b'{"a": [1, 2.5, "\\ud83d\\ude42", null, true]}') == {"a": [1, 2.5, "🙂", None, True]}
    assert loads(depth) is not None
    brackets = '"' + "[{" * 1000 + '\\"' + '"'
    assert loads(f'{{"a": {brackets}}}'.encode()) == {"a": "[{" * 1000 + '"'}
