"""The one decoder of all families: parameters stacked over layers, one scanned block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uld_jax.models import layers
from uld_jax.models.cache import KVCache
from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.sharding import constrain

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: Any) -> nnx.Param:
    """A weight with GPT-2's initial scale, and its logical axes for `uld_jax.sharding`."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


def _scale(shape: tuple[int, ...], axes: tuple[str, ...], offset: float, dtype: Any) -> nnx.Param:
    return nnx.Param(jnp.full(shape, 1.0 - offset, dtype), axes=axes)


class Attention(nnx.Module):
    """Projections of all layers' attention, stacked."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        n, d = c.layers, c.width
        self.query = _param(rngs, (n, d, c.query_width), ("layers", "embed", "heads"), dtype)
        self.key = _param(rngs, (n, d, c.kv_width), ("layers", "embed", "kv_heads"), dtype)
        self.value = _param(rngs, (n, d, c.kv_width), ("layers", "embed", "kv_heads"), dtype)
        self.out = _param(rngs, (n, c.query_width, d), ("layers", "heads", "embed"), dtype)
        if c.qk_norm:
            axes, shape = ("layers", "head_dim"), (n, c.head_dim)
            self.query_norm = _scale(shape, axes, c.norm_offset, dtype)
            self.key_norm = _scale(shape, axes, c.norm_offset, dtype)


class GatedMLP(nnx.Module):
    """Projections of all layers' gated MLP, stacked."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        n, d, f = c.layers, c.width, c.mlp_width
        self.gate = _param(rngs, (n, d, f), ("layers", "embed", "mlp"), dtype)
        self.up = _param(rngs, (n, d, f), ("layers", "embed", "mlp"), dtype)
        self.down = _param(rngs, (n, f, d), ("layers", "mlp", "embed"), dtype)


