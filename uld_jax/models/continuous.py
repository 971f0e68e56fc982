"""Continuous batching: which prompt is in which row of the pool, and what comes out of it."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from uld_jax.models.pool import Plan, Pool, Request, advance, fill, refill
from uld_jax.models.stop_strings import StopStrings
from uld_jax.processes import fetch

# Steps between looks at the text where there are stop strings.
LOOK_EVERY = 16


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a prompt goes on.

    Args:
        ids: The new token ids, without the stop token. A stop string's are among them, up to the
            token that completes it, as in transformers.
        stop: What ended it: "eos", "stop_string" or "length".
        log_probs: f32, of each id under the softmax of the model's own logits (before penalty,
            temperature and cuts), or None where they were not asked for.
        text: The ids as text without special tokens, cut exactly before the stop string; None
            without a tokenizer.

    Example:
        >>> Continuation([5, 6], "length").stop
        'length'
    """

    ids: list[int]
    stop: str
    log_probs: np.ndarray | None = None
    text: str | None = None


def length_bucket(length: int, smallest: int = 16) -> int:
    """The padded prompt length: 16, 24, 32, 48, 64, 96, …, so that few programs are compiled.

    Example:
        >>> [length_bucket(n) for n in (1, 17, 25, 100)]
        [16, 24, 32, 128]
    """
    bucket = smallest
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


class Batcher:
    """Runs prompts through one pool, the next ones taking the places of those that have ended.

    Args:
        model: The decoder or encoder-decoder.
        request: What is asked of it.
        plan: What the programs are made for.
        rows: Rows of the pool, at least.
        shards: Batch shards of the mesh: rows are rounded up to a multiple.
        stops: Texts that end an answer.
    """

    def __init__(
        self,
        model: nnx.Module,
        request: Request,
        plan: Plan,
        *,
        rows: int,
        shards: int,
        stops: StopStrings,
    ) -> None:
        graph, params = nnx.split(model)
        self._model, self._plan, self._stops = (graph, params, request), plan, stops
        self._rows = rows = -(-rows // shards) * shards
        # So many rows are refilled together: fewer would read prompts less efficiently, more
        # would stand idle for longer.
        self._group = -(-max(1, rows // 4) // shards) * shards
        self._steps = LOOK_EVERY if stops.texts else plan.new_tokens
        self._owner = np.full(rows, -1)
        self._known = np.zeros(rows, int)
        self._ended = np.zeros(rows, bool)
        self._pool: Any = None

    def run(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        order: Sequence[int],
        numbers_NW: np.ndarray | None = None,
    ) -> Iterator[dict[int, Continuation]]:
        """Continues prompts.

        Args:
            prompts: Token ids.
            order: Which of them, in which order.
            numbers_NW: uint32, folded into the key for each prompt; its place by default.

        Yields:
            The continuations that became known together, by their prompts' numbers.
        """
        if numbers_NW is None:
            numbers_NW = np.arange(len(prompts), dtype=np.uint32)[:, None]
        waiting = collections.deque(order)
        while waiting or (self._owner >= 0).any():
            self._admit(prompts, numbers_NW, waiting)
            enough = min(self._group, len(waiting)) if waiting else self._rows
            self._pool = advance(
                *self._model,
                self._pool,
                self._ended.copy(),
                np.int32(enough),
                np.int32(self._steps),
                plan=self._plan,
            )
            if done := self._collect():
                yield done

    def _admit(
        self, prompts: Sequence[Any], numbers_NW: np.ndarray, waiting: collections.deque[int]
    ) -> None:
        """Gives idle rows to waiting prompts, where a whole group of rows is idle."""
        while waiting:
            idle = np.flatnonzero(self._owner < 0)
            whole = len(idle) == self._rows
            size = self._rows if whole else self._group
            taken = min(size, len(waiting))
            if len(idle) < taken:
                return
            numbers = [waiting.popleft() for _ in range(taken)]
            rows = idle[:taken]
            self._owner[rows], self._known[rows], self._ended[rows] = numbers, 0, False
            width = length_bucket(max(len(prompts[i]) for i in numbers))
            # Places that remain have length 0: they are done before they start.
            tokens = np.zeros((size, min(width, self._plan.width)), np.int32)
            lengths, of_row = np.zeros(size, np.int32), np.zeros(size, np.int32)
            for place, i in enumerate(numbers):
                lengths[place], of_row[place] = len(prompts[i]), i
                tokens[place, : lengths[place]] = prompts[i]
            new = (tokens, lengths, numbers_NW[of_row])
            if whole:
                self._pool = None  # before there is another
                self._pool = fill(*self._model, *new, plan=self._plan)
            else:
                into = np.full(size, self._rows, np.int32)
                into[:taken] = rows
                self._pool = refill(*self._model, self._pool, into, *new, plan=self._plan)

    def _collect(self) -> dict[int, Continuation]:
        """Takes finished answers out of their rows."""
        pool: Pool = self._pool
        done_B, count_B, out_BN, log_probs_BN = fetch(
            (pool.done_B, pool.count_B, pool.out_BN, pool.log_probs_BN)
        )
        found = {}
        for row in np.flatnonzero((self._owner >= 0) & (done_B | bool(self._stops.texts))):
            ids = out_BN[row, : count_B[row]].tolist()
            cut = self._stops.cut(ids, int(self._known[row]))
            self._known[row] = len(ids)
            if cut is not None:
                ids, text, stop = ids[: cut[0]], cut[1], "stop_string"
            elif done_B[row]:
                text, stop = self._stops.text(ids), "eos"
                if len(ids) == self._plan.new_tokens:
                    stop = "length"
            else:
                continue
            log_probs = None if log_probs_BN is None else log_probs_BN[row, : len(ids)].copy()
            found[int(self._owner[row])] = Continuation(ids, stop, log_probs, text)
            self._owner[row], self._ended[row] = -1, True
        return found
