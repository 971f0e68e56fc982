"""What can be kept of the layers on the way to the final hidden states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Told of a layer: its output [B, T, D], its queries [B, T, H, h] and its keys [B, S, K, h] as its
# attention multiplies them. What it returns, a tree of arrays, is kept for every layer.
Watch = Callable[[jax.Array, jax.Array, jax.Array], Any]


class Features(NamedTuple):
    """What a model computes, and what a `Watch` has kept of how it came to that.

    Attributes:
        hidden_BTD: Final hidden states, as `hidden` returns them.
        layers: What the watch returned, stacked over the layers; None without one.
        bias_BHTS: What every layer adds to the scores of its attention, [1 or B, H, T, S] (ALiBi,
            T5's table), or None.

    Example:
        >>> Features(jax.numpy.ones((1, 2, 4)), None, None).hidden_BTD.shape
        (1, 2, 4)
    """

    hidden_BTD: jax.Array
    layers: Any
    bias_BHTS: jax.Array | None
