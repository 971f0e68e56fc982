"""The fields of a configuration by their dotted path, and what is wrong with a value."""

import dataclasses
import re
from typing import Any

from uld_jax.config.schema import EXTRA, GROUPS

FIELDS: dict[str, dataclasses.Field[Any]] = {
    f"{name}.{field.name}": field
    for name, group in GROUPS.items()
    for field in dataclasses.fields(group)
}


def field_of(path: str) -> dataclasses.Field[Any] | None:
    """The field that a dotted path names.

    Args:
        path: such as "data.batch_size" or "extra_teachers.0.source".

    Returns:
        The field, or None where there is none.

    Example:
        >>> field_of("extra_teachers.0.source") is field_of("teacher.source")
        True
    """
    return FIELDS.get(re.sub(rf"^{re.escape(EXTRA)}\d+\.", "teacher.", path))


def type_error(path: str, value: Any) -> str | None:
    """Check a value against the type of its field, as JSON has it: an int may stand for a float.

    Args:
        path: of a field.
        value: what was given for it.

    Returns:
        One line that says what was expected and found, or None.

    Example:
        >>> type_error("data.batch_size", "many")
        "data.batch_size: expected int, got 'many'"
    """
    kind: Any = _existing(path).type
    allowed = (int, float) if kind is float else (kind,)
    if type(value) in allowed:
        return None
    return f"{path}: expected {kind.__name__}, got {value!r}"


def value_error(path: str, value: Any) -> str | None:
    """Check a value against the type of its field and the rule that stands beside its default.

    Args:
        path: of a field.
        value: what was given for it.

    Returns:
        One line that says what was expected and found and how to mend it, or None.

    Example:
        >>> value_error("mesh.fsdp", 0)
        'mesh.fsdp: expected an integer >= 1, or -1, got 0; set --config.mesh.fsdp=1 (the default)'
    """
    field = _existing(path)
    if error := type_error(path, value):
        return error
    if "check" not in field.metadata or field.metadata["check"](value):
        return None
    mend = (
        f"--config.{path}={field.default} (the default)"
        if field.default != ""
        else f"--config.{path}=..."
    )
    return f"{path}: expected {field.metadata['expected']}, got {value!r}; set {mend}"


def _existing(path: str) -> dataclasses.Field[Any]:
    field = field_of(path)
    if field is None:
        raise KeyError(path)
    return field
