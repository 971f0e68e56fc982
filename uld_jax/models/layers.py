"""The decoder's parts as pure functions over arrays: norms, attention, MLP."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# On a CPU products with at most so many rows wait for the memory of the other factor.
FEW_ROWS = 64

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
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


def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, *, eps: float) -> jax.Array:
    """LayerNorm in float32: (x - mean) / sqrt(variance + eps) · scale + bias.

    Args:
        x: [..., D].
        scale_D: [D].
        bias_D: [D].
        eps: Added to the variance.

    Returns:
        [..., D] in x's dtype.

    Example:
        >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.ones(2), eps=0.0).tolist()
        [0.0, 2.0]
    """
    x32 = x.astype(jnp.float32)
    x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    leading = tuple(range(x.ndim - 1))
    scale, bias = (jnp.expand_dims(p.astype(jnp.float32), leading) for p in (scale_D, bias_D))
    return (x32 * scale + bias).astype(x.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head: 2^(-8i / n) for n heads, a power of two, and between for others.

    Args:
        heads: H.

    Returns:
        f32[H].

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]

    Reference:
        Press et al., arXiv 2108.12409, section 3.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    # Heads beyond the power of two take every second slope of twice as many.
    between = 2.0 ** (-4 * np.arange(1, 2 * (heads - power) + 1, 2) / power)
    return np.concatenate([slopes, between]).astype(np.float32)


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
    bias_BHTS: jax.Array | None = None,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> jax.Array:
    """Grouped-query attention, softmax in float32.

    Args:
        q_BTHh: Queries.
        k_BSKh: Keys, K dividing H.
        v_BSKh: Values.
        mask_BTS: True where a query sees a key.
        scale: Factor on the products.
        softcap: c in c · tanh(score / c); 0 for none.
        bias_BHTS: Added to the scores (ALiBi), or None.
        implementation: Of `jax.nn.dot_product_attention`; a soft-cap is always "xla".

    Returns:
        [B, T, H, h] in the queries' dtype.

    Example:
        >>> x = jnp.ones((1, 2, 2, 4))
        >>> attention(x, x[:, :, :1], x[:, :, :1], jnp.ones((1, 2, 2), bool), scale=0.5).shape
        (1, 2, 2, 4)
    """
    if not softcap:
        mask_BHTS = mask_BTS[:, None, :, :]
        return jax.nn.dot_product_attention(
            q_BTHh,
            k_BSKh,
            v_BSKh,
            bias=bias_BHTS,
            mask=mask_BHTS,
            scale=scale,
            implementation=implementation,
        )
    # jax.nn.dot_product_attention has no soft-cap.
    b, t, h, d = q_BTHh.shape
    groups = k_BSKh.shape[2]
    q = q_BTHh.reshape(b, t, groups, h // groups, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k_BSKh, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * (scale / softcap))
    if bias_BHTS is not None:
        scores += bias_BHTS.reshape(scores.shape)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKh.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v_BSKh).reshape(b, t, h, d)


def table_product(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """X · tableᵀ in float32: every row of x by every row of a table.

    Args:
        x: [..., D].
        table_VD: [V, D], much larger than x where x is one token a row.

    Returns:
        f32[..., V].

    Example:
        >>> table_product(jnp.array([1.0, 2.0]), jnp.eye(2)).tolist()
        [1.0, 2.0]
    """
    if math.prod(x.shape[:-1]) > FEW_ROWS:
        return _by_table(x, table_VD)
    return jax.lax.platform_dependent(x, table_VD, cpu=_table_by, default=_by_table)


def _by_table(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", x, table_VD, preferred_element_type=jnp.float32)


def _table_by(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    # The CPU's kernels read the left factor as it lies, and repack the right one: let x be that.
    rows_ND = x.reshape(-1, x.shape[-1])
    product_VN = jnp.einsum("vd,nd->vn", table_VD, rows_ND, preferred_element_type=jnp.float32)
    # Without the barrier XLA swaps the factors back.
    product_NV = jax.lax.optimization_barrier(product_VN).T
    return product_NV.reshape(*x.shape[:-1], -1)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Squashes into (-cap, cap): cap · tanh(x / cap); the identity where cap is 0.

    Example:
        >>> softcap(jnp.array(1e9), 30.0).item()
        30.0
    """
    return cap * jnp.tanh(x / cap) if cap else x


def head_split(x_BTX: jax.Array, head_dim: int) -> jax.Array:
    """Cuts a projection [B, T, heads · head_dim] into heads [B, T, heads, head_dim].

    Example:
        >>> head_split(jnp.ones((1, 2, 32)), 8).shape
        (1, 2, 4, 8)
    """
    return x_BTX.reshape(*x_BTX.shape[:2], -1, head_dim)
