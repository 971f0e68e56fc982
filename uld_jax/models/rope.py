"""Rotary position embeddings: the frequencies of every scaling, and the rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from uld_jax.models.config import RopeScaling


def rotary_frequencies(
    dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    length: int = 0,
    max_positions: int = 0,
) -> np.ndarray:
    """Radians a position of each rotated pair: theta^(-2i / dim), stretched by the scaling.

    The two scalings that depend on the length of the text ("dynamic" and "longrope") go by the
    room of the whole computation, prompt and answer, so that one text is rotated one way.

    Args:
        dim: Rotated dimensions of a head.
        theta: The base.
        scaling: The stretch, or None.
        length: Positions that the computation has room for.
        max_positions: Longest sequence the model was trained for ("dynamic").

    Returns:
        f32[dim / 2].

    Example:
        >>> rotary_frequencies(4, 100.0, RopeScaling("linear", factor=2.0)).tolist()
        [0.5, 0.05000000074505806]

    Reference:
        Su et al., arXiv 2104.09864; Peng et al., arXiv 2309.00071 ("yarn"); Ding et al.,
        arXiv 2402.13753 ("longrope").
    """
    exponents = np.arange(0, dim, 2) / dim
    if scaling is not None and scaling.kind == "dynamic":
        stretch = scaling.factor * max(length, max_positions) / max_positions
        theta *= (stretch - scaling.factor + 1) ** (dim / (dim - 2))
    plain = theta**-exponents
    if scaling is None or scaling.kind == "dynamic":
        stretched = plain
    elif scaling.kind == "linear":
        stretched = plain / scaling.factor
    elif scaling.kind == "llama3":
        kept = scaling.original_positions * plain / (2 * math.pi) - scaling.low_frequency
        kept = np.clip(kept / (scaling.high_frequency - scaling.low_frequency), 0, 1)
        stretched = plain * (kept + (1 - kept) / scaling.factor)
    elif scaling.kind == "yarn":
        kept = _yarn_kept(dim, theta, scaling)
        stretched = plain * (kept + (1 - kept) / scaling.factor)
    else:
        long = length > scaling.original_positions
        stretched = plain / np.asarray(scaling.long_factors if long else scaling.short_factors)
    return stretched.astype(np.float32)


def _yarn_kept(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """The share of each frequency that is left as it is."""

    def dimension_of(turns: float) -> float:
        return (
            dim
            * math.log(scaling.original_positions / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # Where both bounds meet, the ramp is a step.
    ramp = (np.arange(dim // 2) - low) / (high - low or 0.001)
    return 1 - np.clip(ramp, 0, 1)


def rotary_angles(positions_BT: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotation angles [B, T, dim / 2] in radians: position · frequency.

    Example:
        >>> rotary_angles(jnp.array([[2]]), rotary_frequencies(4, 100.0)).tolist()
        [[[2.0, 0.20000000298023224]]]
    """
    return positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]


def rotate(x_BTHh: jax.Array, angles_BTr: jax.Array, factor: float = 1.0) -> jax.Array:
    """Rotates the first 2r dimensions of every head by halves (the Hugging Face layout of RoPE).

    Args:
        x_BTHh: Queries or keys.
        angles_BTr: From `rotary_angles`; dimensions beyond 2r stay as they are.
        factor: On what is rotated ("yarn" and "longrope" scale it).

    Returns:
        The rotated heads, in x's dtype.

    Example:
        >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.full((1, 1, 1), jnp.pi)).round(2).tolist()
        [[[[-1.0, -1.0]]]]
    """
    half = angles_BTr.shape[-1]
    cos, sin = (factor * f(angles_BTr)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    x = x_BTHh.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    parts = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(parts, axis=-1).astype(x_BTHh.dtype)
