"""JSON files, plain or .gz, and their fields: what is wrong with one is said with its place."""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uld_jax.errors import UserError


def read_json(path: Path, expected: str) -> Any:
    """Read a file that is one JSON document.

    Args:
        path: The file, plain or .gz.
        expected: What it should be, for the error.

    Returns:
        The document.

    Raises:
        UserError: The file is absent, not text, or not JSON.
    """
    try:
        return json.loads("".join(read_lines(path)))
    except json.JSONDecodeError as error:
        raise _not_json(f"{path}:{error.lineno}", error, expected) from error


def json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Read a file that has a JSON object a line; blank lines are passed over.

    Args:
        path: The file, plain or .gz.

    Yields:
        An object, and where it stands: path:line.

    Raises:
        UserError: The file is absent, not text, or a line is not a JSON object.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise _not_json(where, error, "one JSON object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, got {describe(record)}")
        yield record, where


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of a UTF-8 text file.

    Args:
        path: The file, plain or .gz.

    Yields:
        A line, with its end.

    Raises:
        UserError: The file is absent or not text.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a JSON file: check the path")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error


def text_of(record: dict[str, Any], field: str, where: str) -> str:
    """A field that must be a string.

    Args:
        record: A JSON object.
        field: The field's name.
        where: The object's place, for the error.

    Returns:
        Its value.

    Raises:
        UserError: It is missing or something else.

    Example:
        >>> text_of({"title": "Oslo"}, "title", "a.jsonl:1")
        'Oslo'
    """
    value = _value(record, field, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} must be a string, got {describe(value)}")
    return value


def texts_of(record: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    """A field that must be a list of strings with at least one in it.

    Args:
        record: A JSON object.
        field: The field's name.
        where: The object's place, for the error.

    Returns:
        Its value.

    Raises:
        UserError: It is missing, empty or something else.

    Example:
        >>> texts_of({"answers": ["Oslo"]}, "answers", "a.jsonl:1")
        ('Oslo',)
    """
    values = _value(record, field, where)
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{where}: field {field!r} must be a non-empty list of strings, got {describe(values)}"
        )
    for value in values:
        if not isinstance(value, str):
            raise UserError(
                f"{where}: field {field!r} must hold strings only, got {describe(value)} in it"
            )
    return tuple(values)


def objects_of(record: dict[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    """A field that must be a list of JSON objects.

    Args:
        record: A JSON object.
        field: The field's name.
        where: The object's place, for the error.

    Returns:
        Its value.

    Raises:
        UserError: It is missing or something else.

    Example:
        >>> objects_of({"qas": []}, "qas", "a.jsonl:1")
        []
    """
    value = _value(record, field, where)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(
            f"{where}: field {field!r} must be a list of objects, got {describe(value)}"
        )
    return value


def check_ids(identifiers: Iterable[tuple[str, str]]) -> None:
    """Refuse an id that is used twice.

    Args:
        identifiers: (id, where it stands) pairs.

    Raises:
        UserError: Two are equal.
    """
    seen: dict[str, str] = {}
    for identifier, where in identifiers:
        if identifier in seen:
            raise UserError(
                f"{where}: id {identifier!r} is used twice (first in {seen[identifier]})"
            )
        seen[identifier] = where


def describe(value: object) -> str:
    """A value for an error: its type and the beginning of it.

    Args:
        value: From a JSON file.

    Returns:
        The text.

    Example:
        >>> describe(["a"])
        'list ["a"]'
    """
    text = json.dumps(value, ensure_ascii=False)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _value(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise UserError(f"{where}: field {field!r} is missing, found {sorted(record)}")
    return record[field]


def _not_json(where: str, error: json.JSONDecodeError, expected: str) -> UserError:
    return UserError(f"{where}: not JSON ({error.msg}, column {error.colno}), expected {expected}")
