"""Which of a server's positions predict an answer, and the distributions there."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from uld_jax.data import Encoded
from uld_jax.teacher.choices import Choice, Fault, Prompt, wrong_number

# What probabilities may sum to above 1 by rounding.
EXCESS = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class ServedText:
    """A prompt and its answer for a served teacher.

    Attributes:
        id: Of the example.
        prompt: What stands before the answer: `Prompt.text`.
        answer: What follows it: `Prompt.separator` and the answer.
        encoded: The same in the teacher's tokens, which the server is then sent.
        unspelled: Special tokens as they stand in the prompt, which the server may read as tokens
            without telling their text (llama-cpp-python), e.g. ("<|im_start|>", "<|im_end|>").
    """

    id: str
    prompt: str
    answer: str
    encoded: Encoded | None = None
    unspelled: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return self.prompt + self.answer

    @property
    def sent(self) -> Prompt:
        """What the server is sent: token ids where there are some."""
        return self.text if self.encoded is None else self.encoded.tokens.tolist()


class Positions(NamedTuple):
    """Where the answer lies among a server's positions.

    Attributes:
        answer: Indices of the answer's tokens, ascending, never 0.
        count: How many positions the given text has; those after it are the server's own.
        hidden: Tokens of the given text that have no position.
    """

    answer: list[int]
    count: int
    hidden: int


class ServedSignal(NamedTuple):
    """The teacher's signal for one example.

    Attributes:
        id: Of the example.
        probs_sorted: float32 [n, k], the largest probabilities at each of the n positions that
            predict a token of the answer, descending, padded with zeros where fewer are known.
        tail_mass: float32 [n], what they lack to 1.
    """

    id: str
    probs_sorted: np.ndarray
    tail_mass: np.ndarray


def signal(choice: Choice, text: ServedText, *, top_k: int, shift: int, end: bool) -> ServedSignal:
    """The signal in a server's echo of a text.

    Args:
        choice: The echo.
        text: What was sent.
        top_k: Probabilities kept at each position.
        shift: How many positions too early the server's entries stand: see `check_server`.
        end: Whether to add the prediction after the last token, where the text ends.

    Returns:
        The signal.

    Raises:
        Fault: The echo is not one of this text, or lacks what is needed.

    Example:
        >>> echo = Choice(["a", " b"], [None, -0.2], [None, {" b": -0.2, " c": -2.0}], [0, 1],
        ...     "a b", 2)
        >>> signal(echo, ServedText("0", "a", " b"), top_k=2, shift=0, end=False).tail_mass.round(2)
        array([0.05], dtype=float32)
    """
    where = echo_positions(choice, text)
    if shift and where.hidden:
        # A neighbour in the list need not be the neighbour in the text.
        raise wrong_number(where.count + where.hidden, where.count)
    wanted = [*where.answer, where.count] if end else where.answer
    if not wanted:
        raise Fault("the answer has no token that could be predicted", retry=False)
    probs = np.zeros((len(wanted), top_k), np.float64)
    for row, i in zip(probs, wanted, strict=True):
        kept = largest(entry(choice, i - shift), choice.tokens[i - shift], top_k)
        row[: len(kept)] = kept
    tails = np.clip(1 - probs.sum(-1), 0, 1)
    return ServedSignal(text.id, probs.astype(np.float32), tails.astype(np.float32))


def entry(choice: Choice, index: int) -> dict[str, float]:
    """The distribution that stands at a position.

    Args:
        choice: What the server said.
        index: Of the position.

    Returns:
        Log-probabilities by token.

    Raises:
        Fault: There is none.
    """
    found = choice.top_logprobs[index] if 0 <= index < len(choice.top_logprobs) else None
    if found is None:
        raise Fault(f"no log-probabilities at position {index} of {len(choice.tokens)}")
    return found


def largest(logprobs: dict[str, float], token: str, top_k: int) -> list[float]:
    """The probabilities of a distribution that surely are its largest.

    A server that names tokens by their text tells only one of two with the same text: special
    tokens without one, parts of a character. One of the largest may be lost so where there are
    fewer than were asked for, or where the text's own token, which is told besides the largest,
    took the place of one. It is no likelier than all that is missing: what is likelier than that
    surely is among the largest, and the rest is left to the tail.

    Args:
        logprobs: By token; may hold the text's own token besides the largest.
        token: The text's own token at this position.
        top_k: As many were asked for.

    Returns:
        Probabilities, descending, at most `top_k`.

    Raises:
        Fault: They sum to more than 1.

    Example:
        >>> half, third, tenth = (math.log(p) for p in (0.5, 0.3, 0.1))
        >>> [round(p, 2) for p in largest({"a": half, "": third, "b": tenth}, "b", 2)]
        [0.5, 0.3]
        >>> [round(p, 2) for p in largest({"": half, "b": tenth}, "b", 2)]
        [0.5]
    """
    probs = sorted((math.exp(max(value, -1e4)) for value in logprobs.values()), reverse=True)
    total = math.fsum(probs)
    if total > 1 + EXCESS:
        raise Fault(f"malformed answer: probabilities that sum to {total:.4f}")
    complete = len(probs) > top_k
    if len(probs) == top_k:
        shared = [name for name in logprobs if is_shared(name)]
        # The own token may be one that was added: it is the least likely then.
        added = token not in logprobs or logprobs[token] <= min(logprobs.values())
        complete = token not in shared and not (shared and added)
    return [prob for prob in probs[:top_k] if complete or prob >= 1 - total]


def is_shared(token: str) -> bool:
    """Whether several tokens have this text: special ones without any, or parts of a character.

    Args:
        token: The text.

    Returns:
        Whether it may be that of another token.
    """
    return not token or "\ufffd" in token


def echo_positions(choice: Choice, text: ServedText) -> Positions:
    """Where the answer lies in the echo of a text, or of its token ids where it has them.

    Args:
        choice: The echo.
        text: What was sent.

    Returns:
        The positions.

    Raises:
        Fault: The echo is not one of this text.
    """
    if text.encoded is None:
        return text_positions(choice, text)
    return _token_positions(choice, text.encoded)


def _token_positions(choice: Choice, encoded: Encoded) -> Positions:
    count, got = len(encoded.tokens), choice.prompt_tokens
    if got is None:
        got = len(choice.tokens)
        got -= got == count + 1  # the token that the server was asked to add
    got = min(got, len(choice.tokens))
    if got != count:
        raise wrong_number(count, got)
    return Positions(encoded.answer.tolist(), count, 0)


def text_positions(choice: Choice, text: ServedText) -> Positions:
    """Where the answer lies when the server was sent text, which it reads in its own tokens.

    As in `data.encode` a token belongs to the answer when it ends after the prompt's text.

    Args:
        choice: The echo.
        text: What was sent.

    Returns:
        The positions.

    Raises:
        Fault: The server's tokens do not make up the text.
    """
    spelled = [(text.prompt, text.answer)]
    prompt, answer, unspelled = text.prompt, text.answer, 0
    for name in text.unspelled:
        unspelled += (prompt + answer).count(name)
        prompt, answer = prompt.replace(name, ""), answer.replace(name, "")
    if unspelled:
        spelled.append((prompt, answer))
    spans, border, length = None, 0, 0
    for prompt, answer in spelled:
        border, length = len(prompt), len(prompt + answer)
        spans = _spans(choice, prompt + answer)
        if spans is not None:
            break
    starts = choice.text_offset
    count = len(spans) if spans is not None else sum(start < length for start in starts)
    given = choice.prompt_tokens if choice.prompt_tokens is not None else count
    # A token that begins every text need not have a position; nor need unspelled ones.
    if not 0 <= given - count <= (1 + unspelled) * (spans is not None):
        raise wrong_number(given, count)
    if spans is None:
        raise Fault(
            f"the server's {count} tokens do not make up the given text of {length} characters: "
            "send token ids where it takes them"
        )
    found = [i for i, (start, end) in enumerate(spans) if i > 0 and end > border and start < length]
    return Positions(found, count, given - count)


def _spans(choice: Choice, text: str) -> list[tuple[int, int]] | None:
    """Start and end of each token of the text; None where they are not its tokens, end to end."""
    # Some servers count a token that begins every text, though it is no part of it.
    begins = bool(choice.tokens) and choice.top_logprobs[0] is None
    for base in (0, len(choice.tokens[0])) if begins else (0,):
        starts = [start - base for start in choice.text_offset]
        if 0 in starts[:2]:
            spans = _tiling(starts, choice.tokens, text)
            if spans is not None:
                return spans
    return None


def _tiling(starts: list[int], tokens: list[str], text: str) -> list[tuple[int, int]] | None:
    count = next((i for i, start in enumerate(starts) if start >= len(text)), len(starts))
    spans = []
    for i in range(count):
        start, token = starts[i], tokens[i]
        whole = not is_shared(token)
        end = starts[i + 1] if i + 1 < len(starts) else (start + len(token) if whole else len(text))
        found = text[max(start, 0) : end]
        if i == 0:  # the blank before the first word may be the tokenizer's
            found, token = found.lstrip(), token.lstrip()
        if end < start or (start >= 0 and whole and found != token):
            return None
        if end == start and ord(text[start]) > 127:
            end = start + 1  # a part of a character, whose last token has the width
        spans.append((start, end))
    return spans if spans and max(end for _, end in spans) == len(text) else None
