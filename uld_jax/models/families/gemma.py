"""Gemma 1 and 2: GeGLU, scaled embeddings; 2 adds windows, soft-caps and norms of the outputs."""

from collections.abc import Mapping
from typing import Any

import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, gated_decoder_weights
from uld_jax.models.families.fields import (
    HF_ACTIVATIONS,
    activation_from_hf,
    fields_from_hf,
    fields_to_hf,
    layer_types,
    refuse,
    window_from_hf,
)
from uld_jax.models.families.rope import rope_fields, rope_parameters


def gemma_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face GemmaConfig as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> gemma_from_hf(transformers.GemmaConfig(num_hidden_layers=2).to_dict()).norm_offset
        1.0
    """
    fields = _shared_fields("gemma", hf, "hidden_act", "hidden_activation")
    return DecoderConfig(query_scale=fields["head_dim"] ** -0.5, **fields)


def gemma_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face GemmaConfig of our config."""
    return transformers.GemmaConfig(
        hidden_act=HF_ACTIVATIONS[c.activation],
        attention_bias=c.qkv_bias,
        rope_parameters=rope_parameters(c),
        **fields_to_hf(c),
    )


def gemma2_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face Gemma2Config as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> hf = transformers.Gemma2Config(num_hidden_layers=2)
        >>> gemma2_from_hf(hf.to_dict()).attention_softcap
        50.0
    """
    return DecoderConfig(
        norm_placement="sandwich",
        query_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=hf["attn_logit_softcapping"] or 0.0,
        logit_softcap=hf["final_logit_softcapping"] or 0.0,
        **window_from_hf(hf),
        **_shared_fields("gemma2", hf, "hidden_activation", "hidden_act"),
    )


def gemma2_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face Gemma2Config of our config."""
    return transformers.Gemma2Config(
        hidden_activation=HF_ACTIVATIONS[c.activation],
        attention_bias=c.qkv_bias,
        query_pre_attn_scalar=round(c.query_scale**-2),
        attn_logit_softcapping=c.attention_softcap or None,
        final_logit_softcapping=c.logit_softcap or None,
        sliding_window=c.window or None,
        layer_types=layer_types(c),
        rope_parameters=rope_parameters(c),
        **fields_to_hf(c),
    )


def _shared_fields(family: str, hf: Mapping[str, Any], field: str, other: str) -> dict[str, Any]:
    """What Gemma 1 and 2 have in common; many configs name the activation by `other` as well."""
    refuse(family, **{other: hf.get(other) if hf.get(other) != hf[field] else None})
    return {
        "family": family,
        "norm_offset": 1.0,
        "activation": activation_from_hf(family, hf, field),
        "qkv_bias": hf["attention_bias"],
        "out_bias": hf["attention_bias"],
        "embed_scale": hf["hidden_size"] ** 0.5,
        **rope_fields(family, hf),
        **fields_from_hf(hf),
    }


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    config_from_hf=gemma_from_hf,
    config_to_hf=gemma_to_hf,
    weights=gated_decoder_weights,
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    config_from_hf=gemma2_from_hf,
    config_to_hf=gemma2_to_hf,
    weights=gated_decoder_weights,
)
