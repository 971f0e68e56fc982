"""SmolLM 3: Llama whose every fourth layer leaves queries and keys unrotated."""

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
    window_from_hf,
)
from uld_jax.models.families.rope import rope_fields, rope_parameters


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face SmolLM3Config as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> hf = transformers.SmolLM3Config(num_hidden_layers=4)
        >>> config_from_hf(hf.to_dict()).unrotated_layers
        (False, False, False, True)
    """
    fields = fields_from_hf(hf)
    windows = window_from_hf(hf)
    return DecoderConfig(
        family="smollm3",
        activation=activation_from_hf("smollm3", hf),
        qkv_bias=hf["attention_bias"],
        out_bias=hf["attention_bias"],
        mlp_bias=hf["mlp_bias"],
        query_scale=fields["head_dim"] ** -0.5,
        # Hugging Face's flag says of each layer that it is rotated.
        unrotated_layers=tuple(not rotated for rotated in hf["no_rope_layers"]),
        **(windows if hf["use_sliding_window"] else {}),
        **rope_fields("smollm3", hf),
        **fields,
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face SmolLM3Config of our config."""
    return transformers.SmolLM3Config(
        hidden_act=HF_ACTIVATIONS[c.activation],
        attention_bias=c.qkv_bias,
        mlp_bias=c.mlp_bias,
        no_rope_layers=[int(not unrotated) for unrotated in c.unrotated_layers],
        use_sliding_window=bool(c.window),
        sliding_window=c.window or None,
        layer_types=layer_types(c),
        rope_parameters=rope_parameters(c),
        **fields_to_hf(c),
    )


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=gated_decoder_weights,
)
