"""GPT-2: learned positions, LayerNorm, weights stored [in, out]."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Weight
from uld_jax.models.families.classic import fused_rows, linear_rows, norm_rows
from uld_jax.models.families.fields import (
    HF_ACTIVATIONS,
    activation_from_hf,
    end_ids,
    ids_to_hf,
)


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face GPT2Config as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf(transformers.GPT2Config().to_dict()).mlp_width
        3072
    """
    heads = hf["n_head"]
    head_dim = hf["n_embd"] // heads
    return DecoderConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        width=hf["n_embd"],
        layers=hf["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=hf["n_inner"] or 4 * hf["n_embd"],
        norm="layer",
        norm_eps=hf["layer_norm_epsilon"],
        activation=activation_from_hf("gpt2", hf, "activation_function"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        query_scale=head_dim**-0.5 if hf["scale_attn_weights"] else 1.0,
        tied=hf["tie_word_embeddings"],
        max_positions=hf["n_positions"],
        bos_id=hf.get("bos_token_id"),
        eos_id=end_ids(hf.get("eos_token_id")),
        pad_id=hf.get("pad_token_id"),
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face GPT2Config of our config."""
    return transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_embd=c.width,
        n_layer=c.layers,
        n_head=c.heads,
        n_inner=c.mlp_width,
        n_positions=c.max_positions,
        layer_norm_epsilon=c.norm_eps,
        activation_function=HF_ACTIVATIONS[c.activation],
        scale_attn_weights=c.query_scale != 1.0,
        tie_word_embeddings=c.tied,
        **ids_to_hf(c),
    )


def weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """The table.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> weights(tiny_config())[0].hf
        'transformer.wte.weight'
    """
    block, sizes = "transformer.h.{layer}.", (c.query_width, c.kv_width, c.kv_width)
    linear = partial(linear_rows, has_bias=True, transpose=False)
    rows = [
        Weight("embed", "transformer.wte.weight"),
        Weight("position_embed", "transformer.wpe.weight"),
        *norm_rows("norm", "transformer.ln_f"),
        *norm_rows("blocks.attention_norm", f"{block}ln_1"),
        *norm_rows("blocks.mlp_norm", f"{block}ln_2"),
        *fused_rows(f"{block}attn.c_attn", 1, sizes, has_bias=True, axis=1),
        *linear("blocks.attention.out", f"{block}attn.c_proj"),
        *linear("blocks.mlp.up", f"{block}mlp.c_fc"),
        *linear("blocks.mlp.down", f"{block}mlp.c_proj"),
    ]
    return tuple(rows) if c.tied else (*rows, Weight("head", "lm_head.weight"))


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=weights,
    ignored=(".attn.bias", ".attn.masked_bias"),
    prefix="transformer.",
)
