"""A checksum of a model as it is held: the same on every mesh, another for other weights."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from uld_jax.models.decoder import parameters
from uld_jax.models.hf_io import LoadedModel


def fingerprint(m: LoadedModel) -> str:
    """A checksum of a model's config and weights.

    Of each array it takes the sum, modulo 2³², of a hash of each element's bits and place: exact
    in any order, so that no mesh changes it, and one pass over the memory. It tells one set of
    weights from another; it is no defence against forgery.

    Args:
        m: The model.

    Returns:
        SHA-256 in hexadecimal digits.

    Example:
        >>> from uld_jax.testing import tiny_model
        >>> fingerprint(tiny_model(seed=1)) == fingerprint(tiny_model(seed=1))
        True
        >>> fingerprint(tiny_model(seed=1)) == fingerprint(tiny_model(seed=2))
        False
    """
    leaves = jax.tree.leaves_with_path(parameters(m.model))
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    described = [
        (jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, int(total))
        for (path, leaf), total in zip(leaves, sums, strict=True)
    ]
    record = {"config": dataclasses.asdict(m.config), "weights": described}
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_hashes(leaf).sum() for leaf in leaves]


def _hashes(x: jax.Array) -> jax.Array:
    """uint32, of each element and its place: a sum of bits alone would not see signs change."""
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # The constants of xxHash's 32-bit mixing.
    mixed = _bits(x) * jnp.uint32(0x85EBCA77) + place * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE3D)
    return mixed ^ (mixed >> 13)


def _bits(x: jax.Array) -> Any:
    """Bit patterns as uint32, those of narrow integers as they are extended."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return x.astype(jnp.uint32)
