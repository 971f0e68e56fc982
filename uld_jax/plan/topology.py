"""The chips of TPU slices that need not be there: their devices, and their published figures."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from uld_jax.chips import CHIPS, Chip
from uld_jax.errors import UserError

# The other generations have one device a chip by themselves.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# libtpu neither asks the cloud which TPU this machine is, nor keeps other processes from it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Slice(NamedTuple):
    """A TPU slice to plan for, or several alike.

    Attributes:
        name: Such as "v5e:4x4", or "2xv5e:4x4".
        chip: What each of its chips can do.
        devices: One a chip, with its slice where there are several; programs can be compiled for
            them.
        hosts: Machines, each with as many of them.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    hosts: int


def get_slice(name: str) -> Slice:
    """The devices of a slice, known to libtpu, which must be installed.

    Args:
        name: Generation and shape, such as "v5e:4x4" or "v5p:4x4x8", and before them how many of
            these slices there are: "2xv5e:4x4" are two.

    Returns:
        The slice.

    Raises:
        UserError: libtpu is missing, or it knows no such slice.

    Example:
        >>> get_slice("v9:2x2")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: --topology=v9:2x2: expected GENERATION:SHAPE, such as ...
    """
    several = re.match(r"([1-9]\d*)x", name)
    one = name[several.end() :] if several else name
    generation, _, shape = one.partition(":")
    if generation not in CHIPS or not shape:
        raise UserError(
            f"--topology={name}: expected GENERATION:SHAPE, such as v5e:4x4 (or 2xv5e:4x4, two "
            f"slices), with a generation of {', '.join(CHIPS)}, got {generation!r}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name}: to compile for TPUs needs libtpu, which is not installed: "
            "pip install 'uld-jax[plan]'"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = dict(_OPTIONS.get(generation, {}))
    if several:
        options["num_slices"] = int(several[1])
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=one, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--topology={name}: libtpu knows no such slice ({reason}); write its shape as in "
            "v5e:4x4 or v5p:2x2x4"
        ) from error
    devices = found.devices
    hosts = len({device.process_index for device in devices})
    return Slice(name, CHIPS[generation], devices, hosts)
