"""Gemma 3 text: local and global layers, two rotary bases, QK norm, four norms a block, GeGLU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Weight, end_ids, gated_decoder_weights, refuse

# Gemma 3 interleaves five sliding-window layers with one global one; GGUF files leave it implicit.
PATTERN = 6


def _local_layers(layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % PATTERN != 0 for layer in range(layers))


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face Gemma3TextConfig as a dict.

    Raises:
        UserError: A feature that this decoder does not have (biases, RoPE scaling, …).

    Example:
        >>> hf = transformers.Gemma3TextConfig(num_hidden_layers=2)
        >>> config_from_hf(hf.to_dict()).local_layers
        (True, True)
    """
    rope = hf["rope_parameters"]
    kinds = {"full_attention": rope["full_attention"], "sliding": rope["sliding_attention"]}
    scaling = {kind: r["rope_type"] for kind, r in kinds.items() if r["rope_type"] != "default"}
    act = hf["hidden_activation"]
    refuse(
        "gemma3_text",
        attention_bias=hf.get("attention_bias"),
        rope_type=scaling,
        hidden_activation=act if act != "gelu_pytorch_tanh" else None,
        use_bidirectional_attention=hf.get("use_bidirectional_attention"),
        attn_logit_softcapping=hf.get("attn_logit_softcapping"),
    )
    return DecoderConfig(
        family="gemma3_text",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        mlp_width=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        norm_offset=1.0,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        rope_theta=kinds["full_attention"]["rope_theta"],
        rope_local_theta=kinds["sliding"]["rope_theta"],
        window=hf["sliding_window"],
        local_layers=tuple(kind == "sliding_attention" for kind in hf["layer_types"]),
        embed_scale=hf["hidden_size"] ** 0.5,
        query_scale=hf["query_pre_attn_scalar"] ** -0.5,
        logit_softcap=hf.get("final_logit_softcapping") or 0.0,
        tied=hf.get("tie_word_embeddings", True),
        max_positions=hf["max_position_embeddings"],
        bos_id=hf.get("bos_token_id"),
        eos_id=end_ids(hf.get("eos_token_id")),
        pad_id=hf.get("pad_token_id"),
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face Gemma3TextConfig of our config.

    Example:
        >>> from uld_jax.testing import tiny_gemma
        >>> config_to_hf(tiny_gemma()).layer_types
        ['sliding_attention', 'full_attention']
    """
    return transformers.Gemma3TextConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.mlp_width,
        rms_norm_eps=c.norm_eps,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": c.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": c.rope_local_theta},
        },
        sliding_window=c.window,
        layer_types=["sliding_attention" if x else "full_attention" for x in c.local_layers],
        query_pre_attn_scalar=round(c.query_scale**-2),
        final_logit_softcapping=c.logit_softcap or None,
        tie_word_embeddings=c.tied,
        max_position_embeddings=c.max_positions,
        bos_token_id=c.bos_id,
        eos_token_id=list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
        pad_token_id=c.pad_id,
    )


def config_from_gguf(meta: Mapping[str, Any]) -> DecoderConfig:
    """Our config from the metadata of a GGUF file of architecture "gemma3".

    Raises:
        KeyError: A metadata field that the architecture requires is missing.
    """
    layers, width = meta["gemma3.block_count"], meta["gemma3.embedding_length"]
    head_dim = meta["gemma3.attention.key_length"]
    scaling = meta.get("gemma3.rope.scaling.type", "none")
    refuse("gemma3_text", rope_scaling=scaling if scaling != "none" else None)
    return DecoderConfig(
        family="gemma3_text",
        vocab_size=meta["tensors"]["token_embd.weight"][0],
        width=width,
        layers=layers,
        heads=meta["gemma3.attention.head_count"],
        kv_heads=meta["gemma3.attention.head_count_kv"],
        head_dim=head_dim,
        mlp_width=meta["gemma3.feed_forward_length"],
        norm_eps=meta["gemma3.attention.layer_norm_rms_epsilon"],
        norm_offset=1.0,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        rope_theta=meta["gemma3.rope.freq_base"],
        rope_local_theta=meta.get("gemma3.rope.local.freq_base", 10_000.0),
        window=meta["gemma3.attention.sliding_window"],
        local_layers=_local_layers(layers),
        embed_scale=width**0.5,
        query_scale=head_dim**-0.5,
        tied="output.weight" not in meta["tensors"],
        max_positions=meta["gemma3.context_length"],
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_id=meta.get("tokenizer.ggml.eos_token_id"),
        pad_id=meta.get("tokenizer.ggml.padding_token_id"),
    )


def gguf_to_hf(c: DecoderConfig, weight: Weight, tensor: np.ndarray) -> np.ndarray:
    """Takes back the 1 that llama.cpp's converter adds to every norm's scale.

    Args:
        c: The decoder.
        weight: Which tensor it is.
        tensor: As the file has it.

    Returns:
        The tensor in the Hugging Face convention.
    """
    return tensor - 1.0 if weight.path.endswith("norm") else tensor


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    gguf_architecture="gemma3",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    weights=gated_decoder_weights,
    gguf_to_hf=gguf_to_hf,
)
