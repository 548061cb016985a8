"""A small strict checker for the JSON files that fewbits writes and reads back.

A schema is a plain value that looks like what it describes:

    int, float, str, bool, None   that type (an int is a fine float; a bool is neither)
    "text"                        exactly that text
    [s]                           a list of s
    {"key": s, "other?": s}       exactly these keys, "other" may be missing
    {str: s}                      any text keys, each value an s
    (s, t)                        s or t
    object                        anything

>>> check({"step": 3}, {"step": int, "note?": str}, "state.json")
>>> check({"step": "3"}, {"step": int}, "state.json")
Traceback (most recent call last):
fewbits.errors.FewbitsError: state.json: step is '3', expected int. The file was changed or is not one of fewbits'.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError, nearest


def check(value: object, schema: object, source: str) -> None:
    """Errors: FewbitsError naming the source, the place in it, what stands there and what was expected."""
    problem = _problem(value, schema, "")
    if problem:
        raise FewbitsError(f"{source}: {problem}. The file was changed or is not one of fewbits'.")


def read_json(path: Path, schema: object, version: str) -> dict[str, Any]:
    """Read a JSON object that must carry `"schema": version` (such as "fewbits.summary/1") and fit the schema.

    The key "schema" need not be repeated in `schema`. Errors: FewbitsError for every way in which it does not fit."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FewbitsError(f"{path} is missing. Name a folder that fewbits wrote.") from None
    except OSError as error:
        raise FewbitsError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    return parse_json(raw, schema, version, str(path))


def parse_json(raw: bytes, schema: object, version: str, source: str) -> dict[str, Any]:
    """As `read_json`, from bytes; `source` names them in errors."""
    try:
        value = json.loads(raw.decode("utf-8"), object_hook=_special)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FewbitsError(f"{source} is not JSON ({error}). It was changed or cut off.") from None
    if not isinstance(value, dict):
        raise FewbitsError(f"{source} holds {_kind(value)}, expected an object. It is not one of fewbits' files.")
    check_version(value.get("schema"), version, source)
    check({key: item for key, item in value.items() if key != "schema"}, schema, source)
    return value


def check_version(found: object, expected: str, source: str) -> None:
    """Errors: FewbitsError when a file is of another kind or of another schema version."""
    if found == expected:
        return
    kind, _, number = expected.rpartition("/")
    if isinstance(found, str) and found.rpartition("/")[0] == kind:
        other = found.rpartition("/")[2]
        raise FewbitsError(
            f"{source} was written in version {other} of {kind}; this fewbits reads version {number}. "
            "Use the fewbits that wrote it."
        )
    raise FewbitsError(f"{source} says schema {found!r}, expected {expected!r}. It is not one of fewbits' files.")


def dump_json(value: object) -> bytes:
    """JSON that any reader takes and that Python reads back exactly: non-finite floats become {"__float__": "nan"}.

    Tuples come back as lists. Errors: TypeError for what JSON cannot hold, keys other than text included."""
    return (json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def load_json(raw: bytes) -> Any:
    """The inverse of `dump_json`."""
    return json.loads(raw, object_hook=_special)


def _special(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _plain(value: object) -> object:
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise TypeError(f"JSON keys are text, got {wrong!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"JSON cannot hold {type(value).__name__}: {value!r}")


def _problem(value: object, schema: object, where: str) -> str:
    """What does not fit, as "place is X, expected Y", or ""."""
    if schema is object:
        return ""
    if isinstance(schema, tuple):
        problems = [_problem(value, option, where) for option in schema]
        if "" in problems:
            return ""
        return problems[0] if len(problems) == 1 else _expected(value, schema, where)
    if isinstance(schema, dict):
        return _mapping_problem(value, schema, where)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return _expected(value, schema, where)
        found = (_problem(item, schema[0], f"{where}[{i}]") for i, item in enumerate(value))
        return next((problem for problem in found if problem), "")
    return "" if _fits(value, schema) else _expected(value, schema, where)


def _fits(value: object, schema: object) -> bool:
    if schema is None or isinstance(schema, str):
        return value == schema
    if schema is bool:
        return isinstance(value, bool)
    if schema is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(schema, type) and isinstance(value, schema) and not isinstance(value, bool)


def _mapping_problem(value: object, schema: dict[Any, object], where: str) -> str:
    if not isinstance(value, dict):
        return _expected(value, schema, where)
    if str in schema:
        found = (_problem(item, schema[str], _join(where, key)) for key, item in value.items())
        return next((problem for problem in found if problem), "")
    names = {key.removesuffix("?"): rule for key, rule in schema.items()}
    for key in value:
        if key not in names:
            return f"{_join(where, key)} is not a known key{nearest(key, names).removesuffix('?')}"
    for key, rule in schema.items():
        name = key.removesuffix("?")
        if name not in value:
            if not key.endswith("?"):
                return f"{_join(where, name)} is missing"
            continue
        problem = _problem(value[name], rule, _join(where, name))
        if problem:
            return problem
    return ""


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _expected(value: object, schema: object, where: str) -> str:
    shown = repr(value) if not isinstance(value, dict | list) else _kind(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{where or 'the file'} is {shown}, expected {_describe(schema)}"


def _describe(schema: object) -> str:
    if isinstance(schema, tuple):
        return " or ".join(_describe(option) for option in schema)
    if isinstance(schema, dict):
        return "an object"
    if isinstance(schema, list):
        return f"a list of {_describe(schema[0])}"
    if schema is None:
        return "null"
    return schema.__name__ if isinstance(schema, type) else repr(schema)


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else repr(value)
