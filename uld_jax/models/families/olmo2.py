"""OLMo 2: norms of what attention and the MLP return, and of all queries and keys together."""

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
)
from uld_jax.models.families.rope import rope_fields, rope_parameters


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face Olmo2Config as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf(transformers.Olmo2Config(num_hidden_layers=2).to_dict()).qk_norm
        'all'
    """
    fields = fields_from_hf(hf)
    return DecoderConfig(
        family="olmo2",
        norm_placement="output",
        activation=activation_from_hf("olmo2", hf),
        qkv_bias=hf["attention_bias"],
        out_bias=hf["attention_bias"],
        qk_norm="all",
        query_scale=fields["head_dim"] ** -0.5,
        **rope_fields("olmo2", hf),
        **fields,
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face Olmo2Config of our config."""
    return transformers.Olmo2Config(
        hidden_act=HF_ACTIVATIONS[c.activation],
        attention_bias=c.qkv_bias,
        rope_parameters=rope_parameters(c),
        **fields_to_hf(c),
    )


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=gated_decoder_weights,
)
