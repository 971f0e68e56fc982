"""What a family is: two config translations and one table of weight names."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import transformers

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of a family's table, read in both directions.

    Args:
        path: Our parameter, e.g. "blocks.attention.query".
        hf: The Hugging Face tensor, with {layer} where there is one a layer.
        gguf: The GGUF tensor, with {layer} likewise.
        transpose: Hugging Face stores [out, in]; we store [in, out].

    Example:
        >>> Weight("norm", "model.norm.weight", "output_norm.weight").stacked
        False
    """

    path: str
    hf: str
    gguf: str
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        """Whether our parameter stacks one tensor a layer."""
        return "{layer}" in self.hf


def _keep(config: DecoderConfig, weight: Weight, tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        model_type: The Hugging Face `model_type`.
        architecture: The Hugging Face class, written on export.
        gguf_architecture: GGUF's `general.architecture`.
        config_from_hf: A Hugging Face config, as a dict, to ours.
        config_to_hf: Ours to a Hugging Face config object.
        config_from_gguf: GGUF metadata to ours; the dict has a key per metadata field and
            "tensors", each tensor name with its shape.
        weights: The table for a config.
        gguf_to_hf: Undoes what llama.cpp's converter did to a tensor.
        ignored: Hugging Face tensors that hold nothing to learn (buffers).
    """

    model_type: str
    architecture: str
    gguf_architecture: str
    config_from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
    config_to_hf: Callable[[DecoderConfig], transformers.PretrainedConfig]
    config_from_gguf: Callable[[Mapping[str, Any]], DecoderConfig]
    weights: Callable[[DecoderConfig], tuple[Weight, ...]]
    gguf_to_hf: Callable[[DecoderConfig, Weight, np.ndarray], np.ndarray] = _keep
    ignored: tuple[str, ...] = ()


def hf_names(weight: Weight, layers: int) -> Iterator[str]:
    """The Hugging Face tensors behind one parameter, in layer order.

    Example:
        >>> list(hf_names(Weight("a", "h.{layer}.w", "b.{layer}"), 2))
        ['h.0.w', 'h.1.w']
    """
    for layer in range(layers if weight.stacked else 1):
        yield weight.hf.format(layer=layer)


def gated_decoder_weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """The table that Llama, Mistral, Qwen and Gemma share, by the config's fields.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> gated_decoder_weights(tiny_config())[0].hf
        'model.embed_tokens.weight'
    """
    block, ggml = "model.layers.{layer}.", "blk.{layer}."
    second = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    rows = [
        Weight("embed", "model.embed_tokens.weight", "token_embd.weight"),
        Weight("norm", "model.norm.weight", "output_norm.weight"),
        Weight(
            "blocks.attention_norm", f"{block}input_layernorm.weight", f"{ggml}attn_norm.weight"
        ),
        Weight("blocks.mlp_norm", f"{block}{second}.weight", f"{ggml}ffn_norm.weight"),
    ]
    for ours, theirs in {"query": "q", "key": "k", "value": "v"}.items():
        name = f"{block}self_attn.{theirs}_proj.weight"
        rows.append(Weight(f"blocks.attention.{ours}", name, f"{ggml}attn_{theirs}.weight", True))
    name = f"{block}self_attn.o_proj.weight"
    rows.append(Weight("blocks.attention.out", name, f"{ggml}attn_output.weight", True))
    for part in ("gate", "up", "down"):
        name = f"{block}mlp.{part}_proj.weight"
        rows.append(Weight(f"blocks.mlp.{part}", name, f"{ggml}ffn_{part}.weight", True))
    if config.qk_norm:
        for ours, theirs in {"query": "q", "key": "k"}.items():
            name, short = (
                f"{block}self_attn.{theirs}_norm.weight",
                f"{ggml}attn_{theirs}_norm.weight",
            )
            rows.append(Weight(f"blocks.attention.{ours}_norm", name, short))
    if config.post_norms:
        for ours, theirs, short in (
            ("attention", "post_attention", "post_attention_norm"),
            ("mlp", "post_feedforward", "post_ffw_norm"),
        ):
            name = f"{block}{theirs}_layernorm.weight"
            rows.append(Weight(f"blocks.{ours}_post_norm", name, f"{ggml}{short}.weight"))
    if not config.tied:
        rows.append(Weight("head", "lm_head.weight", "output.weight"))
    return tuple(rows)


def end_ids(value: int | list[int] | None) -> int | tuple[int, ...] | None:
    """A Hugging Face `eos_token_id`, hashable where it names several.

    Example:
        >>> end_ids([1, 106])
        (1, 106)
    """
    return tuple(value) if isinstance(value, list) else value


def fields_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The DecoderConfig fields that every gated decoder's Hugging Face config names alike.

    Args:
        hf: The config as a dict.

    Returns:
        Field to value, ready to be passed on to DecoderConfig.

    Example:
        >>> fields_from_hf(transformers.LlamaConfig(num_hidden_layers=3).to_dict())["layers"]
        3
    """
    heads = hf["num_attention_heads"]
    return {
        "vocab_size": hf["vocab_size"],
        "width": hf["hidden_size"],
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "mlp_width": hf["intermediate_size"],
        "norm_eps": hf["rms_norm_eps"],
        "tied": hf["tie_word_embeddings"],
        "max_positions": hf["max_position_embeddings"],
        "bos_id": hf.get("bos_token_id"),
        "eos_id": end_ids(hf.get("eos_token_id")),
        "pad_id": hf.get("pad_token_id"),
    }


def fields_to_hf(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of `fields_from_hf`.

    Args:
        c: The decoder.

    Returns:
        Hugging Face field to value, ready to be passed on to its config class.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> fields_to_hf(tiny_config())["num_hidden_layers"]
        2
    """
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": c.max_positions,
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
        "pad_token_id": c.pad_id,
    }


def fields_from_gguf(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The DecoderConfig fields that every gated decoder's GGUF metadata names alike.

    Args:
        meta: The metadata, see `Family.config_from_gguf`.

    Returns:
        Field to value, ready to be passed on to DecoderConfig.

    Raises:
        KeyError: A field that the architecture requires is missing.
    """
    name = meta["general.architecture"]
    heads, width = meta[f"{name}.attention.head_count"], meta[f"{name}.embedding_length"]
    return {
        "vocab_size": meta["tensors"]["token_embd.weight"][0],
        "width": width,
        "layers": meta[f"{name}.block_count"],
        "heads": heads,
        "kv_heads": meta.get(f"{name}.attention.head_count_kv", heads),
        "head_dim": meta.get(f"{name}.attention.key_length", width // heads),
        "mlp_width": meta[f"{name}.feed_forward_length"],
        "norm_eps": meta[f"{name}.attention.layer_norm_rms_epsilon"],
        "tied": "output.weight" not in meta["tensors"],
        "max_positions": meta[f"{name}.context_length"],
        "bos_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_id": meta.get("tokenizer.ggml.padding_token_id"),
    }


def refuse(family: str, **unsupported: Any) -> None:
    """Raises where a Hugging Face config asks for something this family's code does not do.

    Args:
        family: Named in the error.
        **unsupported: Field name to its value; None, False, 0 and "" pass.

    Raises:
        UserError: Names every field and its value.

    Example:
        >>> refuse("llama", attention_bias=False)
    """
    found = ", ".join(f"{name}={value!r}" for name, value in unsupported.items() if value)
    if found:
        raise UserError(f"config.json of model_type '{family}': unsupported: {found}")
