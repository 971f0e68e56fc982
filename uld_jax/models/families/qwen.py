"""Qwen 2, 2.5 (both "qwen2") and 3: biases on query, key and value, or a norm of each head."""

from collections.abc import Mapping
from functools import partial
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
    window_from_hf,
)
from uld_jax.models.families.rope import rope_fields, rope_parameters


def config_from_hf(family: str, hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face Qwen2Config or Qwen3Config as a dict.

    Args:
        family: "qwen2" or "qwen3".
        hf: The config.

    Returns:
        Ours.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf("qwen3", transformers.Qwen3Config(num_hidden_layers=2).to_dict()).qk_norm
        'head'
    """
    fields, bias = fields_from_hf(hf), hf.get("attention_bias", False)
    return DecoderConfig(
        family=family,
        activation=activation_from_hf(family, hf),
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        qk_norm="head" if family == "qwen3" else "none",
        query_scale=fields["head_dim"] ** -0.5,
        **window_from_hf(hf),
        **rope_fields(family, hf),
        **fields,
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face config of our config."""
    fields = fields_to_hf(c) | {
        "hidden_act": HF_ACTIVATIONS[c.activation],
        "use_sliding_window": bool(c.window),
        "sliding_window": c.window or None,
        "layer_types": layer_types(c),
        "rope_parameters": rope_parameters(c),
    }
    if c.family == "qwen2":
        return transformers.Qwen2Config(**fields)
    return transformers.Qwen3Config(**fields, attention_bias=c.out_bias)


QWEN2, QWEN3 = (
    Family(
        model_type=model_type,
        architecture=architecture,
        config_from_hf=partial(config_from_hf, model_type),
        config_to_hf=config_to_hf,
        weights=gated_decoder_weights,
    )
    for model_type, architecture in (
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    )
)
