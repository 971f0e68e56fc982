"""Fields of config dataclasses that carry the rule which their value must obey."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any


def field(default: Any, expected: str, check: Callable[[Any], bool]) -> Any:
    """A dataclass field with the rule that `fields.value_error` applies to its value.

    Args:
        default: its default.
        expected: the rule in words.
        check: whether a value obeys it.

    Returns:
        The field.

    Example:
        >>> field(1, "an odd number", lambda value: value % 2 == 1).metadata["expected"]
        'an odd number'
    """
    return dataclasses.field(default=default, metadata={"expected": expected, "check": check})


def choice(*options: str) -> Any:
    """One of some texts, the first by default.

    Args:
        *options: the texts.

    Returns:
        The field.

    Example:
        >>> choice("a", "b").metadata["expected"]
        'one of a, b'
    """
    return field(options[0], f"one of {', '.join(options)}", options.__contains__)


def at_least(least: int, default: float) -> Any:
    """A number that is not below a bound.

    Args:
        least: the bound.
        default: its default.

    Returns:
        The field.

    Example:
        >>> at_least(1, 8).metadata["expected"]
        'a finite number >= 1'
    """
    return field(default, f"a finite number >= {least}", lambda value: least <= value < math.inf)


def positive(default: float) -> Any:
    """A number above 0.

    Args:
        default: its default.

    Returns:
        The field.

    Example:
        >>> positive(0.5).default
        0.5
    """
    return field(default, "a finite number > 0", lambda value: 0 < value < math.inf)


def share(default: float) -> Any:
    """A part of a whole that is not all of it.

    Args:
        default: its default.

    Returns:
        The field.

    Example:
        >>> share(0.0).metadata["check"](1)
        False
    """
    return field(default, "a number >= 0 and < 1", lambda value: 0 <= value < 1)


def fraction(default: float) -> Any:
    """A part of a whole, neither none nor all of it.

    Args:
        default: its default.

    Returns:
        The field.

    Example:
        >>> fraction(0.5).metadata["check"](0)
        False
    """
    return field(default, "a number > 0 and < 1", lambda value: 0 < value < 1)


def part(default: float) -> Any:
    """A part of a whole, or all of it, or none.

    Args:
        default: its default.

    Returns:
        The field.

    Example:
        >>> part(0.0).metadata["check"](1)
        True
    """
    return field(default, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def names(*options: str) -> Any:
    """Some of some names with commas between them, none by default.

    Args:
        *options: the names.

    Returns:
        The field.

    Example:
        >>> names("a", "b", "c").metadata["check"]("c,a")
        True
    """
    return field(
        "",
        f"names with commas between them, out of {', '.join(options)}",
        lambda value: not value or set(value.split(",")) <= set(options),
    )


def texts() -> Any:
    """A JSON list of texts, empty by default.

    Returns:
        The field.

    Example:
        >>> texts().metadata["check"]('["Question:"]')
        True
    """

    def check(value: str) -> bool:
        try:
            found = json.loads(value)
        except ValueError:
            return False
        return isinstance(found, list) and all(isinstance(t, str) and t for t in found)

    return field("[]", 'a JSON list of texts that are not empty, as ["Question:"]', check)


def axis(default: int) -> Any:
    """The size of a mesh axis, or -1 for what remains.

    Args:
        default: its default.

    Returns:
        The field.

    Example:
        >>> axis(-1).metadata["check"](0)
        False
    """
    return field(default, "an integer >= 1, or -1", lambda value: value >= 1 or value == -1)
