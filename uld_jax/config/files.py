"""Config files: Python files that define `get_config()`."""

import contextlib
import runpy
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_collections

from uld_jax.config.convert import apply_overrides, from_dict, raise_all
from uld_jax.config.schema import RunConfig
from uld_jax.errors import UserError

# What a mistake in a config file can raise; anything else is not the file's fault.
_FILE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    UserError,
    ValueError,
)


def load(path: str, overrides: Mapping[str, Any] = MappingProxyType({})) -> RunConfig:
    """Run a config file and set single fields of what its `get_config()` returns.

    It returns a RunConfig, or an ml_collections.ConfigDict with the same groups and fields.

    The config is not validated: pass it to `resolve`. To report bad overrides together with
    everything else, load without them and pass `resolve` what `apply_overrides` returns.

    Args:
        path: FILE.py, or FILE.py:ARGUMENT to call `get_config("ARGUMENT")`.
        overrides: dotted path -> text from the command line, or a JSON value.

    Returns:
        The config.

    Raises:
        UserError: the file is absent, fails, or returns no RunConfig; or an override is bad.

    Example:
        >>> load("absent.py")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: config file 'absent.py': expected a Python file that defines \
get_config(), found no file; check --config
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise UserError(
            f"config file '{file}': expected a Python file that defines get_config(), "
            "found no file; check --config"
        )
    # ml_collections reads config files through a flag only, and reports a failure as a
    # traceback many lines long.
    with _one_line_errors(file):
        get_config = runpy.run_path(file).get("get_config")
    if not callable(get_config):
        raise UserError(
            f"config file '{file}': expected a function get_config() that returns a RunConfig, "
            "found none; define it"
        )
    with _one_line_errors(file):
        config = get_config(argument) if argument else get_config()
    if isinstance(config, ml_collections.ConfigDict):
        config = from_dict(config.to_dict())
    if not isinstance(config, RunConfig):
        raise UserError(
            f"config file '{file}': expected get_config() to return a RunConfig, "
            f"got {type(config).__name__}; end it with `return RunConfig(...)`"
        )
    config, errors = apply_overrides(config, overrides)
    raise_all(errors)
    return config


@contextlib.contextmanager
def _one_line_errors(file: str) -> Iterator[None]:
    try:
        yield
    except _FILE_ERRORS as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == file
        ]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
        where = f"{file}:{lines[-1]}" if lines else file
        what = " ".join(str(error).split())
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"config file '{where}': {kind}{what}") from error
