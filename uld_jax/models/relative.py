"""Relative position biases (T5): distances in buckets, one learned score a bucket and head."""

import jax
import jax.numpy as jnp
import numpy as np


def bucket_table(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0 … max_distance: one each at first, then logarithmic ones.

        bucket(d) = d for d < b/2, else b/2 + floor(b/2 · log(2d/b) / log(2·max_distance/b))

    Args:
        buckets: b, buckets of one direction.
        max_distance: From here on all distances share the last bucket.

    Returns:
        int32[max_distance + 1].

    Example:
        >>> bucket_table(4, 8).tolist()
        [0, 1, 2, 2, 3, 3, 3, 3, 3]

    Reference:
        Raffel et al., arXiv 1910.10683, section 2.1.
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    # float32, in this order, as in the published code: the borders of buckets depend on it.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)
    coarse = np.minimum(exact + ratio.astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, coarse).astype(np.int32)


def position_bias(
    table_bH: jax.Array,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    *,
    bidirectional: bool,
    max_distance: int,
) -> jax.Array:
    """What the distance from query to key adds to the scores of each head.

    Args:
        table_bH: One row a bucket; with `bidirectional`, the second half is for later keys.
        q_positions_BT: int32 positions of the queries.
        k_positions_BS: int32 positions of the keys.
        bidirectional: Whether later keys have buckets of their own (else they share bucket 0).
        max_distance: See `bucket_table`.

    Returns:
        f32[B, H, T, S].

    Example:
        >>> table = jnp.arange(4.0)[:, None]
        >>> at = jnp.arange(3)[None]
        >>> position_bias(table, at, at, bidirectional=True, max_distance=8)[0, 0].tolist()
        [[0.0, 3.0, 3.0], [1.0, 0.0, 3.0], [1.0, 1.0, 0.0]]
    """
    after_BTS = k_positions_BS[:, None, :] - q_positions_BT[:, :, None]
    side = table_bH.shape[0] // 2 if bidirectional else table_bH.shape[0]
    distance_BTS = jnp.abs(after_BTS) if bidirectional else jnp.maximum(-after_BTS, 0)
    of_distance = jnp.asarray(bucket_table(side, max_distance))
    bucket_BTS = of_distance[jnp.minimum(distance_BTS, max_distance)]
    if bidirectional:
        bucket_BTS += jnp.where(after_BTS > 0, side, 0)
    return jnp.moveaxis(table_bH.astype(jnp.float32)[bucket_BTS], -1, 1)
