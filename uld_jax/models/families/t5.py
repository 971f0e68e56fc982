"""T5 and its kin: T5 1.0 and 1.1, Flan-T5 (model_type t5), mT5 and mT0 (model_type mt5)."""

from collections.abc import Mapping
from typing import Any

import transformers

from uld_jax.models.encoder_decoder_config import EncoderDecoderConfig
from uld_jax.models.families.base import Family, Weight
from uld_jax.models.families.fields import end_ids, refuse

# Hugging Face's activations and ours.
ACTIVATION = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
CLASSES = {"t5": transformers.T5Config, "mt5": transformers.MT5Config}


def config_from_hf(hf: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Our config from a Hugging Face T5Config or MT5Config as a dict.

    transformers reads every config of these two as tied, and goes by the tensors: a checkpoint
    that has a head of its own is untied. So do we: the dict says which "tensors" there are.

    Raises:
        UserError: An activation that we do not have, a decoder alone, or no start token.

    Example:
        >>> hf = transformers.MT5Config(num_layers=3)
        >>> config_from_hf(hf.to_dict() | {"tensors": ["lm_head.weight"]}).tied
        False
    """
    named = (hf.get("decoder_start_token_id"), hf.get("pad_token_id"))
    starts = [token for token in named if token is not None]
    act, named_act = hf["dense_act_fn"], hf["feed_forward_proj"]
    refuse(
        hf["model_type"],
        feed_forward_proj=None if act in ACTIVATION else named_act,
        is_encoder_decoder="False" if not hf.get("is_encoder_decoder", True) else None,
        decoder_start_token_id=None if starts else "None",
    )
    return EncoderDecoderConfig(
        family=hf["model_type"],
        vocab_size=hf["vocab_size"],
        width=hf["d_model"],
        encoder_layers=hf["num_layers"],
        decoder_layers=hf["num_decoder_layers"],
        heads=hf["num_heads"],
        head_dim=hf["d_kv"],
        mlp_width=hf["d_ff"],
        activation=ACTIVATION[act],
        gated=hf["is_gated_act"],
        norm_eps=hf["layer_norm_epsilon"],
        buckets=hf["relative_attention_num_buckets"],
        max_distance=hf["relative_attention_max_distance"],
        tied="lm_head.weight" not in hf.get("tensors", ()),
        scaled_head=hf.get("scale_decoder_outputs", False),
        start_id=starts[0],
        eos_id=end_ids(hf.get("eos_token_id")),
        pad_id=hf.get("pad_token_id"),
    )


def config_to_hf(c: EncoderDecoderConfig) -> transformers.PretrainedConfig:
    """The Hugging Face T5Config or MT5Config of our config.

    Example:
        >>> from uld_jax.testing import tiny_t5
        >>> config_to_hf(tiny_t5()).feed_forward_proj
        'gated-gelu'
    """
    names = {ours: theirs for theirs, ours in ACTIVATION.items()}
    # "gated-gelu" is the published name of gelu_new.
    names |= {"gelu_tanh": "gelu"} if c.gated else {}
    hf = CLASSES[c.family](
        vocab_size=c.vocab_size,
        d_model=c.width,
        d_kv=c.head_dim,
        d_ff=c.mlp_width,
        num_layers=c.encoder_layers,
        num_decoder_layers=c.decoder_layers,
        num_heads=c.heads,
        relative_attention_num_buckets=c.buckets,
        relative_attention_max_distance=c.max_distance,
        layer_norm_epsilon=c.norm_eps,
        feed_forward_proj="gated-" * c.gated + names[c.activation],
        decoder_start_token_id=c.start_id,
        eos_token_id=list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
        pad_token_id=c.pad_id,
    )
    # Set afterwards: the constructors make it True whatever they are given. transformers 4 goes
    # by this field alone, 5 by the tensors.
    hf.tie_word_embeddings = c.tied
    if c.family == "t5":
        hf.scale_decoder_outputs = c.scaled_head
    return hf


def weights(c: EncoderDecoderConfig) -> tuple[Weight, ...]:
    """The table of both stacks.

    Example:
        >>> from uld_jax.testing import tiny_t5
        >>> weights(tiny_t5())[0].hf
        'shared.weight'
    """
    rows = [Weight("embed", "shared.weight")]
    parts = {"attention": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
    for stack, present in (("encoder", ("attention", "mlp")), ("decoder", tuple(parts))):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows.append(Weight(f"{stack}.position_bias", first))
        rows.append(Weight(f"{stack}.norm", f"{stack}.final_layer_norm.weight"))
        for number, part in enumerate(present):
            path, name = f"{stack}.blocks.{part}", f"{stack}.block.{{layer}}.layer.{number}."
            rows.append(Weight(f"{path}_norm", f"{name}layer_norm.weight"))
            for ours, theirs in _projections(part, c.gated).items():
                hf = f"{name}{parts[part]}.{theirs}.weight"
                rows.append(Weight(f"{path}.{ours}", hf, transpose=True))
    if not c.tied:
        rows.append(Weight("head", "lm_head.weight"))
    return tuple(rows)


def _projections(part: str, gated: bool) -> dict[str, str]:
    if part != "mlp":
        return {"query": "q", "key": "k", "value": "v", "out": "o"}
    inner = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
    return inner | {"down": "wo"}


# What T5 and mT5 share.
SHARED: dict[str, Any] = {
    "config_from_hf": config_from_hf,
    "config_to_hf": config_to_hf,
    "weights": weights,
    "ignored": (
        # Copies of shared.weight, and a bias that no published code has ever read.
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
}
T5 = Family(model_type="t5", architecture="T5ForConditionalGeneration", **SHARED)
MT5 = Family(model_type="mt5", architecture="MT5ForConditionalGeneration", **SHARED)
