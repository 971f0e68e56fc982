"""The one decoder of all families: embedding, one block scanned over the layers, head."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uld_jax.models import layers
from uld_jax.models.block import Blocks, View, add_norm, layer_flags, norm, run_block, weight
from uld_jax.models.cache import KVCache, empty_cache
from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.models.features import Features, Watch
from uld_jax.models.flash import choose_backend
from uld_jax.models.projection import matrix, table_rows
from uld_jax.sharding import constrain

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


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
        c, table = config, (config.vocab_size, config.embed_width or config.width)
        self.embed = weight(rngs, table, ("vocab", "embed"), param_dtype)
        if c.embed_width:
            shape = (c.embed_width, c.width)
            self.embed_in = weight(rngs, shape, ("narrow", "embed"), param_dtype)
            self.embed_out = weight(rngs, shape[::-1], ("embed", "narrow"), param_dtype)
        if c.positions == "learned":
            shape = (c.max_positions + c.position_offset, c.width)
            self.position_embed = weight(rngs, shape, ("positions", "embed"), param_dtype)
        for name, wanted in (("embed_norm", c.embed_norm), ("norm", c.final_norm)):
            if wanted:
                add_norm(self, name, c, (c.width,), ("norm",), param_dtype)
        self.blocks = Blocks(config, rngs, param_dtype)
        if not config.tied:
            self.head = weight(rngs, table, ("vocab", "embed"), param_dtype)

    @property
    def head_VD(self) -> jax.Array:
        """The output head, one row a token: logits = hidden · headᵀ."""
        return matrix(self, "embed" if self.config.tied else "head")

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
        logits = layers.table_product(hidden, head_VD)
        return layers.softcap(logits, self.config.logit_softcap)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D], after the last norm: what the head multiplies.

        (With an embedding of another width, OPT-350m, they have that width.)
        """
        return self.features(tokens_BT, positions, segment_ids).hidden_BTD

    def features(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        watch: Watch | None = None,
    ) -> Features:
        """Final hidden states, and what a watch keeps of every layer.

        Args:
            tokens_BT: int32 token ids.
            positions: int32[B, T], by default 0 … T-1.
            segment_ids: int32[B, T]: tokens see their own segment only; 0 for padding.
            watch: Told of every layer; what it does not return is not kept.

        Returns:
            The features.
        """
        backend = "xla"
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            backend = choose_backend(self.config, self.policy, tokens_BT.shape[1])
        mask = layers.attention_mask(positions, positions, segment_ids, segment_ids)
        view = View(self.config, positions, positions, mask, backend, segment_ids)
        hidden_BTD, _, kept = self._run(tokens_BT, positions, view, None, watch=watch)
        return Features(hidden_BTD, kept, view.bias_BHTS)

    def reader(self) -> Callable[[jax.Array, jax.Array, KVCache], tuple[jax.Array, KVCache]]:
        """`read` for a loop over single tokens; call it before the loop.

        On a CPU the scan over the layers copies each layer's weights out of their stack before it
        multiplies by them, for one token most of the work. Here they are cut out once.
        """
        if jax.default_backend() != "cpu":
            return self.read
        params = nnx.split(self.blocks)[1]
        cut = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(self.config.layers)]
        # Without the barrier XLA would cut where it multiplies: in the loop.
        return functools.partial(self.read, blocks=jax.lax.optimization_barrier(cut))

    def read(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache,
        blocks: Sequence[nnx.State] | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Reads tokens into the cache: prefill with a whole prompt, decode with one token.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: Their positions; -1 marks padding, which no later token sees.
            cache: The cache so far, with at least T free slots.
            blocks: Each layer's parameters, from `reader`; None takes them from their stack.

        Returns:
            Final hidden states [B, T, D] and the cache with the tokens in it.
        """
        slots = (0, cache.length)
        k_positions = jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, slots)
        mask = layers.attention_mask(positions_BT, k_positions)
        view = View(self.config, positions_BT, k_positions, mask)
        x_BTD, (k, v), _ = self._run(tokens_BT, positions_BT, view, cache, blocks)
        length = (cache.length + tokens_BT.shape[1]) % k_positions.shape[1]
        return x_BTD, KVCache(k, v, k_positions, length)

    def start(
        self, prompts_BP: jax.Array, lengths_B: jax.Array, new_tokens: int
    ) -> tuple[jax.Array, KVCache, jax.Array]:
        """Reads right-padded prompts into a fresh cache with room for the answers.

        Args:
            prompts_BP: int32 token ids.
            lengths_B: Tokens of each prompt.
            new_tokens: At most this many will be read after it.

        Returns:
            The final hidden state of each prompt's last token [B, D], the cache, and the position
            of the token that each row reads next, int32[B].
        """
        rows, width = prompts_BP.shape
        cache = empty_cache(self.config, rows, width + new_tokens, self.policy.dtype)
        slots = jnp.arange(width)[None]
        positions_BP = jnp.where(slots < lengths_B[:, None], slots, -1)
        hidden_BPD, cache = self.read(prompts_BP, positions_BP, cache)
        last = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        return jnp.take_along_axis(hidden_BPD, last, axis=1)[:, 0], cache, lengths_B

    def _run(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        view: View,
        cache: KVCache | None,
        blocks: Sequence[nnx.State] | None = None,
        watch: Watch | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """Embeds, scans the block over the layers (or goes through `blocks`), and norms."""
        c, dtype = self.config, jnp.dtype(self.policy.dtype)
        x_BTD = self._embed(tokens_BT, positions_BT, dtype)
        graph, params = nnx.split(self.blocks)

        def body(carry: Any, layer: Any) -> tuple[Any, Any]:
            x_BTD, kv = carry
            weights, flags = layer
            p = nnx.merge(graph, weights)
            *carry, kept = run_block(c, p, x_BTD, view, flags, kv, cache, watch=watch)
            return tuple(carry), kept

        if self.policy.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.policy.remat])
        kv, kept = None if cache is None else (cache.k_LBSKh, cache.v_LBSKh), None
        if blocks is None:
            (x_BTD, kv), kept = jax.lax.scan(body, (x_BTD, kv), (params, layer_flags(c)))
        for i, own in enumerate(blocks or ()):
            flags = jax.tree.map(lambda flag_L, i=i: flag_L[i], layer_flags(c))
            (x_BTD, kv), _ = body((x_BTD, kv), (own, flags))
        if c.final_norm:
            x_BTD = norm(c, self, "norm", x_BTD)
        if c.embed_width:
            x_BTD = x_BTD @ self.embed_out[...].astype(dtype)
        return x_BTD, kv, kept

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, dtype: Any) -> jax.Array:
        c = self.config
        x_BTD = table_rows(self, "embed", tokens_BT).astype(dtype) * jnp.asarray(
            c.embed_scale, dtype
        )
        if c.embed_width:
            x_BTD = x_BTD @ self.embed_in[...].astype(dtype)
        if c.positions == "learned":
            rows = jnp.maximum(positions_BT, 0) + c.position_offset
            x_BTD += self.position_embed[...][rows].astype(dtype)
        if c.embed_norm:
            x_BTD = norm(c, self, "embed_norm", x_BTD)
        return constrain(x_BTD, "batch", "length", None)


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
