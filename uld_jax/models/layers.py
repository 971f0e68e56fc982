"""The decoder's parts as pure functions over arrays: norm, rotation, attention, gated MLP."""

import jax
import jax.numpy as jnp

from uld_jax.models.config import DecoderConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rms_norm(x: jax.Array, scale_D: jax.Array, *, eps: float, offset: float) -> jax.Array:
    """Root-mean-square norm in float32: x / sqrt(mean(x²) + eps) · (offset + scale).

    Args:
        x: [..., D].
        scale_D: [D].
        eps: Added to the mean square.
        offset: 0 (Llama) or 1 (Gemma).

    Returns:
        [..., D] in x's dtype.

    Example:
        >>> y = rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), eps=0.0, offset=0.0)
        >>> [round(value, 3) for value in y.tolist()]
        [0.849, 1.131]
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = jnp.expand_dims(offset + scale_D.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (x32 * scale).astype(x.dtype)


def rotary_angles(positions_BT: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Rotation angles [B, T, head_dim / 2] in radians: position · theta^(-2i / head_dim).

    Example:
        >>> rotary_angles(jnp.array([[1]]), 4, 100.0).tolist()
        [[[1.0, 0.10000000149011612]]]
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    inverse = jnp.reshape(theta**-exponents, (1, 1, -1))
    return positions_BT[..., None].astype(jnp.float32) * inverse


def rotate(x_BTHh: jax.Array, angles_BTr: jax.Array) -> jax.Array:
    """Rotates the two halves of every head by the angles (the Hugging Face layout of RoPE).

    Args:
        x_BTHh: Queries or keys.
        angles_BTr: From `rotary_angles`.

    Returns:
        The rotated heads, in x's dtype.

    Example:
        >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.full((1, 1, 1), jnp.pi)).round(2).tolist()
        [[[[-1.0, -1.0]]]]
    """
    cos, sin = jnp.cos(angles_BTr)[:, :, None, :], jnp.sin(angles_BTr)[:, :, None, :]
    first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHh.dtype)


def attention_mask(
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None = None,
    k_segments_BS: jax.Array | None = None,
) -> jax.Array:
    """Who may look at whom: causal, within the segment, never at an empty slot (position -1).

    Args:
        q_positions_BT: Positions of the queries.
        k_positions_BS: Positions of the keys; -1 marks an empty cache slot.
        q_segments_BT: Segment ids of the queries (0 for padding), or None for one segment.
        k_segments_BS: Segment ids of the keys.

    Returns:
        bool[B, T, S], True where query t sees key s.

    Example:
        >>> attention_mask(jnp.array([[0, 1]]), jnp.array([[0, 1]])).tolist()
        [[[True, False], [True, True]]]
    """
    q, k = q_positions_BT[:, :, None], k_positions_BS[:, None, :]
    mask = (k <= q) & (k >= 0)
    if q_segments_BT is not None and k_segments_BS is not None:
        mask &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    return mask


def attention(
    q_BTHh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    mask_BTS: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """Grouped-query attention, softmax in float32.

    Args:
        q_BTHh: Queries.
        k_BSKh: Keys, K dividing H.
        v_BSKh: Values.
        mask_BTS: True where a query sees a key.
        scale: Factor on the products.
        softcap: c in c · tanh(score / c); 0 for none.

    Returns:
        [B, T, H, h] in the queries' dtype.

    Example:
        >>> x = jnp.ones((1, 2, 2, 4))
        >>> attention(x, x[:, :, :1], x[:, :, :1], jnp.ones((1, 2, 2), bool), scale=0.5).shape
        (1, 2, 2, 4)
    """
    if not softcap:
        mask_BHTS = mask_BTS[:, None, :, :]
        return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, mask=mask_BHTS, scale=scale)
    # jax.nn.dot_product_attention has no soft-cap.
    b, t, h, d = q_BTHh.shape
    groups = k_BSKh.shape[2]
    q = q_BTHh.reshape(b, t, groups, h // groups, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k_BSKh, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * (scale / softcap))
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKh.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v_BSKh).reshape(b, t, h, d)


def gated_mlp(
    x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array, activation: str
) -> jax.Array:
    """The gated MLP: (act(x · gate) * (x · up)) · down.

    Example:
        >>> w = jnp.ones((2, 3))
        >>> gated_mlp(jnp.ones((1, 1, 2)), w, w, w.T, "silu").shape
        (1, 1, 2)
    """
    return (ACTIVATIONS[activation](x_BTD @ gate_DF) * (x_BTD @ up_DF)) @ down_FD


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Squashes into (-cap, cap): cap · tanh(x / cap); the identity where cap is 0.

    Example:
        >>> softcap(jnp.array(1e9), 30.0).item()
        30.0
    """
    return cap * jnp.tanh(x / cap) if cap else x


def head_split(x_BTX: jax.Array, config: DecoderConfig) -> jax.Array:
    """Cuts a projection [B, T, heads · head_dim] into heads [B, T, heads, head_dim].

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> head_split(jnp.ones((1, 2, 32)), tiny_config()).shape
        (1, 2, 4, 8)
    """
    return x_BTX.reshape(*x_BTX.shape[:2], -1, config.head_dim)
