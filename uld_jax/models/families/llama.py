"""Llama and its kin (SmolLM2 among them): RMSNorm, RoPE, grouped queries, SwiGLU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Weight, end_ids, gated_decoder_weights, refuse


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face LlamaConfig as a dict.

    Raises:
        UserError: A feature that this decoder does not have (biases, RoPE scaling, …).

    Example:
        >>> config_from_hf(transformers.LlamaConfig(num_hidden_layers=3).to_dict()).layers
        3
    """
    rope = hf.get("rope_parameters") or {}
    scaling = rope.get("rope_type", "default")
    refuse(
        "llama",
        attention_bias=hf.get("attention_bias"),
        mlp_bias=hf.get("mlp_bias"),
        rope_type=scaling if scaling != "default" else None,
        partial_rotary_factor=rope.get("partial_rotary_factor", 1.0) != 1.0,
        hidden_act=hf["hidden_act"] if hf["hidden_act"] != "silu" else None,
    )
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    return DecoderConfig(
        family="llama",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=head_dim,
        mlp_width=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 10_000.0),
        query_scale=head_dim**-0.5,
        tied=hf.get("tie_word_embeddings", False),
        max_positions=hf["max_position_embeddings"],
        bos_id=hf.get("bos_token_id"),
        eos_id=end_ids(hf.get("eos_token_id")),
        pad_id=hf.get("pad_token_id"),
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face LlamaConfig of our config.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> config_to_hf(tiny_config()).hidden_size
        32
    """
    return transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.mlp_width,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied,
        max_position_embeddings=c.max_positions,
        bos_token_id=c.bos_id,
        eos_token_id=list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
        pad_token_id=c.pad_id,
    )


def config_from_gguf(meta: Mapping[str, Any]) -> DecoderConfig:
    """Our config from the metadata of a GGUF file of architecture "llama".

    Raises:
        KeyError: A metadata field that the architecture requires is missing.
    """
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    head_dim = meta.get("llama.attention.key_length", width // heads)
    scaling = meta.get("llama.rope.scaling.type", "none")
    refuse(
        "llama",
        rope_scaling=scaling if scaling != "none" else None,
        rope_freqs="rope_freqs.weight" in meta["tensors"],
    )
    return DecoderConfig(
        family="llama",
        vocab_size=meta["tensors"]["token_embd.weight"][0],
        width=width,
        layers=meta["llama.block_count"],
        heads=heads,
        kv_heads=meta.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=meta["llama.feed_forward_length"],
        norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=meta.get("llama.rope.freq_base", 10_000.0),
        query_scale=head_dim**-0.5,
        tied="output.weight" not in meta["tensors"],
        max_positions=meta["llama.context_length"],
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_id=meta.get("tokenizer.ggml.eos_token_id"),
        pad_id=meta.get("tokenizer.ggml.padding_token_id"),
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
