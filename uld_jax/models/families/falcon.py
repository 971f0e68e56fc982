"""Falcon: parallel attention and MLP; one key-value head (7B) or groups and two norms (40B)."""

from collections.abc import Mapping
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
    refuse,
)
from uld_jax.models.families.rope import rope_fields, rope_parameters


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face FalconConfig as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf(transformers.FalconConfig(num_hidden_layers=2).to_dict()).kv_heads
        1
    """
    grouped = hf["new_decoder_architecture"]
    norms = hf["num_ln_in_parallel_attn"] or (2 if grouped else 1)
    refuse("falcon", num_ln_in_parallel_attn=norms if norms != (2 if grouped else 1) else None)
    heads = hf["num_attention_heads"]
    # Read in either architecture: what the other goes by is without effect, not unsupported.
    groups, single, parallel = hf["num_kv_heads"], hf["multi_query"], hf["parallel_attn"]
    return DecoderConfig(
        family="falcon",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=groups if grouped else 1 if single else heads,
        head_dim=hf["hidden_size"] // heads,
        mlp_width=hf["ffn_hidden_size"],
        norm="layer",
        norm_eps=hf["layer_norm_epsilon"],
        parallel=grouped or parallel,
        shared_norm=parallel and not grouped,
        activation=activation_from_hf("falcon", hf, "activation"),
        gated=False,
        qkv_bias=hf["bias"],
        out_bias=hf["bias"],
        mlp_bias=hf["bias"],
        query_scale=(hf["hidden_size"] // heads) ** -0.5,
        tied=hf["tie_word_embeddings"],
        max_positions=hf["max_position_embeddings"],
        bos_id=hf.get("bos_token_id"),
        eos_id=end_ids(hf.get("eos_token_id")),
        pad_id=hf.get("pad_token_id"),
        **rope_fields("falcon", hf),
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face FalconConfig of our config."""
    grouped = c.parallel and not c.shared_norm
    return transformers.FalconConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_kv_heads=c.kv_heads,
        ffn_hidden_size=c.mlp_width,
        layer_norm_epsilon=c.norm_eps,
        new_decoder_architecture=grouped,
        multi_query=not grouped and c.kv_heads == 1,
        parallel_attn=c.parallel,
        activation=HF_ACTIVATIONS[c.activation],
        bias=c.qkv_bias,
        tie_word_embeddings=c.tied,
        max_position_embeddings=c.max_positions,
        rope_parameters=rope_parameters(c),
        **ids_to_hf(c),
    )


def weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """The table.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> weights(tiny_config())[0].hf
        'transformer.word_embeddings.weight'
    """
    block, biased = "transformer.h.{layer}.", c.qkv_bias
    queries = c.heads // c.kv_heads * c.head_dim
    names = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    if c.shared_norm:
        names = {"attention": "input_layernorm"}
    elif c.parallel:
        names = {"attention": "ln_attn", "mlp": "ln_mlp"}
    rows = [
        Weight("embed", "transformer.word_embeddings.weight"),
        *norm_rows("norm", "transformer.ln_f"),
        *fused_rows(
            f"{block}self_attention.query_key_value",
            c.kv_heads,
            (queries, c.head_dim, c.head_dim),
            has_bias=biased,
        ),
        *linear_rows("blocks.attention.out", f"{block}self_attention.dense", has_bias=biased),
        *linear_rows("blocks.mlp.up", f"{block}mlp.dense_h_to_4h", has_bias=biased),
        *linear_rows("blocks.mlp.down", f"{block}mlp.dense_4h_to_h", has_bias=biased),
    ]
    for part, name in names.items():
        rows += norm_rows(f"blocks.{part}_norm", f"{block}{name}")
    return tuple(rows) if c.tied else (*rows, Weight("head", "lm_head.weight"))


FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=weights,
    prefix="transformer.",
)
