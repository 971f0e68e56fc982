"""Tiny models, configs and batches for tests and examples: seconds, not minutes."""

import dataclasses

import tokenizers
import transformers

from uld_jax.models.config import DecoderConfig


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
        mlp_width=64,
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
        "qk_norm": True,
        "post_norms": True,
        "rope_theta": 1e6,
        "rope_local_theta": 1e4,
        "window": 4,
        "local_layers": (True, False),
        "embed_scale": 32**0.5,
    }
    return tiny_config(**(gemma | changes))


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
