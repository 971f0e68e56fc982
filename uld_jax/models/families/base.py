"""What a family is: two config translations and one table of weight names."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import transformers

from uld_jax.errors import UserError
from uld_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter that Hugging Face stores together with others in one tensor.

    The tensor's output axis is cut into `groups`, each holding every part in turn: one group with
    all queries, then all keys, then all values (Phi-3), or a group a head (GPT-NeoX).

    Args:
        groups: Number of groups.
        sizes: Rows of each part in a group.
        index: Which part this is.
        axis: The tensor's output axis: 0, or 1 where it is stored [in, out] (GPT-2).

    Example:
        >>> part = Part(groups=2, sizes=(1, 2), index=1)
        >>> part.ranges(0, 4)
        [(1, 3), (4, 6)]
    """

    groups: int
    sizes: tuple[int, ...]
    index: int
    axis: int = 0

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where rows of this part lie in the fused tensor.

        Args:
            start: The first row.
            stop: The row after the last.

        Returns:
            Start and stop in the fused tensor, one pair a group, in order.

        Example:
            >>> Part(groups=2, sizes=(1, 2), index=1).ranges(1, 4)
            [(2, 3), (4, 6)]
        """
        size, first, period = self.sizes[self.index], sum(self.sizes[: self.index]), sum(self.sizes)
        return [
            (
                group * period + first + max(start - group * size, 0),
                group * period + first + min(stop - group * size, size),
            )
            for group in range(start // size, -(-stop // size))
        ]

    @staticmethod
    def join(parts: Sequence["Part"], arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The fused tensor of all its parts, in any order.

        Example:
            >>> parts = [Part(2, (1, 2), 1), Part(2, (1, 2), 0)]
            >>> Part.join(parts, [np.array([1, 2, 4, 5]), np.array([0, 3])]).tolist()
            [0, 1, 2, 3, 4, 5]
        """
        by_index = sorted(zip(parts, arrays, strict=True), key=lambda pair: pair[0].index)
        groups, axis = parts[0].groups, parts[0].axis
        rows = [np.moveaxis(array, axis, 0) for _, array in by_index]
        cut = [r.reshape(groups, -1, *r.shape[1:]) for r in rows]
        joined = np.concatenate(cut, axis=1).reshape(-1, *rows[0].shape[1:])
        return np.moveaxis(joined, 0, axis)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of a family's table, read in both directions.

    Args:
        path: Our parameter, e.g. "blocks.attention.query".
        hf: The Hugging Face tensor, with {layer} where there is one a layer.
        gguf: The GGUF tensor, with {layer} likewise; empty where GGUF is not read.
        transpose: Hugging Face stores [out, in]; we store [in, out].
        part: Which part of the tensor it is, where one tensor holds several parameters.

    Example:
        >>> Weight("norm", "model.norm.weight", "output_norm.weight").stacked
        False
    """

    path: str
    hf: str
    gguf: str = ""
    transpose: bool = False
    part: Part | None = None

    @property
    def stacked(self) -> bool:
        """Whether our parameter stacks one tensor a layer."""
        return "{layer}" in self.hf


def _no_gguf(meta: Mapping[str, Any]) -> DecoderConfig:
    raise UserError(f"GGUF files of architecture {meta['general.architecture']!r} are not read")


def _keep(config: DecoderConfig, weight: Weight, tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        model_type: The Hugging Face `model_type`.
        architecture: The Hugging Face class, written on export.
        config_from_hf: A Hugging Face config, as a dict, to ours.
        config_to_hf: Ours to a Hugging Face config object.
        weights: The table for a config.
        gguf_architecture: GGUF's `general.architecture`; empty where GGUF is not read.
        config_from_gguf: GGUF metadata to ours; the dict has a key per metadata field and
            "tensors", each tensor name with its shape.
        gguf_to_hf: Undoes what llama.cpp's converter did to a tensor.
        ignored: Endings of Hugging Face tensors that hold nothing to learn (buffers).
        prefix: Of tensor names; older checkpoints on the hub lack it.
        renamed: Tensor names of older checkpoints, and what they are called now.
    """

    model_type: str
    architecture: str
    config_from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
    config_to_hf: Callable[[DecoderConfig], transformers.PretrainedConfig]
    weights: Callable[[DecoderConfig], tuple[Weight, ...]]
    gguf_architecture: str = ""
    config_from_gguf: Callable[[Mapping[str, Any]], DecoderConfig] = _no_gguf
    gguf_to_hf: Callable[[DecoderConfig, Weight, np.ndarray], np.ndarray] = _keep
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def tensor_name(self, stored: str) -> str:
        """The present name of a tensor that a checkpoint may store under an older one.

        Example:
            >>> from uld_jax.models.families import by_model_type
            >>> by_model_type("gpt2", "config.json").tensor_name("wte.weight")
            'transformer.wte.weight'
        """
        name = self.renamed.get(stored, stored)
        known = name.startswith((self.prefix, "lm_head."))
        return name if known else self.prefix + name


