"""Dataclasses from TOML and back.

A key that no dataclass has, or a value of another type, is one error with the key, the file and the nearest name.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

T = TypeVar("T")


class SettingsError(ValueError):
    """A configuration that cannot be used: one line that names the file and the key."""


def read_table(path: str | PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A TOML file as nested dicts, with ``section.key=value`` put on top; a value that is no TOML is a string.

    Raises:
        SettingsError: no such file, no TOML, or an override without an equals sign.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise SettingsError(f"--set {override}: expected section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *sections, key = name.strip().split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise SettingsError(f"--set {override}: {section} is not a section")
        place[key] = value
    return table


def parse(cls: type[T], table: dict[str, Any], source: str | PathLike[str], section: str = "") -> T:
    """A dataclass from a table of TOML, with every key and every type checked.

    Args:
        cls: a dataclass; a field ``from_`` is the key ``from``.
        source: the file, for messages.
        section: where in it the table stands: "train", or "" for the whole file.

    Raises:
        SettingsError: an unknown key, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    names = {f.name.removesuffix("_"): f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        where = f"{section}.{key}" if section else key
        if key not in names:
            near = difflib.get_close_matches(key, names, 1, 0.5)
            meant = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
            raise SettingsError(f"{source}: unknown key {where}{meant}")
        values[names[key]] = _convert(value, hints[names[key]], source, where)
    try:
        return cls(**values)
    except ValueError as error:
        raise SettingsError(f"{source}: [{section}]: {error}") from None


def _convert(value: Any, hint: Any, source: str | PathLike[str], where: str) -> Any:
    """The value as the type of a field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        return _convert(value, next(a for a in arguments if a is not type(None)), source, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return parse(hint, value, source, where)
    if origin is dict and isinstance(value, dict):
        return {k: _convert(v, arguments[1], source, f"{where}.{k}") for k, v in value.items()}
    if origin is list and isinstance(value, list):
        return [_convert(v, arguments[0], source, where) for v in value]
    if origin is Literal:
        if value in arguments:
            return value
        raise SettingsError(f"{source}: {where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise SettingsError(f"{source}: {where} must be {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    if typing.get_origin(hint) is list:
        return f"a list, each {_type_name(typing.get_args(hint)[0])}"
    return names.get(hint, "a table")


def to_toml(settings: Any) -> str:
    """The settings as a configuration that ``read_settings`` takes."""

    def lines(value: dict[str, Any], path: str) -> list[str]:
        tables = {k: v for k, v in value.items() if isinstance(v, dict)}
        rows = [
            f"{k.removesuffix('_')} = {json.dumps(v)}" for k, v in value.items() if k not in tables and v is not None
        ]
        found = [f"[{path}]", *rows, ""] if path and (rows or not tables) else rows
        for name, table in tables.items():
            found += lines(table, f"{path}.{name}" if path else name)
        return found

    return "\n".join(lines(dataclasses.asdict(settings), ""))
