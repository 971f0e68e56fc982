"""Checksums of what an answer or a signal follows from: examples, tokenizer, prompt template."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from uld_jax.data.prompts import ChatFn, chat_template, render
from uld_jax.data.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_QUESTION = Example("1", "qa", "A context.", "A question?", ("An answer.",), "A title")
_SHOT = Example("2", "qa", "", "Another question?", ("Another answer.",), "")
_COMPLETION = Example("3", "completion", "", "A prompt", ("A completion",), "")
_CHAT = Example("4", "chat", "", '[{"role": "user", "content": "A message"}]', ("A reply",), "")


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """A checksum of examples: all of their fields, and their order.

    Args:
        examples: The examples.

    Returns:
        SHA-256 in hexadecimal digits.

    Example:
        >>> fingerprint_examples([]) == fingerprint_examples([_SHOT])
        False
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(dataclasses.astuple(example)).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> str:
    """A checksum of what decides a tokenizer's ids and its chat template.

    Args:
        tokenizer: A transformers fast tokenizer.

    Returns:
        SHA-256 in hexadecimal digits.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> a, b = (toy_tokenizer(kind=kind) for kind in ("byte_level", "metaspace"))
        >>> fingerprint_tokenizer(a) == fingerprint_tokenizer(b)
        False
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Each call sets these two anew.
    del state["padding"], state["truncation"]
    ends: Any = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return _sha256([state, ends, tokenizer.chat_template])


def fingerprint_prompts(
    tokenizer: "PreTrainedTokenizerFast", *, chat: bool, task: str = "qa", titles: bool = False
) -> str:
    """A checksum of how prompts are written: of made-up items in the template.

    Args:
        tokenizer: Of the model.
        chat: Whether they are written in its chat template.
        task: See `prompts.render`.
        titles: See `prompts.render`.

    Returns:
        SHA-256 in hexadecimal digits.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> len(fingerprint_prompts(toy_tokenizer(), chat=False))
        64
    """
    apply: ChatFn | None = chat_template(tokenizer) if chat else None
    prompts = [
        render(_QUESTION, shots=[_SHOT], chat=apply, task=task, titles=titles),
        render(_SHOT, chat=apply, task=task, titles=titles),
        render(_COMPLETION, chat=apply),
        render(_CHAT, chat=apply),
    ]
    return _sha256([dataclasses.astuple(prompt) for prompt in prompts])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
