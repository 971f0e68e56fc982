"""One block of the decoder: parameters of all layers, stacked, and what one layer computes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uld_jax.models import layers
from uld_jax.models.cache import KVCache
from uld_jax.models.config import DecoderConfig
from uld_jax.models.features import Watch
from uld_jax.models.flash import splash_attention
from uld_jax.models.projection import project, projections
from uld_jax.models.rope import rotary_angles, rotary_frequencies, rotate
from uld_jax.sharding import constrain


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: Any) -> nnx.Param:
    """A weight with GPT-2's initial scale, and its logical axes for `uld_jax.sharding`.

    Example:
        >>> weight(nnx.Rngs(0), (2, 3), ("embed", "mlp"), "float32").shape
        (2, 3)
    """
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


def bias(shape: tuple[int, ...], axes: tuple[str, ...], dtype: Any) -> nnx.Param:
    """A bias, at first zero.

    Example:
        >>> bias((2,), ("norm",), "float32")[...].tolist()
        [0.0, 0.0]
    """
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def add_norm(
    module: nnx.Module,
    name: str,
    c: DecoderConfig,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: Any,
) -> None:
    """Gives a module the parameters of one norm: `name`, and for LayerNorm `name_bias`.

    Args:
        module: Where they go.
        name: The scale's name.
        c: Says which norm.
        shape: Of the scale.
        axes: Its logical axes.
        dtype: Its type.
    """
    setattr(module, name, nnx.Param(jnp.full(shape, 1.0 - c.norm_offset, dtype), axes=axes))
    if c.norm == "layer":
        setattr(module, f"{name}_bias", bias(shape, axes, dtype))


def norm(c: DecoderConfig, module: nnx.Module, name: str, x: jax.Array) -> jax.Array:
    """Applies the norm that `add_norm` made.

    Args:
        c: Says which norm.
        module: Holds its parameters.
        name: The scale's name.
        x: [..., D].

    Returns:
        [..., D] in x's dtype.
    """
    scale = getattr(module, name)[...]
    if c.norm == "rms":
        rms_norm = functools.partial(layers.rms_norm, eps=c.norm_eps, offset=c.norm_offset)
        return recomputed(rms_norm)(x, scale)
    layer_norm = functools.partial(layers.layer_norm, eps=c.norm_eps)
    return recomputed(layer_norm)(x, scale, getattr(module, f"{name}_bias")[...])


class Attention(nnx.Module):
    """Projections of all layers' attention, stacked."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        n, d = c.layers, c.width
        widths = {"query": c.query_width, "key": c.kv_width, "value": c.kv_width}
        for name, width in widths.items():
            axis = "heads" if name == "query" else "kv_heads"
            setattr(self, name, weight(rngs, (n, d, width), ("layers", "embed", axis), dtype))
            if c.qkv_bias:
                setattr(self, f"{name}_bias", bias((n, width), ("layers", axis), dtype))
            if c.qk_norm == "all" and name != "value":
                add_norm(self, f"{name}_norm", c, (n, width), ("layers", axis), dtype)
            elif c.qk_norm == "head" and name != "value":
                shape, axes = (n, c.head_dim), ("layers", "head_dim")
                add_norm(self, f"{name}_norm", c, shape, axes, dtype)
        self.out = weight(rngs, (n, c.query_width, d), ("layers", "heads", "embed"), dtype)
        if c.out_bias:
            self.out_bias = bias((n, d), ("layers", "norm"), dtype)


class MLP(nnx.Module):
    """Projections of all layers' MLP, stacked."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        n, d, f = c.layers, c.width, c.mlp_width
        for name in ("gate", "up") if c.gated else ("up",):
            setattr(self, name, weight(rngs, (n, d, f), ("layers", "embed", "mlp"), dtype))
            if c.mlp_bias:
                setattr(self, f"{name}_bias", bias((n, f), ("layers", "mlp"), dtype))
        self.down = weight(rngs, (n, f, d), ("layers", "mlp", "embed"), dtype)
        if c.mlp_bias:
            self.down_bias = bias((n, d), ("layers", "norm"), dtype)


class Blocks(nnx.Module):
    """All layers' parameters; each has a leading axis of length L."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        self.attention = Attention(c, rngs, dtype)
        self.mlp = MLP(c, rngs, dtype)
        add = functools.partial(
            add_norm, self, c=c, shape=(c.layers, c.width), axes=("layers", "norm"), dtype=dtype
        )
        for part in ("attention",) if c.shared_norm else ("attention", "mlp"):
            if c.norm_placement != "output":
                add(name=f"{part}_norm")
            if c.output_norms:
                add(name=f"{part}_post_norm")


