"""Which devices a command's models lie on: all there are, or each process's own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from uld_jax import config as configs
from uld_jax.config import MeshConfig, RunConfig
from uld_jax.sharding import make_mesh, split_devices


def mesh_of(axes: MeshConfig, **options: Any) -> Mesh:
    """The mesh that a config describes.

    Args:
        axes: The config.
        **options: `make_mesh`'s devices and keep_order.

    Returns:
        The mesh.

    Example:
        >>> mesh_of(MeshConfig(sequence=-1, data=1)).shape["data"]
        1
    """
    sizes = {"sequence": axes.sequence, "slices": axes.slices}
    return make_mesh(axes.data, axes.fsdp, axes.tensor, **sizes, **options)


def meshes(config: RunConfig, devices: Sequence[Any] | None = None) -> dict[str, Mesh]:
    """Which devices hold which model.

    Args:
        config: A resolved config.
        devices: All there are; this machine's by default.

    Returns:
        The mesh of the student, and that of each teacher by its path: devices of its own where it
        streams, else the student's.

    Example:
        >>> sorted(meshes(RunConfig()))
        ['student', 'teacher']
    """
    own = configs.streaming_devices(config)
    left, *parts = split_devices([*own.values()], devices)
    student = mesh_of(config.mesh, devices=left, keep_order=bool(own))
    teachers = config.teacher_groups()
    found = {"student": student, **dict.fromkeys(teachers, student)}
    for path, devices in zip(own, parts, strict=True):
        fsdp, tensor = teachers[path].fsdp, teachers[path].tensor
        axes = MeshConfig(-1, fsdp, tensor, slices=config.mesh.slices)
        found[path] = mesh_of(axes, devices=devices, keep_order=True)
    return found


def own_mesh(axes: MeshConfig) -> Mesh:
    """This process's devices, for commands whose processes have a whole model each.

    Args:
        axes: The config. Of several processes, the data axis takes what the other axes leave of
            this one's devices, which are of one slice.

    Returns:
        The mesh.

    Raises:
        UserError: The other axes do not divide the devices.

    Example:
        >>> own_mesh(MeshConfig()) == mesh_of(MeshConfig())
        True
    """
    if jax.process_count() > 1:
        data = axes.data if -1 in (axes.fsdp, axes.sequence, axes.tensor) else -1
        axes = dataclasses.replace(axes, data=data, slices=1)
    return mesh_of(axes, devices=jax.local_devices())


def evaluation_mesh(config: RunConfig) -> tuple[Mesh, bool]:
    """Where models are evaluated, and whether each process has its own.

    Args:
        config: The run.

    Returns:
        The student's mesh; of several processes each its own devices, if the model's shards fit
        on them, else all devices together.

    Example:
        >>> evaluation_mesh(RunConfig()) == (meshes(RunConfig())["student"], False)
        True
    """
    shards = config.mesh.fsdp * config.mesh.tensor
    if jax.process_count() == 1 or shards < 1 or jax.local_device_count() % shards:
        return meshes(config)["student"], False
    # Questions and answers are short: what shared the tokens of a row has rows of its own.
    return own_mesh(dataclasses.replace(config.mesh, sequence=1)), True
