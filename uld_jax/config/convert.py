"""A configuration as dotted paths: command-line overrides, JSON and comparison."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from uld_jax.config.schema import FIELDS, GROUPS, RunConfig, type_error
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
        f"{group}.{field.name}": getattr(getattr(config, group), field.name)
        for group in GROUPS
        for field in dataclasses.fields(getattr(config, group))
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


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Turn a config into nested dictionaries that JSON can hold; `from_dict` is the inverse.

    Args:
        config: any config.

    Returns:
        group -> field -> value.

    Example:
        >>> to_dict(RunConfig())["mesh"]
        {'data': -1, 'fsdp': 1, 'tensor': 1}
    """
    return dataclasses.asdict(config)


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
        if group in GROUPS and isinstance(fields, Mapping):
            flat |= {f"{group}.{name}": value for name, value in fields.items()}
        else:
            flat[group] = fields
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
    return [
        f"{path}: {value!r} in the workdir, {after[path]!r} given"
        for path, value in flatten(saved).items()
        if value != after[path]
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
    kind: Any = FIELDS[path].type if path in FIELDS else str
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
        error = _unknown(path) if path not in FIELDS else type_error(path, value)
        if error:
            errors.append(error)
            continue
        group, name = path.split(".")
        if FIELDS[path].type is float:
            value = float(value)
        changed = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group: changed})
    return config, errors


def _unknown(path: str) -> str:
    if path in GROUPS:
        fields = ", ".join(field.name for field in dataclasses.fields(GROUPS[path]))
        return f"config group '{path}' has no value of its own: set one of its fields ({fields})"
    nearest = difflib.get_close_matches(path, [*FIELDS, *GROUPS], n=1)
    mend = f"did you mean '{nearest[0]}'?" if nearest else f"the groups are {', '.join(GROUPS)}"
    return f"unknown config field '{path}': {mend}"