class View:
    """What the queries of a computation may see, for layers that see all and for local ones.

    Args:
        c: The decoder.
        q_positions: int32[B, T], positions of the queries.
        k_positions: int32[B, S], positions of the keys.
        mask_BTS: True where a query of a layer that sees all sees a key.
        backend: "xla", "cudnn" or "splash", which sees by order and segments, not by the mask.
        segments_BT: int32[B, T] for "splash", or None for one segment.
    """

    def __init__(
        self,
        c: DecoderConfig,
        q_positions: jax.Array,
        k_positions: jax.Array,
        mask_BTS: jax.Array,
        backend: str = "xla",
        segments_BT: jax.Array | None = None,
    ) -> None:
        self.config, self.backend, self.segments_BT = c, backend, segments_BT
        room = {"length": k_positions.shape[1], "max_positions": c.max_positions}
        self.bias_BHTS: jax.Array | None = None
        rotations: list[Any] = [None, None]
        if c.positions == "rotary":
            for kind, (theta, scaling) in enumerate(
                ((c.rope_theta, c.rope_scaling), (c.rope_local_theta, c.rope_local_scaling))
            ):
                frequencies = rotary_frequencies(c.rotary_dim, theta, scaling, **room)
                rotations[kind] = rotary_angles(q_positions, frequencies)
        elif c.positions == "alibi":
            distance = (k_positions[:, None, :] - q_positions[:, :, None]).astype(jnp.float32)
            slopes = jnp.asarray(layers.alibi_slopes(c.heads))
            self.bias_BHTS = slopes[None, :, None, None] * distance[:, None]
        self._all = (mask_BTS, rotations[0])
        if c.window:
            near = q_positions[:, :, None] - k_positions[:, None, :] < c.window
            self._local = (mask_BTS & near, rotations[1])

    def of(self, is_local: jax.Array, unrotated: jax.Array) -> tuple[jax.Array, Any]:
        """The mask and the rotation angles of one layer."""
        c = self.config
        if c.window and all(c.local_layers):
            mask, angles = self._local
        elif c.window:
            mask, angles = jax.tree.map(
                functools.partial(jnp.where, is_local), self._local, self._all
            )
        else:
            mask, angles = self._all
        if any(c.unrotated_layers):
            angles = jnp.where(unrotated, 0, angles)
        return mask, angles

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, is_local: jax.Array, mask_BTS: jax.Array
    ) -> jax.Array:
        """One layer's attention, [B, T, H, h]."""
        c = self.config
        if self.backend != "splash":
            plain = self.backend == "xla"
            attention = functools.partial(
                attention_to_whole_rows,
                scale=c.query_scale,
                softcap=c.attention_softcap,
                bias_BHTS=self.bias_BHTS,
                implementation="xla" if plain else "cudnn",
            )
            # The kernel for GPUs recomputes by itself.
            return (recomputed(attention) if plain else attention)(q, k, v, mask_BTS)
        within = functools.partial(
            splash_attention,
            q,
            k,
            v,
            self.segments_BT,
            scale=c.query_scale,
            softcap=c.attention_softcap,
        )
        if c.window and not all(c.local_layers):
            return jax.lax.cond(is_local, lambda: within(window=c.window), within)
        return within(window=c.window)


def attention_to_whole_rows(
    q_BTHh: jax.Array, k_BSKh: jax.Array, v_BSKh: jax.Array, mask_BTS: jax.Array, **options: Any
) -> jax.Array:
    """`layers.attention` where the mesh's sequence axis cuts rows into parts.

    A device keeps its part of the queries and gathers the keys and values of the whole row. Inside
    of `recomputed` the backward pass gathers them again, so that none are kept whole.

    Args:
        q_BTHh: Queries.
        k_BSKh: Keys.
        v_BSKh: Values.
        mask_BTS: True where a query sees a key.
        **options: Of `layers.attention`.

    Returns:
        [B, T, H, h], in parts as the queries are.

    Example:
        >>> x = jnp.ones((1, 2, 2, 4))
        >>> attention_to_whole_rows(x, x, x, jnp.ones((1, 2, 2), bool), scale=0.5).shape
        (1, 2, 2, 4)
    """
    q_BTHh = constrain(q_BTHh, "batch", "length", ..., ...)
    k_BSKh, v_BSKh = (constrain(x, "batch", None, ..., ...) for x in (k_BSKh, v_BSKh))
    return layers.attention(q_BTHh, k_BSKh, v_BSKh, mask_BTS, **options)


