"""OPT: learned positions, ReLU; the 350M model norms after the residual and embeds narrower."""

from collections.abc import Mapping
from typing import Any

import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Weight
from uld_jax.models.families.classic import linear_rows, norm_rows
from uld_jax.models.families.fields import (
    HF_ACTIVATIONS,
    activation_from_hf,
    end_ids,
    ids_to_hf,
)

# Rows of the position table that fairseq kept for padding.
OFFSET = 2


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face OPTConfig as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> hf = transformers.OPTConfig(do_layer_norm_before=False)
        >>> config_from_hf(hf.to_dict()).norm_placement
        'post'
    """
    heads, narrow = hf["num_attention_heads"], hf["word_embed_proj_dim"]
    before = hf["do_layer_norm_before"]
    return DecoderConfig(
        family="opt",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=hf["hidden_size"] // heads,
        mlp_width=hf["ffn_dim"],
        norm="layer",
        norm_eps=1e-5,
        norm_placement="pre" if before else "post",
        final_norm=before and not hf["_remove_final_layer_norm"],
        activation=activation_from_hf("opt", hf, "activation_function"),
        gated=False,
        qkv_bias=hf["enable_bias"],
        out_bias=hf["enable_bias"],
        mlp_bias=hf["enable_bias"],
        positions="learned",
        position_offset=OFFSET,
        embed_width=narrow if narrow != hf["hidden_size"] else 0,
        query_scale=(hf["hidden_size"] // heads) ** -0.5,
        tied=hf["tie_word_embeddings"],
        max_positions=hf["max_position_embeddings"],
        bos_id=hf.get("bos_token_id"),
        eos_id=end_ids(hf.get("eos_token_id")),
        pad_id=hf.get("pad_token_id"),
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face OPTConfig of our config."""
    before = c.norm_placement == "pre"
    return transformers.OPTConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        ffn_dim=c.mlp_width,
        do_layer_norm_before=before,
        _remove_final_layer_norm=before and not c.final_norm,
        activation_function=HF_ACTIVATIONS[c.activation],
        enable_bias=c.qkv_bias,
        word_embed_proj_dim=c.embed_width or c.width,
        tie_word_embeddings=c.tied,
        max_position_embeddings=c.max_positions,
        **ids_to_hf(c),
    )


def weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """The table.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> weights(tiny_config(positions="learned"))[0].hf
        'model.decoder.embed_tokens.weight'
    """
    outer, block, biased = "model.decoder.", "model.decoder.layers.{layer}.", c.qkv_bias
    rows = [
        Weight("embed", f"{outer}embed_tokens.weight"),
        Weight("position_embed", f"{outer}embed_positions.weight"),
        *norm_rows("blocks.attention_norm", f"{block}self_attn_layer_norm"),
        *norm_rows("blocks.mlp_norm", f"{block}final_layer_norm"),
    ]
    for name in ("query", "key", "value", "out"):
        short = "out" if name == "out" else name[0]
        theirs = f"{block}self_attn.{short}_proj"
        rows += linear_rows(f"blocks.attention.{name}", theirs, has_bias=biased)
    rows += linear_rows("blocks.mlp.up", f"{block}fc1", has_bias=biased)
    rows += linear_rows("blocks.mlp.down", f"{block}fc2", has_bias=biased)
    if c.final_norm:
        rows += norm_rows("norm", f"{outer}final_layer_norm")
    if c.embed_width:
        rows.append(Weight("embed_in", f"{outer}project_in.weight", transpose=True))
        rows.append(Weight("embed_out", f"{outer}project_out.weight", transpose=True))
    if not c.tied:
        rows.append(Weight("head", "lm_head.weight"))
    return tuple(rows)


OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=weights,
    prefix="model.",
)
