"""What can be told of a pair from its tokenizers and configs alone."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from uld_jax.data import Side, TokenBytes, byte_offsets, chat_template, match_vocabularies
from uld_jax.models import tokens_beyond

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A power of ten of digits, white space of several kinds, and characters of 2, 3 and 4 bytes.
DIGITS = "1234567890"
SPACES = "a    b\n\n\tc"
WIDE = "naïve 東京の天気 مرحبا 🙂👩‍🚀"


class TokenizerFacts(NamedTuple):
    """One side.

    Attributes:
        name: Where it was loaded from.
        tokens: Ids within its model's logits that its tokenizer has.
        beyond: Tokens of text, or of its ends, that are beyond them.
        logits: Width of its model's output.
        bos: The token that it puts before a text by itself; empty for none.
        eos: Its end-of-text token; empty for none.
        eos_id: Its id, -1 for none.
        model_eos_ids: Those that its model's config names.
        model_eos: What the tokenizer calls them.
        digits: Tokens of ten digits.
        spaces: Tokens of a text of ten characters, seven of them white space.
        split_characters: Share of the characters of a multilingual text that several tokens make.
        chat: Whether it has a chat template.
    """

    name: str
    tokens: int
    beyond: int
    logits: int
    bos: str
    eos: str
    eos_id: int
    model_eos_ids: tuple[int, ...]
    model_eos: tuple[str, ...]
    digits: int
    spaces: int
    split_characters: float
    chat: bool


class VocabularyFacts(NamedTuple):
    """Two vocabularies.

    Attributes:
        shared: Tokens of the same text.
        student_share: Their part of the student's tokens.
        teacher_share: Likewise.
    """

    shared: int
    student_share: float
    teacher_share: float


def tokenizer_facts(name: str, side: Side, model: Any) -> TokenizerFacts:
    """Of one model.

    Args:
        name: For people.
        side: How it is prompted.
        model: Its config.

    Returns:
        The facts.
    """
    tokenizer = side.tokenizer
    ends: Any = tokenizer.eos_token_id
    named = [] if model.eos_id is None else np.atleast_1d(model.eos_id).tolist()
    return TokenizerFacts(
        name=name,
        tokens=sum(number < model.vocab_size for number in tokenizer.get_vocab().values()),
        beyond=len(tokens_beyond(tokenizer, model.vocab_size)),
        logits=model.vocab_size,
        bos=_put_before(tokenizer),
        eos=str(tokenizer.eos_token or ""),
        eos_id=-1 if ends is None else int(ends),
        model_eos_ids=tuple(named),
        model_eos=tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in named),
        digits=len(_plain_ids(tokenizer, DIGITS)),
        spaces=len(_plain_ids(tokenizer, SPACES)),
        split_characters=split_characters(tokenizer, WIDE),
        chat=chat_template(tokenizer) is not None,
    )


def vocabulary_facts(
    student: "PreTrainedTokenizerFast", teacher: "PreTrainedTokenizerFast"
) -> VocabularyFacts:
    """Of both.

    Args:
        student: A tokenizer.
        teacher: Another.

    Returns:
        The facts.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> vocabulary_facts(toy_tokenizer(), toy_tokenizer()).student_share > 0.9
        True
    """
    shared = len(match_vocabularies(student, teacher).student)
    return VocabularyFacts(shared, shared / len(student), shared / len(teacher))


def split_characters(tokenizer: "PreTrainedTokenizerFast", text: str) -> float:
    """The share of a text's characters that more than one token is needed for.

    Args:
        tokenizer: A tokenizer.
        text: Not empty.

    Returns:
        From 0 to 1.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> split_characters(toy_tokenizer(), "a")
        0.0
    """
    _, offsets = byte_offsets(tokenizer, text, read=TokenBytes(tokenizer))
    starts = np.cumsum([0, *(len(c.encode()) for c in text)])
    split = sum(
        _tokens_within(offsets, start, end) > 1 for start, end in itertools.pairwise(starts)
    )
    return float(split / len(text))


def _tokens_within(offsets: Sequence[tuple[int, int]], start: int, end: int) -> int:
    return sum(a < end and b > start for a, b in offsets)


def _plain_ids(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _put_before(tokenizer: "PreTrainedTokenizerFast") -> str:
    ids: Any = tokenizer("a").input_ids
    plain = _plain_ids(tokenizer, "a")
    before = ids[: len(ids) - len(plain)] if ids[-len(plain) :] == plain else ids[:1]
    marks = [i for i in before if i in tokenizer.all_special_ids]
    return "".join(map(str, tokenizer.convert_ids_to_tokens(marks)))