def layer_flags(c: DecoderConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the scan over layers hands to each besides its parameters.

    Args:
        c: The decoder.

    Returns:
        Whether it is local, whether it is unrotated, and its index; each [L].

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> layer_flags(tiny_config())[2].tolist()
        [0, 1]
    """
    none = (False,) * c.layers
    flags = (np.array(each or none) for each in (c.local_layers, c.unrotated_layers))
    local, unrotated = flags
    return jnp.asarray(local), jnp.asarray(unrotated), jnp.arange(c.layers)


def run_block(
    c: DecoderConfig,
    p: Blocks,
    x_BTD: jax.Array,
    view: View,
    flags: tuple[jax.Array, jax.Array, jax.Array],
    kv: Any,
    cache: KVCache | None,
    cross: Callable[[jax.Array], jax.Array] | None = None,
    watch: Watch | None = None,
) -> tuple[jax.Array, Any, Any]:
    """One layer: attention, MLP, residuals, and norms where the family has them.

    Args:
        c: The decoder.
        p: The layer's parameters.
        x_BTD: Its input.
        view: What the queries may see.
        flags: The layer's, see `layer_flags`.
        kv: All layers' keys and values so far, or None without a cache.
        cache: Where the tokens stand in it, or None.
        cross: Applied between attention and the MLP: an encoder-decoder's cross-attention.
        watch: Told of the layer, or None.

    Returns:
        Its output, all layers' keys and values, and what the watch makes of the layer.
    """
    y_BTD = norm(c, p, "attention_norm", x_BTD) if c.input_norms else x_BTD
    attended_BTD, kv, factors = _attend(c, p.attention, y_BTD, view, flags, kv, cache)
    if c.parallel:
        y_BTD = y_BTD if c.shared_norm else norm(c, p, "mlp_norm", x_BTD)
        x_BTD = x_BTD + attended_BTD + _mlp(c, p.mlp, y_BTD)
    else:
        x_BTD = _add(c, p, "attention", x_BTD, attended_BTD)
        x_BTD = x_BTD if cross is None else cross(x_BTD)
        y_BTD = norm(c, p, "mlp_norm", x_BTD) if c.input_norms else x_BTD
        x_BTD = _add(c, p, "mlp", x_BTD, _mlp(c, p.mlp, y_BTD))
    x_BTD = constrain(x_BTD, "batch", "length", None)
    return x_BTD, kv, watch and watch(x_BTD, *factors)


def _add(c: DecoderConfig, p: Blocks, part: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The residual connection around attention or the MLP."""
    if c.output_norms:
        return x + norm(c, p, f"{part}_post_norm", y)
    return norm(c, p, f"{part}_norm", x + y) if c.norm_placement == "post" else x + y


def _attend(
    c: DecoderConfig,
    p: Attention,
    y_BTD: jax.Array,
    view: View,
    flags: tuple[jax.Array, jax.Array, jax.Array],
    kv: Any,
    cache: KVCache | None,
) -> tuple[jax.Array, Any, tuple[jax.Array, jax.Array]]:
    """Attention's output, all layers' keys and values, and the layer's queries and keys."""
    is_local, unrotated, index = flags
    mask_BTS, angles = view.of(is_local, unrotated)

    def heads(name: str, x_BTX: jax.Array) -> jax.Array:
        if c.qk_norm == "all" and name != "value":
            x_BTX = norm(c, p, f"{name}_norm", x_BTX)
        x_BTHh = layers.head_split(x_BTX, c.head_dim)
        if name == "value":
            return x_BTHh
        if c.qk_norm == "head":
            x_BTHh = norm(c, p, f"{name}_norm", x_BTHh)
        if c.positions != "rotary":
            return x_BTHh
        factor = c.rope_scaling.attention_factor if c.rope_scaling else 1.0
        return rotate(x_BTHh, angles, factor)

    names = ("query", "key", "value")
    q, k, v = map(heads, names, projections(p, names, y_BTD))
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
    y_BTHh = view.attend(q, k, v, is_local, mask_BTS)
    return project(p, "out", y_BTHh.reshape(*y_BTD.shape[:2], -1)), kv, (q, k)


def _mlp(c: DecoderConfig, p: MLP, y_BTD: jax.Array) -> jax.Array:
    """(act(y · gate) * (y · up)) · down, or act(y · up) · down."""
    act = layers.ACTIVATIONS[c.activation]
    factors = projections(p, ("gate", "up") if c.gated else ("up",), y_BTD)

    def down(first_BTF: jax.Array, *others: jax.Array) -> jax.Array:
        return project(p, "down", functools.reduce(jnp.multiply, others, act(first_BTF)))

    return recomputed(down)(*factors)


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A cheap function of large arrays, whose backward pass keeps nothing but these.

    Activations, norms and attention's scores are several arrays a layer each; computing them again
    takes less time than writing them, and first of all getting the memory, for all layers.

    Args:
        function: of arrays.

    Returns:
        The same function.

    Example:
        >>> float(jax.grad(recomputed(lambda x: x * x))(3.0))
        6.0
    """
    # In a loop's body, where almost all of it is, nothing can be merged with the first computation.
    return jax.checkpoint(function, prevent_cse=False)
