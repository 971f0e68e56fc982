"""The key-value cache: every layer's keys and values in one array each, and where they stand."""

import dataclasses

import jax
import jax.numpy as jnp

from uld_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far.

    Rows may have prompts of different lengths: a slot knows its token's position, and -1 marks a
    slot that holds none. Masks come from these positions, so ragged prompts, padding and sliding
    windows need no further bookkeeping.

    Args:
        k_LBSKh: Keys, rotated.
        v_LBSKh: Values.
        positions_BS: int32, the position of the token in each slot, -1 for an empty slot.
        length: int32 scalar, slots written so far, the same for every row.
    """

    k_LBSKh: jax.Array
    v_LBSKh: jax.Array
    positions_BS: jax.Array
    length: jax.Array


def empty_cache(
    config: DecoderConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike
) -> KVCache:
    """An empty cache.

    Args:
        config: The decoder.
        batch: Rows B.
        slots: Tokens it can hold, S.
        dtype: Type of keys and values.

    Returns:
        The cache, all slots empty.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> empty_cache(tiny_config(), 2, 16, "float32").k_LBSKh.shape
        (2, 2, 16, 2, 8)
    """
    shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
    return KVCache(
        k_LBSKh=jnp.zeros(shape, dtype),
        v_LBSKh=jnp.zeros(shape, dtype),
        positions_BS=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
