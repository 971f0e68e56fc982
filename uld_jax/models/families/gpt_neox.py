"""GPT-NeoX (Pythia): parallel residual, partial rotation, LayerNorm, biases everywhere."""

from collections.abc import Mapping
from typing import Any

import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Weight
from uld_jax.models.families.classic import fused_rows, linear_rows, norm_rows
from uld_jax.models.families.fields import HF_ACTIVATIONS, activation_from_hf, end_ids, ids_to_hf
from uld_jax.models.families.rope import rope_fields, rope_parameters


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face GPTNeoXConfig as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf(transformers.GPTNeoXConfig(num_hidden_layers=2).to_dict()).rotary_dim
        24
    """
    heads = hf["num_attention_heads"]
    head_dim = hf["hidden_size"] // heads
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=hf["intermediate_size"],
        norm="layer",
        norm_eps=hf["layer_norm_eps"],
        parallel=hf["use_parallel_residual"],
        activation=activation_from_hf("gpt_neox", hf),
        gated=False,
        qkv_bias=hf["attention_bias"],
        out_bias=hf["attention_bias"],
        mlp_bias=True,
        query_scale=head_dim**-0.5,
        tied=hf["tie_word_embeddings"],
        max_positions=hf["max_position_embeddings"],
        bos_id=hf.get("bos_token_id"),
        eos_id=end_ids(hf.get("eos_token_id")),
        pad_id=hf.get("pad_token_id"),
        **rope_fields("gpt_neox", hf),
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face GPTNeoXConfig of our config."""
    return transformers.GPTNeoXConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp_width,
        layer_norm_eps=c.norm_eps,
        use_parallel_residual=c.parallel,
        hidden_act=HF_ACTIVATIONS[c.activation],
        attention_bias=c.qkv_bias,
        tie_word_embeddings=c.tied,
        max_position_embeddings=c.max_positions,
        # Left out, the rotated part would be a quarter.
        rope_parameters={"partial_rotary_factor": 1.0} | rope_parameters(c),
        **ids_to_hf(c),
    )


def weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """The table.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> weights(tiny_config())[0].hf
        'gpt_neox.embed_in.weight'
    """
    block, sizes = "gpt_neox.layers.{layer}.", (c.head_dim,) * 3
    rows = [
        Weight("embed", "gpt_neox.embed_in.weight"),
        *norm_rows("norm", "gpt_neox.final_layer_norm"),
        *norm_rows("blocks.attention_norm", f"{block}input_layernorm"),
        *norm_rows("blocks.mlp_norm", f"{block}post_attention_layernorm"),
        *fused_rows(f"{block}attention.query_key_value", c.heads, sizes, has_bias=c.qkv_bias),
        *linear_rows("blocks.attention.out", f"{block}attention.dense", has_bias=c.out_bias),
        *linear_rows("blocks.mlp.up", f"{block}mlp.dense_h_to_4h", has_bias=True),
        *linear_rows("blocks.mlp.down", f"{block}mlp.dense_4h_to_h", has_bias=True),
    ]
    return tuple(rows) if c.tied else (*rows, Weight("head", "lm_head.weight"))


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=weights,
    ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    renamed={"embed_out.weight": "lm_head.weight"},
)
