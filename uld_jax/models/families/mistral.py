"""Mistral: Llama with a sliding window in every layer (7B v0.1) or in none (later versions)."""

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
    window_from_hf,
)
from uld_jax.models.families.rope import rope_fields, rope_parameters


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face MistralConfig as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf(transformers.MistralConfig(num_hidden_layers=2).to_dict()).window
        4096
    """
    fields = fields_from_hf(hf)
    return DecoderConfig(
        family="mistral",
        activation=activation_from_hf("mistral", hf),
        query_scale=fields["head_dim"] ** -0.5,
        **window_from_hf(hf),
        **rope_fields("mistral", hf),
        **fields,
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face MistralConfig of our config."""
    return transformers.MistralConfig(
        hidden_act=HF_ACTIVATIONS[c.activation],
        sliding_window=c.window or None,
        rope_parameters=rope_parameters(c),
        **fields_to_hf(c),
    )


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=gated_decoder_weights,
    ignored=("rotary_emb.inv_freq",),
)
