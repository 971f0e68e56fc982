"""A configuration as dotted paths: command-line overrides, JSON and comparison."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from uld_jax.config.fields import FIELDS, field_of, type_error
from uld_jax.config.schema import EXTRA, GROUPS, RunConfig, TeacherConfig
from uld_jax.errors import UserError


def flatten(config: RunConfig) -> dict[str, Any]:
    """List a config's values by dotted path.

    Args:
        config: any config.

    Returns:
        One entry a field, in the order of the dataclasses.

    Example:
        >>> flatten(RunConfig())["data.batch_size"]
        8
    """
    return {
        f"{name}.{field.name}": getattr(group, field.name)
        for name, group in config.groups().items()
        for field in dataclasses.fields(group)
    }


def apply_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """Set single fields by dotted path; a text is read as the type of its field.

    Args:
        config: where to start from; it stays as it is.
        overrides: dotted path -> text from the command line, or a JSON value.

    Returns:
        The config with every sound override, and one line for each that is not.

    Example:
        >>> config, errors = apply_overrides(
        ...     RunConfig(), {"data.batch_size": "16", "data.sorce": "squad"}
        ... )
        >>> config.data.batch_size, errors
        (16, ["unknown config field 'data.sorce': did you mean 'data.source'?"])
    """
    return _set_all(config, {path: _read(path, value) for path, value in overrides.items()})


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Turn a config into nested dictionaries that JSON can hold; `from_dict` is the inverse.

    Args:
        config: any config.

    Returns:
        group -> field -> value; `extra_teachers` is a list of such.

    Example:
        >>> to_dict(RunConfig())["mesh"]
        {'data': -1, 'fsdp': 1, 'tensor': 1, 'sequence': 1, 'slices': 1}
    """
    values = dataclasses.asdict(config)
    return values | {EXTRA[:-1]: [*values[EXTRA[:-1]]]}


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a config from nested dictionaries; a field that is absent keeps its default.

    Args:
        values: group -> field -> value, as `to_dict` writes and JSON reads it.

    Returns:
        The config, not yet validated.

    Raises:
        UserError: names every field that is unknown or has the wrong type.

    Example:
        >>> from_dict({"data": {"batch_size": 16}}).data.batch_size
        16
    """
    flat: dict[str, Any] = {}
    for group, fields in values.items():
        members = {group: fields}
        if group == EXTRA[:-1] and isinstance(fields, Sequence):
            members = {f"{EXTRA}{i}": each for i, each in enumerate(fields)}
        for path, member in members.items():
            known = path in GROUPS or path.startswith(EXTRA)
            if known and isinstance(member, Mapping):
                flat |= {f"{path}.{name}": value for name, value in member.items()}
            else:
                flat[path] = member
    config, errors = _set_all(RunConfig(), flat)
    raise_all(errors)
    return config


def differences(saved: RunConfig, given: RunConfig) -> list[str]:
    """List the fields in which two configs differ.

    Args:
        saved: the config in a run's working directory.
        given: the config that was passed now.

    Returns:
        One line a field.

    Example:
        >>> given, _ = apply_overrides(RunConfig(), {"data.batch_size": 16})
        >>> differences(RunConfig(), given)
        ['data.batch_size: 8 in the workdir, 16 given']
    """
    after = flatten(given)
    before = flatten(saved)
    absent = "absent"
    return [
        f"{path}: {before.get(path, absent)!r} in the workdir, {after.get(path, absent)!r} given"
        for path in before | after
        if before.get(path, absent) != after.get(path, absent)
    ]


def raise_all(errors: list[str]) -> None:
    """Raise one error that lists all of them; do nothing where there are none.

    Args:
        errors: one line each.

    Raises:
        UserError: a line with their number, then one line each.

    Example:
        >>> raise_all([])
    """
    if errors:
        noun = "error" if len(errors) == 1 else "errors"
        raise UserError("\n  ".join([f"{len(errors)} {noun} in the config:", *errors]))


def _read(path: str, value: Any) -> Any:
    """The value that a text on the command line means; the text itself where it means none."""
    field = field_of(path)
    kind: Any = str if field is None else field.type
    if not isinstance(value, str) or kind is str:
        return value
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return kind(value)
    except ValueError:
        return value


def _set_all(config: RunConfig, values: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    errors: list[str] = []
    for path, value in values.items():
        field = field_of(path)
        group, _, name = path.rpartition(".")
        if field is None:
            errors.append(_unknown(path))
        elif error := type_error(path, value) or _no_such_teacher(config, group):
            errors.append(error)
        else:
            config = _set(config, group, {name: float(value) if field.type is float else value})
    return config, errors


def _set(config: RunConfig, group: str, change: Mapping[str, Any]) -> RunConfig:
    """The config with a field of a group changed; the next extra teacher begins with defaults."""
    if not group.startswith(EXTRA):
        changed = dataclasses.replace(getattr(config, group), **change)
        return dataclasses.replace(config, **{group: changed})
    extra, number = [*config.extra_teachers], int(group.removeprefix(EXTRA))
    if number == len(extra):
        extra.append(TeacherConfig())
    extra[number] = dataclasses.replace(extra[number], **change)
    return dataclasses.replace(config, extra_teachers=tuple(extra))


def _no_such_teacher(config: RunConfig, group: str) -> str | None:
    count = len(config.extra_teachers)
    if not group.startswith(EXTRA) or int(group.removeprefix(EXTRA)) <= count:
        return None
    return f"{group}: expected the number of an extra teacher or the next, {count}"


def _unknown(path: str) -> str:
    if path in GROUPS:
        fields = ", ".join(field.name for field in dataclasses.fields(GROUPS[path]))
        return f"config group '{path}' has no value of its own: set one of its fields ({fields})"
    nearest = difflib.get_close_matches(path, [*FIELDS, *GROUPS], n=1)
    mend = f"did you mean '{nearest[0]}'?" if nearest else f"the groups are {', '.join(GROUPS)}"
    return f"unknown config field '{path}': {mend}"
