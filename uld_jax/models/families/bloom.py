"""BLOOM and BLOOMZ: ALiBi, a norm of the embeddings, one tensor for query, key and value."""

from collections.abc import Mapping
from typing import Any

import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Weight
from uld_jax.models.families.classic import fused_rows, linear_rows, norm_rows
from uld_jax.models.families.fields import end_ids, ids_to_hf

# ALiBi has no longest sequence; this is the length that BLOOM was trained with.
MAX_POSITIONS = 2048


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face BloomConfig as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf(transformers.BloomConfig().to_dict()).positions
        'alibi'
    """
    heads = hf["n_head"]
    return DecoderConfig(
        family="bloom",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_dim=hf["hidden_size"] // heads,
        mlp_width=4 * hf["hidden_size"],
        norm="layer",
        norm_eps=hf["layer_norm_epsilon"],
        embed_norm=True,
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="alibi",
        query_scale=(hf["hidden_size"] // heads) ** -0.5,
        tied=hf["tie_word_embeddings"],
        max_positions=MAX_POSITIONS,
        bos_id=hf.get("bos_token_id"),
        eos_id=end_ids(hf.get("eos_token_id")),
        pad_id=hf.get("pad_token_id"),
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face BloomConfig of our config."""
    return transformers.BloomConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        n_layer=c.layers,
        n_head=c.heads,
        layer_norm_epsilon=c.norm_eps,
        tie_word_embeddings=c.tied,
        **ids_to_hf(c),
    )


def weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """The table.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> weights(tiny_config())[0].hf
        'transformer.word_embeddings.weight'
    """
    block, sizes = "transformer.h.{layer}.", (c.head_dim,) * 3
    rows = [
        Weight("embed", "transformer.word_embeddings.weight"),
        *norm_rows("embed_norm", "transformer.word_embeddings_layernorm"),
        *norm_rows("norm", "transformer.ln_f"),
        *norm_rows("blocks.attention_norm", f"{block}input_layernorm"),
        *norm_rows("blocks.mlp_norm", f"{block}post_attention_layernorm"),
        *fused_rows(f"{block}self_attention.query_key_value", c.heads, sizes, has_bias=True),
        *linear_rows("blocks.attention.out", f"{block}self_attention.dense", has_bias=True),
        *linear_rows("blocks.mlp.up", f"{block}mlp.dense_h_to_4h", has_bias=True),
        *linear_rows("blocks.mlp.down", f"{block}mlp.dense_4h_to_h", has_bias=True),
    ]
    return tuple(rows) if c.tied else (*rows, Weight("head", "lm_head.weight"))


BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=weights,
    prefix="transformer.",
)