def hf_names(weight: Weight, layers: int) -> Iterator[str]:
    """The Hugging Face tensors behind one parameter, in layer order.

    Example:
        >>> list(hf_names(Weight("a", "h.{layer}.w", "b.{layer}"), 2))
        ['h.0.w', 'h.1.w']
    """
    for layer in range(layers if weight.stacked else 1):
        yield weight.hf.format(layer=layer)


# The norms of a block by where they stand: our name, and the one Hugging Face's gated decoders use.
_NORMS = {
    "pre": {"attention_norm": "input", "mlp_norm": "post_attention"},
    "sandwich": {
        "attention_norm": "input",
        "attention_post_norm": "post_attention",
        "mlp_norm": "pre_feedforward",
        "mlp_post_norm": "post_feedforward",
    },
    "output": {"attention_post_norm": "post_attention", "mlp_post_norm": "post_feedforward"},
}
_GGUF_NORMS = {
    "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
}


def gated_decoder_weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """The table that Llama, Mistral, Qwen, Gemma and OLMo share, by the config's fields.

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> gated_decoder_weights(tiny_config())[0].hf
        'model.embed_tokens.weight'
    """
    block, ggml = "model.layers.{layer}.", "blk.{layer}."
    rows = [
        Weight("embed", "model.embed_tokens.weight", "token_embd.weight"),
        Weight("norm", "model.norm.weight", "output_norm.weight"),
    ]
    for ours, theirs in _NORMS[config.norm_placement].items():
        name = f"{block}{theirs}_layernorm.weight"
        rows.append(Weight(f"blocks.{ours}", name, f"{ggml}{_GGUF_NORMS[ours]}.weight"))
    biased = {
        "query": config.qkv_bias,
        "key": config.qkv_bias,
        "value": config.qkv_bias,
        "out": config.out_bias,
    }
    for ours, has_bias in biased.items():
        path, name = f"blocks.attention.{ours}", f"{block}self_attn.{ours[0]}_proj"
        short = f"{ggml}attn_{'output' if ours == 'out' else ours[0]}"
        rows.append(Weight(path, f"{name}.weight", f"{short}.weight", transpose=True))
        if has_bias:
            rows.append(Weight(f"{path}_bias", f"{name}.bias", f"{short}.bias"))
    for part in ("gate", "up", "down"):
        path, name, short = f"blocks.mlp.{part}", f"{block}mlp.{part}_proj", f"{ggml}ffn_{part}"
        rows.append(Weight(path, f"{name}.weight", f"{short}.weight", transpose=True))
        if config.mlp_bias:
            rows.append(Weight(f"{path}_bias", f"{name}.bias", f"{short}.bias"))
    for ours in ("query", "key") if config.qk_norm != "none" else ():
        name, short = f"{block}self_attn.{ours[0]}_norm", f"{ggml}attn_{ours[0]}_norm"
        rows.append(Weight(f"blocks.attention.{ours}_norm", f"{name}.weight", f"{short}.weight"))
    if not config.tied:
        rows.append(Weight("head", "lm_head.weight", "output.weight"))
    return tuple(rows)
