"""The encoder-decoder (T5 and its kin): the decoder's block, with cross-attention in one stack."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uld_jax.models import layers
from uld_jax.models.block import (
    Attention,
    Blocks,
    View,
    add_norm,
    attention_to_whole_rows,
    layer_flags,
    norm,
    run_block,
    weight,
)
from uld_jax.models.cache import CrossCache, KVCache, empty_cache
from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.models.decoder import REMAT_POLICIES
from uld_jax.models.encoder_decoder_config import EncoderDecoderConfig
from uld_jax.models.features import Features, Watch
from uld_jax.models.projection import matrix, project, projections, table_rows
from uld_jax.models.relative import position_bias
from uld_jax.sharding import constrain


class _RelativeView(View):
    """A View whose position bias comes from a stack's table."""

    def __init__(
        self,
        stack: "Stack",
        c: DecoderConfig,
        q_positions: jax.Array,
        k_positions: jax.Array,
        mask_BTS: jax.Array,
        **options: Any,
    ) -> None:
        super().__init__(c, q_positions, k_positions, mask_BTS)
        table_bH = stack.position_bias[...]
        self.bias_BHTS = position_bias(table_bH, q_positions, k_positions, **options)


class CrossBlocks(Blocks):
    """All layers' parameters of a stack that attends to another one."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        super().__init__(c, rngs, dtype)
        self.cross = Attention(c, rngs, dtype)
        shape, axes = (c.layers, c.width), ("layers", "norm")
        add_norm(self, "cross_norm", c, shape, axes, dtype)


class Stack(nnx.Module):
    """One of the two stacks: its blocks, its table of position biases, its final norm.

    Args:
        c: Its blocks.
        buckets: Rows of the table.
        rngs: Seeds of the random initial weights.
        dtype: Type of the parameters.
        cross: Whether its blocks attend to the other stack.
    """

    def __init__(
        self, c: DecoderConfig, buckets: int, rngs: nnx.Rngs, dtype: Any, *, cross: bool
    ) -> None:
        self.position_bias = weight(rngs, (buckets, c.heads), ("positions", "heads"), dtype)
        self.blocks: Any = (CrossBlocks if cross else Blocks)(c, rngs, dtype)
        add_norm(self, "norm", c, (c.width,), ("norm",), dtype)


class EncoderDecoder(nnx.Module):
    """An encoder-decoder language model: the prompt goes into the encoder.

    Args:
        config: What it is made of.
        policy: How it computes.
        param_dtype: Type of the parameters.
        rngs: Seeds of the random initial weights.

    Example:
        >>> from uld_jax.testing import tiny_t5
        >>> model = EncoderDecoder(tiny_t5(), rngs=nnx.Rngs(0))
        >>> model(jnp.array([[0, 4]]), encoder_tokens=jnp.array([[5, 6, 2]])).shape
        (1, 2, 64)
    """

    def __init__(
        self,
        config: EncoderDecoderConfig,
        policy: Policy | None = None,
        *,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.policy = config, policy or Policy()
        table = (config.vocab_size, config.width)
        self.embed = weight(rngs, table, ("vocab", "embed"), param_dtype)
        b = config.buckets
        self.encoder = Stack(config.encoder, b, rngs, param_dtype, cross=False)
        self.decoder = Stack(config.decoder, b, rngs, param_dtype, cross=True)
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
        *,
        encoder_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits f32[B, T, V]; the arguments are those of `hidden`."""
        hidden_BTD = self.hidden(
            tokens_BT,
            positions,
            segment_ids,
            encoder_tokens=encoder_tokens,
            encoder_segment_ids=encoder_segment_ids,
        )
        return self.logits(hidden_BTD)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of final hidden states [..., D]."""
        head_VD = self.head_VD.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head_VD, preferred_element_type=jnp.float32)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        encoder_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states of the decoder [B, T, D]: what the head multiplies.

        Args:
            tokens_BT: int32 token ids of the decoder, the start token first.
            positions: int32[B, T], by default 0 … T-1.
            segment_ids: int32[B, T]: tokens see their own segment only, in the encoder too; 0 for
                padding.
            encoder_tokens: int32[B, P] token ids of the prompt.
            encoder_segment_ids: int32[B, P], by default all 1.

        Returns:
            [B, T, D].
        """
        return self.features(
            tokens_BT,
            positions,
            segment_ids,
            encoder_tokens=encoder_tokens,
            encoder_segment_ids=encoder_segment_ids,
        ).hidden_BTD

    def features(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        encoder_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        watch: Watch | None = None,
    ) -> Features:
        """Final hidden states of the decoder, and what a watch keeps of every layer of it.

        Args:
            tokens_BT: As for `hidden`, as are all arguments but the last.
            positions: See there.
            segment_ids: See there.
            encoder_tokens: See there.
            encoder_segment_ids: See there.
            watch: Told of every layer: its output, and queries and keys of its self-attention.

        Returns:
            The features.
        """
        if positions is None:
            positions = jnp.arange(tokens_BT.shape[1])[None]
        if encoder_segment_ids is None:
            encoder_segment_ids = jnp.ones_like(encoder_tokens)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens_BT)
        encoded_BPD = self.encode(encoder_tokens, encoder_segment_ids)
        mask_BTT = layers.attention_mask(positions, positions, segment_ids, segment_ids)
        sees_BTP = segment_ids[:, :, None] == encoder_segment_ids[:, None, :]
        places = (positions, positions, mask_BTT, sees_BTP)
        return self._decode(tokens_BT, *places, encoded_BPD, watch=watch)[0]

    def encode(self, tokens_BP: jax.Array, segments_BP: jax.Array) -> jax.Array:
        """The encoder's output.

        Args:
            tokens_BP: int32 token ids of the prompts.
            segments_BP: int32: tokens see their own segment only; 0 for padding.

        Returns:
            [B, P, D]; on padding, whatever.
        """
        c = self.config.encoder
        mask_BPP = segments_BP[:, :, None] == segments_BP[:, None, :]
        # Only distances matter, so padding on either side moves nothing.
        at = jnp.arange(tokens_BP.shape[1])[None]
        far = self.config.max_distance
        view = _RelativeView(
            self.encoder, c, at, at, mask_BPP, bidirectional=True, max_distance=far
        )

        def block(p: Any, x_BTD: jax.Array, flags: Any, _: Any, kv: Any) -> tuple[Any, ...]:
            return run_block(c, p, x_BTD, view, flags, kv, None)

        return self._scan(self.encoder, c, block, self._embed(tokens_BP), None, None)[0]

    def start(
        self, prompts_BP: jax.Array, lengths_B: jax.Array, new_tokens: int
    ) -> tuple[jax.Array, CrossCache, jax.Array]:
        """Encodes right-padded prompts and reads the start token.

        Args:
            prompts_BP: int32 token ids.
            lengths_B: Tokens of each prompt.
            new_tokens: At most this many will be read after the start token.

        Returns:
            The final hidden state of the start token [B, D], the cache, and the position of the
            token that each row reads next, int32[B].
        """
        c, (rows, width) = self.config.decoder, prompts_BP.shape
        mask_BP = jnp.arange(width)[None] < lengths_B[:, None]
        encoded_BPD = self.encode(prompts_BP, mask_BP.astype(jnp.int32))
        graph, params = nnx.split(self.decoder.blocks.cross)
        k_LBPHh, v_LBPHh = jax.lax.map(
            lambda p: self._project_prompt(encoded_BPD, nnx.merge(graph, p)), params
        )
        own = empty_cache(c, rows, 1 + new_tokens, self.policy.dtype)
        cache = CrossCache(own, k_LBPHh, v_LBPHh, mask_BP)
        tokens_B1 = jnp.full((rows, 1), self.config.start_id, jnp.int32)
        hidden_B1D, cache = self.read(tokens_B1, jnp.zeros_like(tokens_B1), cache)
        return hidden_B1D[:, 0], cache, jnp.ones(rows, jnp.int32)

    def read(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: CrossCache
    ) -> tuple[jax.Array, CrossCache]:
        """Reads the decoder's next tokens into the cache.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: Their positions; -1 marks padding, which no later token sees.
            cache: The cache so far, with at least T free slots.

        Returns:
            Final hidden states [B, T, D] and the cache with the tokens in it.
        """
        own = cache.own
        slots = (0, own.length)
        k_positions = jax.lax.dynamic_update_slice(own.positions_BS, positions_BT, slots)
        mask_BTS = layers.attention_mask(positions_BT, k_positions)
        (hidden_BTD, *_), (k, v) = self._decode(
            tokens_BT,
            positions_BT,
            k_positions,
            mask_BTS,
            cache.mask_BP[:, None, :],
            cache=cache,
        )
        length = (own.length + tokens_BT.shape[1]) % k_positions.shape[1]
        own = KVCache(k, v, k_positions, length)
        return hidden_BTD, dataclasses.replace(cache, own=own)

    def _decode(
        self,
        tokens_BT: jax.Array,
        q_positions: jax.Array,
        k_positions: jax.Array,
        mask_BTS: jax.Array,
        sees_BTP: jax.Array,
        encoded_BPD: jax.Array | None = None,
        cache: CrossCache | None = None,
        watch: Watch | None = None,
    ) -> tuple[Features, Any]:
        """Runs the decoder's stack on an encoded prompt, or on one that is in the cache."""
        c = self.config.decoder
        far = self.config.max_distance
        places = (q_positions, k_positions, mask_BTS)
        view = _RelativeView(self.decoder, c, *places, bidirectional=False, max_distance=far)
        own = cache and cache.own

        def block(p: Any, x_BTD: jax.Array, flags: Any, prompt: Any, kv: Any) -> tuple[Any, ...]:
            def cross(x_BTD: jax.Array) -> jax.Array:
                look = prompt if encoded_BPD is None else self._project_prompt(encoded_BPD, p.cross)
                y_BTD = norm(c, p, "cross_norm", x_BTD)
                q = layers.head_split(project(p.cross, "query", y_BTD), c.head_dim)
                k, v = (x.astype(q.dtype) for x in look)
                y_BTHh = attention_to_whole_rows(q, k, v, sees_BTP, scale=c.query_scale)
                y_BTX = y_BTHh.reshape(*x_BTD.shape[:2], -1)
                return x_BTD + project(p.cross, "out", y_BTX)

            return run_block(c, p, x_BTD, view, flags, kv, own, cross=cross, watch=watch)

        kv = own and (own.k_LBSKh, own.v_LBSKh)
        prompt = cache and (cache.k_LBPHh, cache.v_LBPHh)
        x_BTD, kv, kept = self._scan(self.decoder, c, block, self._embed(tokens_BT), prompt, kv)
        x_BTD *= self.config.width**-0.5 if self.config.scaled_head else 1.0
        return Features(x_BTD, kept, view.bias_BHTS), kv

    def _scan(
        self, stack: Stack, c: DecoderConfig, block: Any, x_BTD: jax.Array, prompt: Any, kv: Any
    ) -> tuple[jax.Array, Any, Any]:
        """Scans a block over a stack's layers, and norms."""
        graph, params = nnx.split(stack.blocks)

        def body(carry: Any, layer: Any) -> tuple[Any, Any]:
            weights, flags, prompt = layer
            *carry, kept = block(nnx.merge(graph, weights), carry[0], flags, prompt, carry[1])
            return tuple(carry), kept

        if self.policy.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.policy.remat])
        (x_BTD, kv), kept = jax.lax.scan(body, (x_BTD, kv), (params, layer_flags(c), prompt))
        return norm(c, stack, "norm", x_BTD), kv, kept

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        return constrain(
            table_rows(self, "embed", tokens_BT).astype(self.policy.dtype), "batch", "length", None
        )

    def _project_prompt(
        self, encoded_BPD: jax.Array, cross: Attention
    ) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values of the prompt."""
        k, v = projections(cross, ("key", "value"), encoded_BPD)
        head_dim = self.config.head_dim
        return layers.head_split(k, head_dim), layers.head_split(v, head_dim)
