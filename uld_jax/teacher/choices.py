"""What a completions endpoint says of a prompt, and what can be wrong with it."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

Prompt = str | list[int]
# What a log-probability may be above 0 by rounding.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What a server says of one prompt, checked for its form.

    Attributes:
        tokens: Each position's token as text.
        token_logprobs: Its log-probability, natural logarithm; None where the server has none.
        top_logprobs: The most likely tokens of each position and their log-probabilities.
        text_offset: Where each token starts, in characters; empty where the server does not say.
        text: The text of the completion, after the prompt's where that is echoed.
        prompt_tokens: The server's count of the prompt's tokens; None where it is not known.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    text: str
    prompt_tokens: int | None


class Fault(Exception):
    """Why a prompt has no result.

    Attributes:
        reason: One line.
        retry: Whether another attempt may end better.
        retry_after_s: Seconds that the server asked to wait.
        shared: Whether one of several prompts may be to blame, so that each is to be sent alone.
    """

    def __init__(
        self,
        reason: str,
        *,
        retry: bool = True,
        retry_after_s: float = 0.0,
        shared: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry = reason, retry
        self.retry_after_s, self.shared = retry_after_s, shared


def read_choices(content: bytes, count: int) -> list[Choice | Fault]:
    """Reads the body of an answer.

    Args:
        content: The body.
        count: Prompts of the request.

    Returns:
        For each prompt its choice, or what is wrong with it.

    Raises:
        Fault: The body as a whole cannot be used.

    Example:
        >>> body = b'''{"choices": [{"text": " b", "logprobs": {"tokens": [" b"],
        ...     "token_logprobs": [-0.5], "top_logprobs": [{" b": -0.5, " c": -1}]}}]}'''
        >>> read_choices(body, 1)[0].tokens
        [' b']
    """
    try:
        answer = json.loads(content)
    except ValueError as error:  # of its text or of its encoding
        raise Fault(f"malformed answer: not JSON: {error}", shared=True) from error
    found = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != count:
        got = f"got {len(found)}" if isinstance(found, list) else "got none"
        raise Fault(f"malformed answer: expected {count} choices, {got}", shared=True)
    usage = answer.get("usage")
    # The usage of several prompts is their sum.
    prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) and count == 1 else None
    if not isinstance(prompt_tokens, int):
        prompt_tokens = None
    if count > 1:
        if not all(isinstance(choice, dict) for choice in found) or sorted(
            str(choice.get("index")) for choice in found
        ) != sorted(map(str, range(count))):
            raise Fault(
                f"malformed answer: expected choices of index 0 to {count - 1}", shared=True
            )
        found = sorted(found, key=lambda choice: int(choice["index"]))
    return [_choice_or_fault(choice, prompt_tokens) for choice in found]


def _choice_or_fault(found: Any, prompt_tokens: int | None) -> Choice | Fault:
    try:
        return _choice(found, prompt_tokens)
    except Fault as fault:
        return fault


def _choice(found: Any, prompt_tokens: int | None) -> Choice:
    logprobs = found.get("logprobs") if isinstance(found, dict) else None
    if not isinstance(logprobs, dict):
        raise Fault("malformed answer: no logprobs: expected a server that returns them")
    tokens = _list(logprobs, "tokens", lambda x: isinstance(x, str))
    token_logprobs = _list(logprobs, "token_logprobs", lambda x: x is None or _is_logprob(x))
    top_logprobs = _list(logprobs, "top_logprobs", lambda x: x is None or _is_distribution(x))
    text_offset = (
        []
        if logprobs.get("text_offset") is None
        else _list(logprobs, "text_offset", lambda x: isinstance(x, int))
    )
    for values in (token_logprobs, top_logprobs, text_offset or tokens):
        if len(values) != len(tokens):
            raise wrong_number(len(tokens), len(values))
    text = found.get("text")
    if not isinstance(text, str):
        raise Fault("malformed answer: no text")
    return Choice(tokens, token_logprobs, top_logprobs, text_offset, text, prompt_tokens)


def wrong_number(expected: int, got: int) -> Fault:
    """The fault of an answer with too many or too few positions.

    Args:
        expected: Positions that the text has.
        got: Positions that the server told.

    Returns:
        The fault.
    """
    return Fault(f"wrong number of positions: expected {expected}, got {got}")


def _list(logprobs: dict[str, Any], name: str, is_valid: Callable[[Any], bool]) -> list[Any]:
    values = logprobs.get(name)
    if not isinstance(values, list):
        raise Fault(f"malformed answer: logprobs.{name}: expected a list")
    for i, value in enumerate(values):
        if not is_valid(value):
            raise Fault(f"malformed answer: logprobs.{name}[{i}] is {str(value)[:80]}")
    return values


def _is_logprob(value: Any) -> bool:
    # False for NaN; −inf is the logarithm of probability 0.
    return type(value) in (int, float) and value <= ROUNDING


def _is_distribution(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(map(_is_logprob, value.values()))
