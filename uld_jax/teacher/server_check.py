"""Whether a server's echo means what the protocol says, found out before it is relied on."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from uld_jax.errors import UserError
from uld_jax.teacher.choices import Choice, Fault, Prompt
from uld_jax.teacher.completions import CompletionsClient
from uld_jax.teacher.echo import (
    EXCESS,
    ServedText,
    echo_positions,
    entry,
    is_shared,
    text_positions,
)

SHIFTS: tuple[int, ...] = (0, 1, -1)
# Tokens of a greedy continuation: enough that no two shifts agree by chance.
CONTINUATION = 8
# Only likely tokens are compared: of the others servers keep few digits.
LIKELY, MOST_COMPARED = 3.0, 5


@dataclasses.dataclass(frozen=True)
class ServerCheck:
    """What the self-check of a server found.

    Attributes:
        shift: 0 where the entry at a token is the distribution that predicted it, as the protocol
            says; 1 where it is the prediction after that token (llama-cpp-python 0.3.36); −1 where
            it is the one before. `signal` corrects it.
        positions: How many were compared.
        difference: The largest between log-probabilities that must be equal.
    """

    shift: int
    positions: int
    difference: float

    def __str__(self) -> str:
        entries = "entries as the protocol says"
        if self.shift:
            entries = f"entries shifted by {self.shift:+d}, corrected"
        return f"{entries}: {self.positions} positions within {self.difference:.1e}"


def check_server(
    client: CompletionsClient,
    texts: Sequence[ServedText],
    *,
    tolerance: float = 2e-2,
    expected: Sequence[np.ndarray] | None = None,
) -> ServerCheck:
    """Finds at which shift a server's echo agrees with what is known, and refuses one without.

    What is known is by default the server's own greedy continuation of each prompt, whose
    log-probabilities no server misplaces; or the caller's log-probabilities of each answer.

    Args:
        client: Of the server.
        texts: A few that are like those to come: a server may treat texts that begin with a
            special token in another way.
        tolerance: Largest difference of log-probabilities (nats) that still is agreement.
        expected: For each text [n, j], the j largest log-probabilities (descending) at each of
            the n positions that predict its answer, by its own teacher.

    Returns:
        The shift, and how well it agrees.

    Raises:
        UserError: No shift agrees, several do, nothing could be compared, or no answer came.
    """
    worst, compared = dict.fromkeys(SHIFTS, 0.0), 0
    for i, text in enumerate(texts):
        if expected is None:
            differences, count = _against_continuation(client, text)
        else:
            differences, count = _against_values(client, text, expected[i])
        compared += count
        worst = {shift: max(worst[shift], differences[shift]) for shift in SHIFTS}
    where = f"self-check of {client.address} with {len(texts)} texts"
    if not compared:
        raise UserError(
            f"{where}: nothing to compare: expected prompts that the model continues with tokens "
            "of their own: choose others, or give the teacher's own values"
        )
    found = [shift for shift in SHIFTS if worst[shift] <= tolerance]
    told = ", ".join(f"{worst[shift]:.2g} at shift {shift:+d}" for shift in SHIFTS)
    if not found:
        raise UserError(
            f"{where}: its log-probabilities of a given text are not those of "
            f"{'its own continuation' if expected is None else 'the teacher'}: expected a "
            f"difference up to {tolerance:g} at one shift, got {told} (inf: another likeliest "
            "token): use another server or version"
        )
    if len(found) > 1:
        raise UserError(
            f"{where}: several shifts agree ({told}): choose texts that are less uniform"
        )
    return ServerCheck(found[0], compared, worst[found[0]])


def _against_continuation(
    client: CompletionsClient, text: ServedText
) -> tuple[dict[int, float], int]:
    """Differences by shift, and the number of positions compared."""
    prompt: Prompt = text.prompt
    if text.encoded is not None:
        prompt = text.encoded.tokens[: text.encoded.answer[0]].tolist()
    written = _one(client, prompt, echo=False, max_tokens=CONTINUATION)
    if not written.text:
        return dict.fromkeys(SHIFTS, 0.0), 0
    # As text even where ids are taken: of its own tokens the server tells the text only.
    whole = ServedText(text.id, text.prompt, written.text, unspelled=text.unspelled)
    echo = _one(client, whole.text, echo=True, max_tokens=client.server.max_tokens)
    try:
        positions = text_positions(echo, whole).answer
    except Fault as fault:
        raise _refused(client, fault) from fault
    pairs = []
    for i, token, known in zip(positions, written.tokens, written.top_logprobs, strict=False):
        # From where the text is cut into other tokens than it was written in, nothing is known.
        if echo.tokens[i] != token or known is None:
            break
        pairs.append((i, known))
    return {s: _largest_difference(echo, pairs, s) for s in SHIFTS}, len(pairs)


def _largest_difference(
    echo: Choice, pairs: Sequence[tuple[int, dict[str, float]]], shift: int
) -> float:
    differences = [0.0]
    for i, known in pairs:
        try:
            found = entry(echo, i - shift)
        except Fault:
            return math.inf
        differences.append(_difference(known, found))
    return max(differences)


def _difference(known: dict[str, float], found: dict[str, float]) -> float:
    best = max(known.values())
    names = sorted(known, key=lambda name: -known[name])[:MOST_COMPARED]
    if found.get(names[0], -math.inf) < max(found.values()) - 1e-2:
        return math.inf
    likely = [name for name in names if known[name] > best - LIKELY]
    return max((abs(known[n] - found.get(n, -math.inf)) for n in likely), default=math.inf)


def _against_values(
    client: CompletionsClient, text: ServedText, expected: np.ndarray
) -> tuple[dict[int, float], int]:
    echo = _one(client, text.sent, echo=True, max_tokens=client.server.max_tokens)
    try:
        positions = echo_positions(echo, text).answer
    except Fault as fault:
        raise _refused(client, fault) from fault
    if len(positions) != len(expected):
        raise UserError(
            f"self-check of {client.address}: the answer of {text.id!r} has {len(positions)} "
            f"tokens there and {len(expected)} here: expected the same tokenizer"
        )
    return {s: _values_difference(echo, positions, expected, s) for s in SHIFTS}, len(positions)


def _values_difference(
    echo: Choice, positions: Sequence[int], expected: np.ndarray, shift: int
) -> float:
    differences = [0.0]
    for i, known in zip(positions, expected, strict=True):
        try:
            found = sorted(entry(echo, i - shift).values(), reverse=True)
        except Fault:
            return math.inf
        likely = [value for value in known.tolist() if value > known[0] - LIKELY][:MOST_COMPARED]
        pairs = zip(likely, found, strict=False)
        differences.append(max(abs(ours - theirs) for ours, theirs in pairs))
    return max(differences)


def _one(client: CompletionsClient, prompt: Prompt, *, echo: bool, max_tokens: int) -> Choice:
    result = client.ask([prompt], lambda _, choice: choice, echo=echo, max_tokens=max_tokens)[0]
    if isinstance(result, Fault):
        raise _refused(client, result) from result
    # Where two tokens share a text, or the vocabulary has no more, there are rightly fewer.
    told = [
        len(top)
        for top in result.top_logprobs
        if top is not None and not any(map(is_shared, top)) and not _is_whole(top)
    ]
    if told and max(told) < client.server.top_k:
        raise UserError(
            f"self-check of {client.address}: expected {client.server.top_k} log-probabilities a "
            f"position (top_k), got at most {max(told)}: ask for fewer, or raise the server's limit"
        )
    return result


def _is_whole(logprobs: dict[str, float]) -> bool:
    return sum(math.exp(max(value, -1e4)) for value in logprobs.values()) > 1 - EXCESS


def _refused(client: CompletionsClient, fault: Fault) -> UserError:
    return UserError(
        f"self-check of {client.address}: {fault.reason}: expected the log-probabilities of a "
        "given text: check that the server runs, takes echo and logprobs, and how it was started"
    )
