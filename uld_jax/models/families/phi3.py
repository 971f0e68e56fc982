"""Phi-3 and Phi-4: Llama with fused query-key-value and gate-up tensors, and LongRoPE."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Part, Weight, gated_decoder_weights
from uld_jax.models.families.fields import (
    HF_ACTIVATIONS,
    activation_from_hf,
    fields_from_hf,
    fields_to_hf,
    window_from_hf,
)
from uld_jax.models.families.rope import rope_fields, rope_parameters


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from a Hugging Face Phi3Config as a dict.

    Raises:
        UserError: A setting that this family's code does not have.

    Example:
        >>> config_from_hf(transformers.Phi3Config(num_hidden_layers=2).to_dict()).width
        3072
    """
    fields = fields_from_hf(hf)
    return DecoderConfig(
        family="phi3",
        activation=activation_from_hf("phi3", hf),
        query_scale=fields["head_dim"] ** -0.5,
        **window_from_hf(hf),
        **rope_fields("phi3", hf),
        **fields,
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face Phi3Config of our config."""
    scaling = c.rope_scaling
    original = scaling.original_positions if scaling else 0
    return transformers.Phi3Config(
        hidden_act=HF_ACTIVATIONS[c.activation],
        sliding_window=c.window or None,
        original_max_position_embeddings=original or c.max_positions,
        rope_parameters={"partial_rotary_factor": 1.0} | rope_parameters(c),
        **fields_to_hf(c),
    )


def weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's table, with the two fused tensors.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> weights(tiny_config())[4].hf
        'model.layers.{layer}.self_attn.qkv_proj.weight'
    """
    attention = (c.query_width, c.kv_width, c.kv_width)
    fused = {
        f"blocks.attention.{name}": ("self_attn.qkv_proj", Part(1, attention, index))
        for index, name in enumerate(("query", "key", "value"))
    }
    for index, name in enumerate(("gate", "up")):
        part = Part(1, (c.mlp_width, c.mlp_width), index)
        fused[f"blocks.mlp.{name}"] = ("mlp.gate_up_proj", part)

    def fuse(row: Weight) -> Weight:
        if row.path not in fused:
            return row
        name, part = fused[row.path]
        return dataclasses.replace(row, hf=f"model.layers.{{layer}}.{name}.weight", part=part)

    return tuple(fuse(row) for row in gated_decoder_weights(c))


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=weights,
)
