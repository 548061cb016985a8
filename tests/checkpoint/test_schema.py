"""The JSON checker says what stands where, and JSON carries every float."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fewbits.checkpoint.schema import check, dump_json, load_json, parse_json, read_json
from fewbits.errors import FewbitsError

SCHEMA = {
    "steps": int,
    "loss": (float, None),
    "name?": str,
    "flags": [bool],
    "memory": {str: int},
    "kind": ("a", "b"),
    "rows": [{"what": str, "value": object}],
}
GOOD = {
    "steps": 1,
    "loss": None,
    "flags": [True],
    "memory": {"x": 1},
    "kind": "a",
    "rows": [{"what": "w", "value": []}],
}


def test_what_fits_passes() -> None:
    check(GOOD, SCHEMA, "f.json")
    check(GOOD | {"loss": 3, "name": "n"}, SCHEMA, "f.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1.0}, "steps is 1.0, expected int"),
        ({"steps": True}, "steps is True, expected int"),
        ({"loss": "low"}, "loss is 'low', expected float or null"),
        ({"flags": [True, 1]}, r"flags\[1\] is 1, expected bool"),
        ({"memory": {"x": "1"}}, "memory.x is '1', expected int"),
        ({"memory": [1]}, "memory is a list, expected an object"),
        ({"kind": "c"}, "kind is 'c', expected 'a' or 'b'"),
        ({"rows": [{"what": "w"}]}, r"rows\[0\].value is missing"),
        ({"rows": 3}, "rows is 3, expected a list of an object"),
        ({"stesp": 1}, "stesp is not a known key Did you mean 'steps'"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(change, message: str) -> None:
    with pytest.raises(FewbitsError, match=f"^f.json: {message}"):
        check(GOOD | change, SCHEMA, "f.json")


def test_files_of_another_kind_version_or_shape_are_one_sentence_each(tmp_path: Path) -> None:
    def read(content: bytes):
        (tmp_path / "f.json").write_bytes(content)
        return read_json(tmp_path / "f.json", {"a": int}, "fewbits.summary/1")

    assert read(b'{"schema": "fewbits.summary/1", "a": 1}') == {"schema": "fewbits.summary/1", "a": 1}
    for content, message in [
        (
            b'{"schema": "fewbits.summary/2", "a": 1}',
            "written in version 2 of fewbits.summary; this fewbits reads version 1",
        ),
        (b'{"schema": "other", "a": 1}', "says schema 'other', expected 'fewbits.summary/1'"),
        (b'{"a": 1}', "says schema None"),
        (b'{"schema": "fewbits.summary/1", "a":', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a list, expected an object"),
    ]:
        with pytest.raises(FewbitsError, match=message):
            read(content)
    with pytest.raises(FewbitsError, match="is missing"):
        read_json(tmp_path / "none.json", {}, "fewbits.summary/1")


def test_json_carries_every_float_and_stays_standard_json() -> None:
    value = {"a": [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1], "b": {"deep": (1, "é")}, "n": 2**80}
    raw = dump_json(value)
    json.loads(raw, parse_constant=lambda word: pytest.fail(f"{word} is not standard JSON"))
    back = load_json(raw)
    assert [x.hex() for x in back["a"]] == [x.hex() for x in value["a"]]
    assert back["b"] == {"deep": [1, "é"]} and back["n"] == 2**80
    assert math.isnan(parse_json(b'{"schema": "s/1", "x": {"__float__": "nan"}}', {"x": float}, "s/1", "s")["x"])


@pytest.mark.parametrize("value", [{1: 2}, {"a": object()}, [b"bytes"], {"a": {2.0: 1}}])
def test_what_json_would_change_is_refused(value) -> None:
    with pytest.raises(TypeError):
        dump_json(value)