class Blocks(nnx.Module):
    """All layers' parameters; each has a leading axis of length L."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        scale = functools.partial(
            _scale, (c.layers, c.width), ("layers", "norm"), c.norm_offset, dtype
        )
        self.attention = Attention(c, rngs, dtype)
        self.mlp = GatedMLP(c, rngs, dtype)
        self.attention_norm, self.mlp_norm = scale(), scale()
        if c.post_norms:
            self.attention_post_norm, self.mlp_post_norm = scale(), scale()


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        config: What it is made of.
        policy: How it computes.
        param_dtype: Type of the parameters.
        rngs: Seeds of the random initial weights.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> model = Decoder(tiny_config(), rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)
    """

    def __init__(
        self,
        config: DecoderConfig,
        policy: Policy | None = None,
        *,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.policy = config, policy or Policy()
        table = (config.vocab_size, config.width)
        self.embed = _param(rngs, table, ("vocab", "embed"), param_dtype)
        self.blocks = Blocks(config, rngs, param_dtype)
        self.norm = _scale((config.width,), ("norm",), config.norm_offset, param_dtype)
        if not config.tied:
            self.head = _param(rngs, table, ("vocab", "embed"), param_dtype)

    @property
    def head_VD(self) -> jax.Array:
        """The output head, one row a token: logits = hidden · headᵀ."""
        return (self.embed if self.config.tied else self.head)[...]

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits.

        Args:
            tokens_BT: int32 token ids.
            positions: int32[B, T], by default 0 … T-1.
            segment_ids: int32[B, T]: tokens see their own segment only; 0 for padding.

        Returns:
            f32[B, T, V].
        """
        return self.logits(self.hidden(tokens_BT, positions, segment_ids))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of final hidden states [..., D]."""
        head_VD = self.head_VD.astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, head_VD, preferred_element_type=jnp.float32)
        return layers.softcap(logits, self.config.logit_softcap)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D], after the last norm: what the head multiplies."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        mask = layers.attention_mask(positions, positions, segment_ids, segment_ids)
        x_BTD, _ = self._run(tokens_BT, positions, positions, mask, None)
        return x_BTD

    def read(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Reads tokens into the cache: prefill with a whole prompt, decode with one token.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: Their positions; -1 marks padding, which no later token sees.
            cache: The cache so far, with at least T free slots.

        Returns:
            Final hidden states [B, T, D] and the cache with the tokens in it.
        """
        slots = (0, cache.length)
        k_positions = jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, slots)
        mask = layers.attention_mask(positions_BT, k_positions)
        x_BTD, (k, v) = self._run(tokens_BT, positions_BT, k_positions, mask, cache)
        return x_BTD, KVCache(k, v, k_positions, cache.length + tokens_BT.shape[1])

    def _run(
        self,
        tokens_BT: jax.Array,
        q_positions: jax.Array,
        k_positions: jax.Array,
        mask_BTS: jax.Array,
        cache: KVCache | None,
    ) -> tuple[jax.Array, Any]:
        """Embeds, scans the block over the layers, and norms."""
        c, dtype = self.config, jnp.dtype(self.policy.dtype)
        x_BTD = self.embed[...][tokens_BT].astype(dtype) * jnp.asarray(c.embed_scale, dtype)
        x_BTD = constrain(x_BTD, "batch", None, None)
        angles = layers.rotary_angles(q_positions, c.head_dim, c.rope_theta)
        views = [(mask_BTS, angles)]
        if c.window:
            near = q_positions[:, :, None] - k_positions[:, None, :] < c.window
            local = layers.rotary_angles(q_positions, c.head_dim, c.rope_local_theta)
            views.append((mask_BTS & near, local))
        graph, params = nnx.split(self.blocks)

        def body(carry: Any, layer: Any) -> tuple[Any, None]:
            x_BTD, kv = carry
            weights, is_local, index = layer
            mask, angles = views[0]
            if c.window:
                mask, angles = (jnp.where(is_local, b, a) for a, b in zip(*views, strict=True))
            kernels = jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, weights)
            block = nnx.merge(graph, kernels)
            return _block(c, block, x_BTD, mask, angles, kv, index, cache), None

        if self.policy.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.policy.remat])
        flags = jnp.array(c.local_layers or (False,) * c.layers)
        kv = None if cache is None else (cache.k_LBSKh, cache.v_LBSKh)
        (x_BTD, kv), _ = jax.lax.scan(body, (x_BTD, kv), (params, flags, jnp.arange(c.layers)))
        return layers.rms_norm(x_BTD, self.norm[...], eps=c.norm_eps, offset=c.norm_offset), kv


def _block(
    c: DecoderConfig,
    p: Blocks,
    x_BTD: jax.Array,
    mask_BTS: jax.Array,
    angles: jax.Array,
    kv: Any,
    index: jax.Array,
    cache: KVCache | None,
) -> tuple[jax.Array, Any]:
    """One layer: norm → attention → residual, norm → gated MLP → residual."""
    norm = functools.partial(layers.rms_norm, eps=c.norm_eps, offset=c.norm_offset)
    a = p.attention
    y_BTD = norm(x_BTD, p.attention_norm[...])
    q, k, v = (layers.head_split(y_BTD @ w[...], c) for w in (a.query, a.key, a.value))
    if c.qk_norm:
        q, k = norm(q, a.query_norm[...]), norm(k, a.key_norm[...])
    q, k = layers.rotate(q, angles), layers.rotate(k, angles)
    if cache is not None:
        # The stacked cache is the scan's carry, so that XLA updates it in place.
        start = (index, 0, cache.length, 0, 0)
        kv = tuple(
            jax.lax.dynamic_update_slice(all_, new[None].astype(all_.dtype), start)
            for all_, new in zip(kv, (k, v), strict=True)
        )
        k, v = (
            jax.lax.dynamic_index_in_dim(all_, index, keepdims=False).astype(q.dtype) for all_ in kv
        )
    y_BTHh = layers.attention(q, k, v, mask_BTS, scale=c.query_scale, softcap=c.attention_softcap)
    y_BTD = y_BTHh.reshape(*x_BTD.shape[:2], -1) @ a.out[...]
    x_BTD += norm(y_BTD, p.attention_post_norm[...]) if c.post_norms else y_BTD
    m = p.mlp
    y_BTD = norm(x_BTD, p.mlp_norm[...])
    y_BTD = layers.gated_mlp(y_BTD, m.gate[...], m.up[...], m.down[...], c.activation)
    x_BTD += norm(y_BTD, p.mlp_post_norm[...]) if c.post_norms else y_BTD
    return constrain(x_BTD, "batch", None, None), kv


def parameters(model: Decoder) -> nnx.State:
    """A model's parameters as a tree of nnx.Param.

    Args:
        model: The decoder.

    Returns:
        The tree.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> parameters(Decoder(tiny_config(), rngs=nnx.Rngs(0)))["norm"].shape
        (32,)
    """
    return nnx.state(model, nnx.Param)
