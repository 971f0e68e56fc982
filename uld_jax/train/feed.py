"""The batches of a run in their order, each with the signals of the teachers that stream."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from uld_jax.teacher import StreamedTeacher
from uld_jax.types import SortedSignal


@dataclasses.dataclass(frozen=True)
class FedBatch:
    """A batch to train on.

    Attributes:
        arrays: What `uld_jax.data.collate` returns.
        signals: For each teacher its signal, on the way to the student's devices; None for one
            that does not stream.
        iterator_state: The data iterator's after this batch, whatever has been read since.

    Example:
        >>> FedBatch({}, [], {"next_index": 3}).iterator_state
        {'next_index': 3}
    """

    arrays: Mapping[str, Any]
    signals: list[SortedSignal | None]
    iterator_state: dict[str, Any]


class Feed:
    """Reads as many batches ahead as the teachers that stream are deep, and has these start.

    Args:
        iterator: Of the loader, where the run begins.
        teachers: Those that stream, and None for each that does not.
        batches: How many there are to train on.

    Example:
        >>> import numpy as np
        >>> batches = grain.MapDataset.range(5).to_iter_dataset()
        >>> feed = Feed(iter(batches), [None], 3)
        >>> [int(feed.take().arrays) for _ in range(3)]
        [0, 1, 2]
    """

    def __init__(
        self,
        iterator: grain.DatasetIterator[dict[str, Any]],
        teachers: Sequence[StreamedTeacher | None],
        batches: int,
    ) -> None:
        self._iterator = iterator
        self._teachers = teachers
        self._left = batches
        self._queue: collections.deque[FedBatch] = collections.deque()
        self.fill()

    def take(self) -> FedBatch:
        """The next batch, whose signals have been started.

        Returns:
            The batch.
        """
        if not self._queue:
            self._queue.append(self._next())
        return self._queue.popleft()

    def fill(self) -> None:
        """Starts the signals of the batches to come, as far ahead as each teacher goes."""
        depths = [0 if teacher is None else teacher.options.depth for teacher in self._teachers]
        while self._left and len(self._queue) < max(depths, default=0):
            self._queue.append(self._next())
        for ahead, batch in enumerate(self._queue):
            for number, teacher in enumerate(self._teachers):
                waits = batch.signals[number] is None and ahead < depths[number]
                if teacher is not None and waits:
                    batch.signals[number] = teacher.signal(batch.arrays["teachers"][number])

    def _next(self) -> FedBatch:
        self._left -= 1
        arrays = next(self._iterator)
        return FedBatch(arrays, [None for _ in self._teachers], self._iterator.get_state())
