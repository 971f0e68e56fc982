"""The key-value cache: every layer's keys and values in one array each, and where they stand.

It is a ring of slots with one cursor for all rows. A row that ends makes room for another prompt
without a word to the others: the new prompt is moved to the slots just before the cursor, and all
rows go on from there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from uld_jax.models.config import DecoderConfig
from uld_jax.sharding import constrain


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
    """What the decoder has read, and what it looks at in the encoder.

    Args:
        own: Keys and values of the decoder's own tokens.
        k_LBPHh: Keys of the prompt, computed once.
        v_LBPHh: Values of the prompt.
        mask_BP: True on the prompt's tokens.
    """

    own: KVCache
    k_LBPHh: jax.Array
    v_LBPHh: jax.Array
    mask_BP: jax.Array

    @property
    def length(self) -> jax.Array:
        """The next slot to be written."""
        return self.own.length

    @property
    def positions_BS(self) -> jax.Array:
        """The position of the token in each slot, -1 for an empty one."""
        return self.own.positions_BS


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


def widen_prompts(cache: Any, width: int) -> Any:
    """Pads the prompts that an encoder-decoder looks at; a decoder's cache stays as it is.

    Args:
        cache: A KVCache or CrossCache.
        width: The new P, at least the old one.

    Returns:
        The cache.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> own = empty_cache(tiny_config(), 1, 4, "float32")
        >>> kv = jnp.ones((2, 1, 3, 2, 8))
        >>> widen_prompts(CrossCache(own, kv, kv, jnp.ones((1, 3), bool)), 5).mask_BP.tolist()
        [[True, True, True, False, False]]
    """
    if isinstance(cache, KVCache):
        return cache
    more = width - cache.mask_BP.shape[1]
    k, v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))
        for x in (cache.k_LBPHh, cache.v_LBPHh)
    )
    return CrossCache(cache.own, k, v, jnp.pad(cache.mask_BP, ((0, 0), (0, more))))


def replace_rows(cache: Any, fresh: Any, rows_R: jax.Array) -> Any:
    """Puts rows that were read elsewhere in the place of rows that have ended.

    Args:
        cache: The cache of all B rows, a KVCache or CrossCache.
        fresh: The new rows' cache, of the same kind and as wide. What was read into it is moved
            so that it ends at the cursor of `cache`.
        rows_R: int32, which row each replaces; B or more to drop it.

    Returns:
        The cache, its cursor where it was.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> old, new = (empty_cache(tiny_config(), rows, 4, "float32") for rows in (2, 1))
        >>> old = dataclasses.replace(old, length=jnp.array(3))
        >>> new = dataclasses.replace(
        ...     new, positions_BS=jnp.array([[0, 1, -1, -1]]), length=jnp.array(2)
        ... )
        >>> replace_rows(old, new, jnp.array([1])).positions_BS.tolist()
        [[-1, -1, -1, -1], [-1, 0, 1, -1]]
    """
    if isinstance(cache, CrossCache):
        own = replace_rows(cache.own, fresh.own, rows_R)
        k, v = (
            old.at[:, rows_R].set(new, mode="drop")
            for old, new in ((cache.k_LBPHh, fresh.k_LBPHh), (cache.v_LBPHh, fresh.v_LBPHh))
        )
        return CrossCache(own, k, v, cache.mask_BP.at[rows_R].set(fresh.mask_BP, mode="drop"))
    by = cache.length - fresh.length
    # Whole rows are replaced, so that nothing of the old prompt is left.
    k, v = (
        old.at[:, rows_R].set(jnp.roll(new, by, axis=2), mode="drop")
        for old, new in ((cache.k_LBSKh, fresh.k_LBSKh), (cache.v_LBSKh, fresh.v_LBSKh))
    )
    positions_RS = jnp.roll(fresh.positions_BS, by, axis=1)
    return KVCache(k, v, cache.positions_BS.at[rows_R].set(positions_RS, mode="drop"), cache.length)


def pin(cache: Any) -> Any:
    """Lays rows over the mesh's batch axes and heads over its tensor axis, where a mesh is set.

    Args:
        cache: A KVCache or CrossCache, inside a jitted function.

    Returns:
        The cache.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> pin(empty_cache(tiny_config(), 2, 16, "float32")).positions_BS.shape
        (2, 16)
    """
    if isinstance(cache, CrossCache):
        k, v = (_pin_heads(x) for x in (cache.k_LBPHh, cache.v_LBPHh))
        return CrossCache(pin(cache.own), k, v, constrain(cache.mask_BP, "batch", None))
    return KVCache(
        k_LBSKh=_pin_heads(cache.k_LBSKh),
        v_LBSKh=_pin_heads(cache.v_LBSKh),
        positions_BS=constrain(cache.positions_BS, "batch", None),
        length=constrain(cache.length),
    )


def _pin_heads(x_LBSKh: jax.Array) -> jax.Array:
    # One key head serves all query heads in some families: each tensor shard then holds it.
    shards = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    heads = "kv_heads" if x_LBSKh.shape[3] % shards == 0 else None
    return constrain(x_LBSKh, "layers", "batch", None, heads, None)
