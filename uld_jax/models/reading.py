"""Parameters from a source of tensors straight into their shards, one tensor of it at a time."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig
from uld_jax.models.families import Family, Weight, hf_names
from uld_jax.sharding import RULES, Rules, named_sharding

Box = tuple[tuple[int, int], ...]
"""A part of a tensor: of each axis, where it starts and where it stops."""


class TensorSource(Protocol):
    """Where weights come from: a config, and tensors by their Hugging Face names."""

    family: Family
    config: DecoderConfig
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, boxes: Sequence[Box]) -> list[np.ndarray]:
        """These parts of one tensor, and no more of it where the source can leave the rest."""
        ...


def parameters_of(tensors: TensorSource, state: nnx.State) -> list[tuple[Weight, nnx.Param]]:
    """The rows of a source's weight table with the parameters that they fill.

    Args:
        tensors: The source.
        state: The model's parameters, or their shapes.

    Returns:
        Row and parameter; those of the largest tensors first, which are read while there is most
        room left.
    """
    flat = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}
    rows = [(w, flat[w.path]) for w in tensors.family.weights(tensors.config)]
    return sorted(rows, key=lambda row: -math.prod(row[1].shape[1 if row[0].stacked else 0 :]))


def check_weights(tensors: TensorSource, abstract: nnx.State, where: str) -> None:
    """Compares a source's tensors with those the model needs.

    Args:
        tensors: The source.
        abstract: The model's parameters, shapes only.
        where: Named in the error.

    Raises:
        UserError: Lists every missing, unexpected and wrongly shaped tensor.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for weight, param in parameters_of(tensors, abstract):
        shape = tuple(param.shape)[1 if weight.stacked else 0 :]
        shape = shape[::-1] if weight.transpose else shape
        if weight.part is not None:
            axis, rows = weight.part.axis, weight.part.groups * sum(weight.part.sizes)
            shape = (*shape[:axis], rows, *shape[axis + 1 :])
        expected |= dict.fromkeys(hf_names(weight, param.shape[0]), shape)
    found = dict(tensors.shapes)
    if tensors.config.tied:
        # Some exporters write the tied head a second time.
        found.pop("lm_head.weight", None)
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise UserError(
            f"{where}: {len(problems)} problems with its weights: {'; '.join(problems)}; they are "
            f"not those of its config (vocab_size {tensors.config.vocab_size}, …): fetch both again"
        )


def read_parameter(
    tensors: TensorSource, weight: Weight, param: nnx.Param, mesh: Mesh, rules: Rules = RULES
) -> jax.Array:
    """One parameter, of which this process reads what its devices hold.

    A parameter that stacks the layers is filled in place on the devices, so that the host never
    holds more than one layer's tensor, as it was stored and as it is wanted.

    Args:
        tensors: The source.
        weight: The parameter's row in the weight table.
        param: Its shape, type and axes.
        mesh: Where it goes.
        rules: How it lies there.

    Returns:
        The array.

    Raises:
        UserError: The mesh does not divide it, or the source cannot be read.
    """
    shape, axes = tuple(param.shape), param.get_metadata("axes")
    sharding = named_sharding(mesh, axes, shape, weight.path, rules)
    if not weight.stacked:
        return _read_tensor(tensors, weight, weight.hf, param.dtype, shape, sharding)
    layer_sharding = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
    insert = jax.jit(_set_layer, donate_argnums=0, out_shardings=sharding)
    stack = jnp.zeros(shape, param.dtype, device=sharding)
    for layer, name in enumerate(hf_names(weight, shape[0])):
        tensor = _read_tensor(tensors, weight, name, param.dtype, shape[1:], layer_sharding)
        # Waiting keeps the tensors of later layers from queueing up on the host.
        stack = insert(stack, tensor, layer).block_until_ready()
        del tensor
    return stack


def _set_layer(stack: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, tensor, layer, 0)


def _read_tensor(
    tensors: TensorSource,
    weight: Weight,
    name: str,
    dtype: Any,
    shape: tuple[int, ...],
    sharding: NamedSharding,
) -> jax.Array:
    """One tensor as we lay it out; each distinct shard of this process is read once."""
    places: dict[Box, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        cuts = index or ()
        box = tuple(cut.indices(size)[:2] for cut, size in zip(cuts, shape, strict=True))
        places.setdefault(box, []).append(device)
    shards = []
    for box, devices in places.items():
        stored = tensors.read(name, _stored_boxes(weight, box))
        axis = weight.part.axis if weight.part else 0
        shard = stored[0] if len(stored) == 1 else np.concatenate(stored, axis)
        del stored
        # One copy at most changes layout and type.
        shard = np.asarray(shard.T if weight.transpose else shard, dtype, order="C")
        shards += [jax.device_put(shard, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _stored_boxes(weight: Weight, box: Box) -> list[Box]:
    """Where a part of our tensor lies in the one that Hugging Face stores."""
    box = box[::-1] if weight.transpose else box
    if weight.part is None:
        return [box]
    axis = weight.part.axis
    rows = weight.part.ranges(*box[axis])
    return [(*box[:axis], each, *box[axis + 1 :]) for each in rows]
