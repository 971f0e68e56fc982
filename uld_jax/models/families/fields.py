"""Fields that many Hugging Face configs share, to DecoderConfig and back."""

from collections.abc import Mapping
from typing import Any

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig


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
        >>> import transformers
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
        **ids_to_hf(c),
    }


def ids_to_hf(c: DecoderConfig) -> dict[str, Any]:
    """Hugging Face's fields of the special ids.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> ids_to_hf(tiny_config(eos_id=(2, 3)))
        {'bos_token_id': 1, 'eos_token_id': [2, 3], 'pad_token_id': 0}
    """
    return {
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
        UserError: Values are not as wide as keys, or heads are rotated in part.
    """
    name = meta["general.architecture"]
    heads, width = meta[f"{name}.attention.head_count"], meta[f"{name}.embedding_length"]
    head_dim = meta.get(f"{name}.attention.key_length", width // heads)
    widths = {
        field: meta.get(f"{name}.{field}", head_dim)
        for field in ("attention.value_length", "rope.dimension_count")
    }
    refuse(name, **{field: size for field, size in widths.items() if size != head_dim})
    return {
        "vocab_size": meta["tensors"]["token_embd.weight"][0],
        "width": width,
        "layers": meta[f"{name}.block_count"],
        "heads": heads,
        "kv_heads": meta.get(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_width": meta[f"{name}.feed_forward_length"],
        "norm_eps": meta[f"{name}.attention.layer_norm_rms_epsilon"],
        "tied": "output.weight" not in meta["tensors"],
        "max_positions": meta[f"{name}.context_length"],
        "bos_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_id": meta.get("tokenizer.ggml.padding_token_id"),
    }


# Hugging Face's names of activations, and ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
HF_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def activation_from_hf(family: str, hf: Mapping[str, Any], field: str = "hidden_act") -> str:
    """Our name of the activation that a Hugging Face config asks for.

    Args:
        family: Named in an error.
        hf: The config as a dict.
        field: What the family calls it.

    Returns:
        One that `DecoderConfig.activation` may be.

    Raises:
        UserError: One that we do not have.

    Example:
        >>> activation_from_hf("gpt2", {"activation_function": "gelu_new"}, "activation_function")
        'gelu_tanh'
    """
    name = hf[field]
    refuse(family, **{field: None if name in ACTIVATIONS else str(name)})
    return ACTIVATIONS[name]


def window_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding-window fields of a config with `layer_types`, or with one window for all layers.

    Args:
        hf: The config as a dict.

    Returns:
        `window` and `local_layers`.

    Example:
        >>> window_from_hf({"num_hidden_layers": 2, "sliding_window": 4})
        {'window': 4, 'local_layers': (True, True)}
    """
    kinds = hf.get("layer_types") or ["sliding_attention"] * hf["num_hidden_layers"]
    local = tuple(kind == "sliding_attention" for kind in kinds)
    if not hf.get("sliding_window") or not any(local):
        return {}
    return {"window": hf["sliding_window"], "local_layers": local}


def layer_types(c: DecoderConfig) -> list[str]:
    """Hugging Face's `layer_types` of a decoder.

    Example:
        >>> from uld_jax.testing import tiny_gemma
        >>> layer_types(tiny_gemma())
        ['sliding_attention', 'full_attention']
    """
    local = c.local_layers or (False,) * c.layers
    return ["sliding_attention" if each else "full_attention" for each in local]


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
        raise UserError(f"model_type '{family}': unsupported: {found}")
