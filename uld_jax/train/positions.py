"""The answer positions of a batch: taken out of its rows, and spread over the devices."""

import jax
import jax.numpy as jnp

from uld_jax.sharding import constrain


def take_positions(hidden_BTD: jax.Array, index_GN: jax.Array) -> jax.Array:
    """Gathers the answer positions of each group's rows: only they meet the vocabulary.

    Args:
        hidden_BTD: Hidden states; rows B in G groups of R.
        index_GN: Index into each group's R · T positions.

    Returns:
        [G, N, D].

    Example:
        >>> hidden_BTD = jnp.arange(8.0).reshape(2, 4, 1)
        >>> take_positions(hidden_BTD, jnp.array([[1, 4]]))[..., 0].tolist()
        [[1.0, 4.0]]
    """
    _, length, width = hidden_BTD.shape
    grouped = hidden_BTD.reshape(index_GN.shape[0], -1, length, width)
    # By row and token, so that rows in parts (the mesh's sequence axis) need not be joined.
    taken = jax.vmap(lambda rows_RTD, row_N, at_N: rows_RTD[row_N, at_N])(
        grouped, index_GN // length, index_GN % length
    )
    return constrain(taken, "batch", None, None)


def spread_positions(x_GN: jax.Array) -> jax.Array:
    """Gives each of the n devices of the mesh's sequence axis a part of its group's positions.

    All of them have all positions, which are few; their logits are not.

    Args:
        x_GN: [G, N, ...].

    Returns:
        [G * n, N / n, ...], N padded with zeros to a multiple of n.

    Example:
        >>> spread_positions(jnp.ones((2, 3))).shape
        (2, 3)
    """
    parts = jax.sharding.get_abstract_mesh().shape.get("sequence", 1)
    groups, count, *rest = x_GN.shape
    widths = [(0, 0), (0, -count % parts), *((0, 0) for _ in rest)]
    spread = jnp.pad(x_GN, widths).reshape(groups * parts, -1, *rest)
    return constrain(spread, "rows", *(None for _ in spread.shape[1:]))
