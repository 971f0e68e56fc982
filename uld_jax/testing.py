"""Tiny models, configs and batches for tests and examples: seconds, not minutes."""

import dataclasses
from typing import Any

import numpy as np
import tokenizers
import transformers
from flax import nnx

from uld_jax.data import Encoded, Pair, collate
from uld_jax.models import DecoderConfig, EncoderDecoderConfig, LoadedModel, model_class


def tiny_config(**changes: object) -> DecoderConfig:
    """A two-layer decoder with grouped queries, small enough to compile in a second.

    Args:
        **changes: Fields of DecoderConfig to change.

    Returns:
        The config.

    Example:
        >>> tiny_config(vocab_size=48).vocab_size
        48
    """
    base = DecoderConfig(
        family="llama",
        vocab_size=64,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=48,
        query_scale=8**-0.5,
        bos_id=1,
        eos_id=2,
        pad_id=0,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def tiny_gemma(**changes: object) -> DecoderConfig:
    """A tiny decoder with everything Gemma 3 has: windows, two rotary bases, QK and post norms.

    Args:
        **changes: Fields of DecoderConfig to change.

    Returns:
        The config.

    Example:
        >>> tiny_gemma().local_layers
        (True, False)
    """
    gemma = {
        "family": "gemma3_text",
        "vocab_size": 96,
        "kv_heads": 1,
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "qk_norm": "head",
        "norm_placement": "sandwich",
        "rope_theta": 1e6,
        "rope_local_theta": 1e4,
        "window": 4,
        "local_layers": (True, False),
        "embed_scale": 32**0.5,
    }
    return tiny_config(**(gemma | changes))


def tiny_t5(**changes: object) -> EncoderDecoderConfig:
    """A tiny encoder-decoder as mT5 and mT0: gated GELU, a head of its own, stacks of two sizes.

    Args:
        **changes: Fields of EncoderDecoderConfig to change.

    Returns:
        The config.

    Example:
        >>> tiny_t5(gated=False).encoder_layers
        2
    """
    base = EncoderDecoderConfig(
        family="mt5",
        vocab_size=64,
        width=32,
        encoder_layers=2,
        decoder_layers=3,
        heads=4,
        head_dim=6,
        mlp_width=48,
        activation="gelu_tanh",
        gated=True,
        buckets=8,
        max_distance=16,
        tied=False,
        scaled_head=False,
        eos_id=2,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


TOY_TEXT = (
    "The old mill stands by the river and grinds wheat for the village bakery.",
    "A lighthouse keeper climbs ninety steps each evening to light the lamp.",
    "Question: who climbs the steps? Answer: the lighthouse keeper.",
    "Context: numbers 0 1 2 3 4 5 6 7 8 9 and naïve café déjà vu.",
)


def toy_tokenizer(
    vocab_size: int = 300, kind: str = "byte_level"
) -> transformers.PreTrainedTokenizerFast:
    """A small real BPE tokenizer, trained on four sentences.

    Args:
        vocab_size: At most this many tokens; special tokens are 0 pad, 1 bos, 2 eos.
        kind: "byte_level" (as GPT-2) or "metaspace" (as Llama: ▁ for a space, byte fallback).

    Returns:
        The tokenizer; "metaspace" adds a beginning-of-sequence token.

    Example:
        >>> toy_tokenizer().decode(toy_tokenizer()("the river").input_ids)
        'the river'
    """
    special = ["<pad>", "<s>", "</s>"]
    metaspace = kind == "metaspace"
    model = tokenizers.models.BPE(byte_fallback=metaspace, fuse_unk=False)
    tokenizer = tokenizers.Tokenizer(model)
    if metaspace:
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        special += bytes_
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        steps = [("Replace", ("▁", " ")), ("ByteFallback", ()), ("Fuse", ())]
        tokenizer.decoder = tokenizers.decoders.Sequence(
            [getattr(tokenizers.decoders, name)(*args) for name, args in steps]
        )
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size + 256 * metaspace,
        special_tokens=special,
        initial_alphabet=[] if metaspace else tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOY_TEXT, trainer)
    if metaspace:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    config: DecoderConfig | EncoderDecoderConfig | None = None,
    *,
    kind: str = "byte_level",
    seed: int = 0,
) -> LoadedModel:
    """A tiny random model whose vocabulary is that of a toy tokenizer.

    Args:
        config: What it is made of; its vocab_size is replaced by the tokenizer's.
        kind: The toy tokenizer's kind.
        seed: Of the weights.

    Returns:
        The model, as `uld_jax.models.load` returns it.

    Example:
        >>> tiny_model().model.embed.shape[0] == len(toy_tokenizer())
        True
    """
    tokenizer = toy_tokenizer(kind=kind)
    sized: Any = dataclasses.replace(config or tiny_config(), vocab_size=len(tokenizer))
    return LoadedModel(model_class(sized)(sized, rngs=nnx.Rngs(seed)), tokenizer, sized)


def toy_batch(*, rows: int = 8, groups: int = 1, micro_batches: int = 1) -> dict[str, Any]:
    """A batch of made-up tokens for `tiny_config` (V 64) and `tiny_gemma` (U 96).

    Args:
        rows: Examples in all.
        groups: Data-parallel shards.
        micro_batches: Parts for gradient accumulation.

    Returns:
        What `uld_jax.data.collate` returns.

    Example:
        >>> toy_batch()["student_tokens"].shape
        (1, 8, 16)
    """
    rng = np.random.default_rng(0)

    def encoded(vocabulary: int, length: int, answer: int) -> Encoded:
        tokens = rng.integers(3, vocabulary, length, dtype=np.int32)
        return Encoded(tokens, np.arange(length - answer, length, dtype=np.int32))

    pairs = [
        Pair(
            str(row),
            encoded(64, int(rng.integers(10, 16)), int(rng.integers(2, 5))),
            (encoded(96, int(rng.integers(12, 20)), int(rng.integers(1, 6))),),
        )
        for row in range(rows)
    ]
    return collate(
        pairs,
        student_length=16,
        teacher_lengths=[20],
        positions=4 * rows // (groups * micro_batches),
        micro_batches=micro_batches,
        groups=groups,
        convention="token_mean",
        skip_student_eos=True,
        skip_teacher_eos=False,
        student_pad_id=0,
        teacher_pad_id=0,
    )
