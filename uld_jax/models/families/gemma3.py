"""Gemma 3 text: local and global layers, two rotary bases, QK norm, four norms a block, GeGLU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers

from uld_jax.models.config import DecoderConfig
from uld_jax.models.families.base import Family, Weight, gated_decoder_weights
from uld_jax.models.families.fields import fields_from_gguf, fields_from_hf, fields_to_hf, refuse
from uld_jax.models.families.rope import rope_from_hf

# Gemma 3 interleaves five sliding-window layers with one global one; GGUF files leave it implicit.
PATTERN = 6


# What every Gemma 3 text model has, whatever its size.
TRAITS: dict[str, Any] = {
    "family": "gemma3_text",
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
    "qk_norm": "head",
    "norm_placement": "sandwich",
}


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
    thetas = []
    for kind in ("full_attention", "sliding_attention"):
        rope, positions = hf["rope_parameters"][kind], hf["max_position_embeddings"]
        theta, fraction, scaling = rope_from_hf("gemma3_text", rope, positions)
        refuse("gemma3_text", rope_parameters=rope if scaling or fraction != 1 else None)
        thetas.append(theta)
    # Many configs say it twice.
    acts = {name: hf.get(name) for name in ("hidden_activation", "hidden_act")}
    odd = {name: act for name, act in acts.items() if act != "gelu_pytorch_tanh"}
    refuse("gemma3_text", **odd)
    return DecoderConfig(
        rope_theta=thetas[0],
        rope_local_theta=thetas[1],
        window=hf["sliding_window"],
        local_layers=tuple(kind == "sliding_attention" for kind in hf["layer_types"]),
        embed_scale=hf["hidden_size"] ** 0.5,
        query_scale=hf["query_pre_attn_scalar"] ** -0.5,
        logit_softcap=hf.get("final_logit_softcapping") or 0.0,
        **TRAITS,
        **fields_from_hf(hf),
    )


def config_to_hf(c: DecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face Gemma3TextConfig of our config.

    Example:
        >>> from uld_jax.testing import tiny_gemma
        >>> config_to_hf(tiny_gemma()).layer_types
        ['sliding_attention', 'full_attention']
    """
    return transformers.Gemma3TextConfig(
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": c.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": c.rope_local_theta},
        },
        sliding_window=c.window,
        layer_types=["sliding_attention" if x else "full_attention" for x in c.local_layers],
        query_pre_attn_scalar=round(c.query_scale**-2),
        final_logit_softcapping=c.logit_softcap or None,
        **fields_to_hf(c),
    )


def config_from_gguf(meta: Mapping[str, Any]) -> DecoderConfig:
    """Our config from the metadata of a GGUF file of architecture "gemma3".

    Raises:
        KeyError: A metadata field that the architecture requires is missing.
    """
    scaling = meta.get("gemma3.rope.scaling.type", "none")
    refuse("gemma3_text", rope_scaling=scaling if scaling != "none" else None)
    fields = fields_from_gguf(meta)
    return DecoderConfig(
        rope_theta=meta["gemma3.rope.freq_base"],
        rope_local_theta=meta.get("gemma3.rope.local.freq_base", 10_000.0),
        window=meta["gemma3.attention.sliding_window"],
        local_layers=_local_layers(fields["layers"]),
        embed_scale=fields["width"] ** 0.5,
        query_scale=fields["head_dim"] ** -0.5,
        **TRAITS,
        **fields,
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
