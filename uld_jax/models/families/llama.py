"""Llama and its kin (SmolLM2 among them): RMSNorm, RoPE, grouped queries, SwiGLU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Weight, gated_decoder_weights
from uld_jax.models.families.fields import fields_from_gguf, fields_from_hf, fields_to_hf, refuse
from uld_jax.models.families.rope import rope_fields, rope_parameters


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face LlamaConfig as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf(transformers.LlamaConfig(num_hidden_layers=3).to_dict()).layers
        3
    """
    refuse("llama", hidden_act=hf["hidden_act"] if hf["hidden_act"] != "silu" else None)
    fields = fields_from_hf(hf)
    return DecoderConfig(
        family="llama",
        qkv_bias=hf["attention_bias"],
        out_bias=hf["attention_bias"],
        mlp_bias=hf["mlp_bias"],
        query_scale=fields["head_dim"] ** -0.5,
        **rope_fields("llama", hf),
        **fields,
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face LlamaConfig of our config.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> config_to_hf(tiny_config()).hidden_size
        32
    """
    return transformers.LlamaConfig(
        attention_bias=c.qkv_bias,
        mlp_bias=c.mlp_bias,
        rope_parameters=rope_parameters(c),
        **fields_to_hf(c),
    )


def config_from_gguf(meta: Mapping[str, Any]) -> DecoderConfig:
    """Our config from the metadata of a GGUF file of architecture "llama".

    Raises:
        KeyError: A metadata field that the architecture requires is missing.
    """
    scaling = meta.get("llama.rope.scaling.type", "none")
    refuse(
        "llama",
        rope_scaling=scaling if scaling != "none" else None,
        rope_freqs="rope_freqs.weight" in meta["tensors"],
    )
    fields = fields_from_gguf(meta)
    rope = {"rope_theta": meta.get("llama.rope.freq_base", 10_000.0)}
    as_hf = {"rope_parameters": rope, "max_position_embeddings": fields["max_positions"]}
    return DecoderConfig(
        family="llama",
        **rope_fields("llama", as_hf),
        query_scale=fields["head_dim"] ** -0.5,
        **fields,
    )


def gguf_to_hf(c: DecoderConfig, weight: Weight, tensor: np.ndarray) -> np.ndarray:
    """Undoes llama.cpp's interleaving of the two rotary halves in query and key rows.

    Args:
        c: The decoder.
        weight: Which tensor it is.
        tensor: As the file has it.

    Returns:
        The tensor in the Hugging Face layout.
    """
    heads = {"blocks.attention.query": c.heads, "blocks.attention.key": c.kv_heads}
    if weight.path not in heads:
        return tensor
    split = tensor.reshape(heads[weight.path], c.head_dim // 2, 2, -1)
    return split.swapaxes(1, 2).reshape(tensor.shape)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    gguf_architecture="llama",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    weights=gated_decoder_weights,
    gguf_to_hf=gguf_to_hf,
    ignored=("rotary_emb.inv_freq",),
)
