"""JSON that Python's parser takes, and that would end or mislead a job later."""

from __future__ import annotations

import json

import pytest

from draftcache.store.common.strict_json import parse_json

REFUSED = {
    "NaN": "NaN is no JSON number",
    "[-Infinity]": "-Infinity is no JSON number",
    "1e999": "1e999 is too large",
    "9" * 5000: "Exceeds the limit",
    "[" * 100_000 + "]" * 100_000: "nested too deeply",
    '{"a": ["\\ud800"]}': "lone surrogate U\\+D800",
    '{"\\udc00": 1}': "lone surrogate U\\+DC00",
    "{": "Expecting property name",
    "": "Expecting value",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_no_strict_json_is_a_value_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    with pytest.raises(ValueError, match=message):
        parse_json(text.encode())


def test_bytes_that_are_no_utf8_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'"\xff"')


def test_all_other_json_is_what_the_standard_library_reads() -> None:
    value = {"a": [1, -2.5, 1e300, True, None, "\U0001f389 \u00e9 \\u", {"deep": [[[[]]]]}]}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse_json('"\\ud83c\\udf89"') == "\U0001f389"  # a pair of escapes is one character
