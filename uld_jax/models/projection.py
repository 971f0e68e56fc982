"""The products of a model: by a plain matrix, a quantised one, or one with a low-rank adapter.

What a matrix `name` of a module is beyond its values stands beside it, as its bias does:
`{name}_scale` where it is quantised, `{name}_lora_a` and `{name}_lora_b` where it is adapted. All
are parameters like any other, stacked over the layers and with logical axes, so that scans, meshes
and checkpoints need to know of neither. (qwix's own providers intercept the products of a module
that they trace, and cannot: here one scanned function multiplies slices of stacked arrays.)
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from uld_jax.sharding import RULES, batch_shards, partition_spec

SCALE, LORA_A, LORA_B = "_scale", "_lora_a", "_lora_b"


def project(module: Any, name: str, x: jax.Array) -> jax.Array:
    """X · W, and where the module has them + alpha / rank · x · A · B and + bias.

    Args:
        module: Holds the parameters of one layer.
        name: The matrix.
        x: [..., in].

    Returns:
        [..., out] in x's dtype.

    Example:
        >>> module = nnx.Module()
        >>> module.up, module.up_bias = nnx.Param(jnp.eye(2)), nnx.Param(jnp.ones(2))
        >>> project(module, "up", jnp.array([[1.0, 2.0]])).tolist()
        [[2.0, 3.0]]
    """
    # Of rows alone: with two leading axes XLA's CPU compiler fuses the gradient's elementwise part
    # into a transposed copy, a fifth of a backward pass.
    rows = x.reshape(-1, x.shape[-1]) @ matrix(module, name).astype(x.dtype)
    y = rows.reshape(*x.shape[:-1], -1)
    if hasattr(module, name + LORA_A):
        a, b = (getattr(module, name + part)[...].astype(x.dtype) for part in (LORA_A, LORA_B))
        y += (x @ a) @ b * module.lora_scale
    if hasattr(module, f"{name}_bias"):
        added = getattr(module, f"{name}_bias")[...].astype(y.dtype)
        y += jnp.expand_dims(added, tuple(range(y.ndim - 1)))
    return y


def projections(module: Any, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
    """`project` by several matrices, for whose backward pass x is kept once.

    Args:
        module: Holds the parameters of one layer.
        names: The matrices.
        x: [..., in].

    Returns:
        [..., out] of each.

    Example:
        >>> module = nnx.Module()
        >>> module.gate, module.up = nnx.Param(jnp.eye(2)), nnx.Param(2 * jnp.eye(2))
        >>> [y.tolist() for y in projections(module, ("gate", "up"), jnp.array([[1.0, 2.0]]))]
        [[[1.0, 2.0]], [[2.0, 4.0]]]
    """
    # Each product keeps what it has read: of rows made anew for each, a scan over layers stacks as
    # many copies.
    rows = x.reshape(-1, x.shape[-1])
    return [project(module, name, rows).reshape(*x.shape[:-1], -1) for name in names]


def matrix(module: nnx.Module, name: str) -> jax.Array:
    """A matrix as numbers, without its adapter.

    Args:
        module: Holds it.
        name: Which.

    Returns:
        Its values, or those that a quantised one stands for.

    Example:
        >>> module = nnx.Module()
        >>> module.up = nnx.Param(jnp.array([[2, 4]], "int8"))
        >>> module.up_scale = nnx.Param(jnp.array([[0.5, 0.25]]))
        >>> matrix(module, "up").tolist()
        [[1.0, 1.0]]
    """
    values = getattr(module, name)[...]
    if not hasattr(module, name + SCALE):
        return values
    return qwix.dequantize(qwix.QArray(values, getattr(module, name + SCALE)[...]))


def table_rows(module: nnx.Module, name: str, index: jax.Array) -> jax.Array:
    """Rows of an embedding table.

    Args:
        module: Holds it.
        name: Which.
        index: Integers of any shape.

    Returns:
        [*index.shape, D].

    Example:
        >>> module = nnx.Module()
        >>> module.embed = nnx.Param(jnp.array([[2, 4], [6, 8]], "int8"))
        >>> module.embed_scale = nnx.Param(jnp.array([[0.5], [0.25]]))
        >>> table_rows(module, "embed", jnp.array([1])).tolist()
        [[1.5, 2.0]]
    """
    taken = _rows(getattr(module, name), index)
    if not hasattr(module, name + SCALE):
        return taken
    return qwix.dequantize(qwix.QArray(taken, _rows(getattr(module, name + SCALE), index)))


def _rows(table: nnx.Param, index: jax.Array) -> jax.Array:
    """Rows of a table: where a mesh is set, of its parts."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table[...][index]
    spec, batch = partition_spec(table.get_metadata("axes")), PartitionSpec(RULES["batch"])
    if index.ndim > 1 and index.shape[1] % mesh.shape["sequence"] == 0:
        batch = PartitionSpec(RULES["batch"], RULES["length"])
    lookup = functools.partial(_own_rows, rows_axis=spec[0], columns_axis=spec[1])
    over_shards = jax.shard_map(lookup, mesh=mesh, in_specs=(spec, batch), out_specs=batch)
    count = len(index)
    widths = [(0, -count % batch_shards(mesh)), *((0, 0) for _ in index.shape[1:])]
    return over_shards(table[...], jnp.pad(index, widths))[:count]


def _own_rows(
    table: jax.Array, index: jax.Array, *, rows_axis: str, columns_axis: str | None
) -> jax.Array:
    """A device's part of the batch, from the parts of the table that it and others have.

    Left to itself the compiler may gather the table, or sum gradients of all of its rows.
    """
    if columns_axis:
        index = lax.all_gather(index, columns_axis, tiled=True)
    count = table.shape[0]
    own = index - lax.axis_index(rows_axis) * count
    own = jnp.where((own >= 0) & (own < count), own, count)
    rows = lax.psum(table.at[own].get(mode="fill", fill_value=0), rows_axis)
    if columns_axis:
        last = rows.ndim - 1
        rows = lax.all_to_all(rows, columns_axis, split_axis=0, concat_axis=last, tiled=True)
    return rows


def layer_matrices(model: nnx.Module) -> Iterator[tuple[str, Any, str]]:
    """Every matrix that each layer has of its own: what can be quantised to 4 bits, or adapted.

    Args:
        model: A model with parameters stacked over its layers.

    Yields:
        Its path, the module that holds it, and its name there.

    Example:
        >>> from uld_jax.models import Decoder
        >>> from uld_jax.testing import tiny_config
        >>> [path for path, _, _ in layer_matrices(Decoder(tiny_config(), rngs=nnx.Rngs(0)))][:2]
        ['blocks.attention.key', 'blocks.attention.out']
    """
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        names = [str(part) for part in path]
        own = param.get_metadata("axes")[0] == "layers" and len(param.shape) == 3
        if own and not names[-1].endswith((SCALE, LORA_A, LORA_B)):
            module: Any = model
            for name in names[:-1]:
                module = getattr(module, name)
            yield ".".join(names), module, names[-1]
