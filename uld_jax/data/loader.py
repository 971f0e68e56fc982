"""Training batches in a fixed order that can be taken up again at any batch."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from uld_jax.data.pack import collate
from uld_jax.data.signal_store import SignalStore
from uld_jax.data.tokenize import Pair
from uld_jax.errors import UserError

if TYPE_CHECKING:
    import grain

# Batches made ahead by one thread: enough to hide collation behind a train step.
READ_AHEAD = 2
PADDING = -1


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The padded sizes of one length bucket, and so of one compiled train step.

    Attributes:
        student_length: T.
        teacher_lengths: S of each teacher, 0 where a cache stands for it.
        positions: N, answer positions of a group.
        student_encoder_length: Tokens of the student's encoder, 0 where it has none.
        teacher_encoder_lengths: The teachers'.
    """

    student_length: int
    teacher_lengths: tuple[int, ...]
    positions: int
    student_encoder_length: int = 0
    teacher_encoder_lengths: tuple[int, ...] = (0,)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of a row, encoder and decoder together, of the student and of each teacher."""
        teachers = zip(self.teacher_lengths, self.teacher_encoder_lengths, strict=True)
        return self.student_length + self.student_encoder_length, *(sum(t) for t in teachers)


@dataclasses.dataclass(frozen=True, eq=False)
class _PlannedBatch:
    """Which pairs make a batch: int64 [B] indices, PADDING at the end."""

    bucket: int
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Layout:
    micro_batches: int
    groups: int
    process_index: int
    process_count: int

    @property
    def local_groups(self) -> int:
        return self.groups // self.process_count

    def local_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return this process's contiguous block of groups of each micro-batch."""
        start = self.process_index * self.local_groups
        by_group = rows.reshape(self.micro_batches, self.groups, -1)
        return by_group[:, start : start + self.local_groups].reshape(-1)


class Loader:
    """Batches of all epochs, planned beforehand; made by `make_loader`.

    Attributes:
        shapes: The padded sizes of each length bucket.
        signals: Each teacher's cache, or None.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        plan: Sequence[_PlannedBatch],
        shapes: tuple[BatchShape, ...],
        layout: _Layout,
        answer_room: int,
        collate_options: dict[str, Any],
    ) -> None:
        self.shapes = shapes
        self.signals: Sequence[SignalStore | None] = collate_options["signals"]
        self._pairs = pairs
        self._plan = plan
        self._layout = layout
        self._answer_room = answer_room
        self._collate_options = collate_options

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> "grain.DatasetIterator[dict[str, Any]]":
        return self.iterator()

    def iterator(self) -> "grain.DatasetIterator[dict[str, Any]]":
        """Return a new iterator over the batches of all epochs (see `pack.collate`).

        Its get_state() is a dict that json.dumps takes; set_state() continues after the batch
        at which the state was taken, in a loader made with the same arguments.

        Returns:
            grain's iterator; one thread prepares batches ahead.
        """
        # grain imports jax, which `import uld_jax.data` should not.
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
        batches = grain.MapDataset.range(len(self._plan)).map(self._collate)
        return iter(batches.to_iter_dataset(options))

    def rows(self, batch: int) -> list[Pair | None]:
        """The pairs of one batch.

        Args:
            batch: Counted from 0.

        Returns:
            This process's rows; None is a row of padding.
        """
        rows = self._layout.local_rows(self._plan[batch].rows)
        return [None if row == PADDING else self._pairs[row] for row in rows]

    def has_room(self, batch: int, pair: Pair) -> bool:
        """Whether a pair about the example of any of a batch's rows can take its place.

        Args:
            batch: Counted from 0.
            pair: With another answer, of at most `make_loader`'s answer_room tokens.

        Returns:
            Whether it can.
        """
        shape = self.shapes[self._plan[batch].bucket]
        return (
            len(pair.student.answer) <= self._answer_room
            and len(pair.student.tokens) <= shape.student_length
            and all(
                len(read.tokens) <= length
                for read, length in zip(pair.teachers, shape.teacher_lengths, strict=True)
            )
        )

    def collate(self, batch: int, rows: Sequence[Pair | None]) -> dict[str, Any]:
        """One batch's arrays with other pairs in its rows, in the same padded sizes.

        Args:
            batch: Counted from 0.
            rows: As many as `rows` returns, each with room in the batch's shape.

        Returns:
            As the iterator's.

        Raises:
            ValueError: A row has no room.
        """
        return collate(
            rows,
            **dataclasses.asdict(self.shapes[self._plan[batch].bucket]),
            micro_batches=self._layout.micro_batches,
            groups=self._layout.local_groups,
            **self._collate_options,
        )

    def _collate(self, batch: int) -> dict[str, Any]:
        return self.collate(batch, self.rows(batch))


def make_loader(
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    micro_batches: int = 1,
    groups: int = 1,
    buckets: int = 1,
    position_multiple: int = 16,
    length_multiple: int = 16,
    length_parts: int = 1,
    answer_room: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    signals: Sequence[SignalStore | None] = (None,),
    token_signals: bool = False,
    convention: str = "token_mean",
    skip_student_eos: bool = True,
    skip_teacher_eos: bool = False,
    alignment: str = "positional",
    student_pad_id: int = 0,
    teacher_pad_id: int = 0,
) -> Loader:
    """Plan the batches of all epochs.

    Every epoch holds every pair once, in an order of its own. Pairs of like length share
    batches: they are sorted by student and teacher tokens together and cut into buckets of
    equal total length, each with one shape for the whole run. What is left at an epoch's end
    is filled up with rows of padding, which weigh nothing.

    Args:
        pairs: The tokenised examples.
        batch_size: B, rows of a batch over all processes and micro-batches.
        epochs: How often every pair is seen.
        seed: With the number of the epoch, decides the order.
        micro_batches: M, parts that the gradient is accumulated over.
        groups: G, data-parallel shards.
        buckets: Number of length buckets, at most.
        position_multiple: N is rounded up to a multiple of this.
        length_multiple: Rows' lengths are rounded up to a multiple of this.
        length_parts: Devices that a row, and a group's positions, are cut into equal parts for: the
            two multiples are made divisible by it.
        answer_room: Every row has room for an answer of so many tokens in place of its own, for
            answers that are written during training.
        process_index: This process; it makes only its own groups of each micro-batch.
        process_count: Number of processes.
        signals: For each teacher its cache, or None: a cache is read row by row, and the teacher's
            tokens are left out of the batches.
        token_signals: Take from caches tokens by id, not sorted probabilities.
        convention: See `pack.collate`, as are the arguments below.
        skip_student_eos: Leave the student's last answer token out of the alignment.
        skip_teacher_eos: Leave a teacher's last answer token out of the alignment.
        alignment: Which positions go together.
        student_pad_id: Fills up student rows.
        teacher_pad_id: Fills up teacher rows.

    Returns:
        The loader.

    Raises:
        UserError: There are no pairs, or the sizes do not divide.
    """
    _check(pairs, batch_size, epochs, buckets, micro_batches, groups, process_count)
    lengths = np.array([_row_lengths(pair, answer_room) for pair in pairs])
    answer_lengths = np.array([max(len(pair.student.answer), answer_room) for pair in pairs])
    bucket_of = assign_buckets(lengths.sum(axis=1), buckets)
    sizes = np.stack([lengths[bucket_of == b].max(axis=0) for b in range(bucket_of.max() + 1)])
    plan = [
        batch
        for epoch in range(epochs)
        for batch in _plan_epoch(lengths, bucket_of, sizes, batch_size, (seed, epoch))
    ]
    positions = _positions(plan, answer_lengths, len(sizes), micro_batches * groups)
    multiple = math.lcm(length_multiple, length_parts)
    position_multiple = math.lcm(position_multiple, length_parts)
    padded = _round_up(sizes, multiple).reshape(len(sizes), -1, 2).tolist()
    shapes = tuple(
        _shape(lengths, _round_up(most, position_multiple), signals)
        for lengths, most in zip(padded, positions.tolist(), strict=True)
    )
    options = {
        "signals": signals,
        "token_signals": token_signals,
        "convention": convention,
        "skip_student_eos": skip_student_eos,
        "skip_teacher_eos": skip_teacher_eos,
        "alignment": alignment,
        "student_pad_id": student_pad_id,
        "teacher_pad_id": teacher_pad_id,
    }
    layout = _Layout(micro_batches, groups, process_index, process_count)
    return Loader(pairs, plan, shapes, layout, answer_room, options)


def _row_lengths(pair: Pair, answer_room: int) -> list[int]:
    """Tokens of the row and of its encoder, of the student and then of each teacher.

    Of a teacher with a cache too: batches are the same whether it reads or has read.
    """
    lengths = []
    for read in (pair.student, *pair.teachers):
        room = len(read.tokens) + max(answer_room - len(read.answer), 0)
        lengths += [room, len(read.encoder)]
    return lengths


def _shape(
    lengths: Sequence[tuple[int, int]], positions: int, signals: Sequence[SignalStore | None]
) -> BatchShape:
    (student, student_encoder), *teachers = lengths
    read = [
        (0, 0) if store is not None else both for both, store in zip(teachers, signals, strict=True)
    ]
    return BatchShape(
        student,
        tuple(length for length, _ in read),
        positions,
        student_encoder,
        tuple(length for _, length in read),
    )


def assign_buckets(costs_P: np.ndarray, buckets: int) -> np.ndarray:
    """Cut items into buckets of ascending cost and of about equal total cost.

    Args:
        costs_P: [P] positive costs.
        buckets: Number of buckets, at most.

    Returns:
        int64 [P] bucket of each item; buckets count from 0, none is empty.

    Example:
        >>> assign_buckets(np.array([1, 9, 1, 9, 1, 15]), 2)
        array([0, 0, 0, 0, 0, 1])
    """
    order = np.argsort(costs_P, kind="stable")
    before = np.cumsum(costs_P[order]) - costs_P[order]
    sorted_bucket = before * buckets // costs_P.sum()
    bucket_of = np.empty(len(costs_P), np.int64)
    bucket_of[order] = np.unique(sorted_bucket, return_inverse=True)[1]
    return bucket_of


def _plan_epoch(
    lengths: np.ndarray,
    bucket_of: np.ndarray,
    sizes: np.ndarray,
    batch_size: int,
    seed: tuple[int, int],
) -> Iterator[_PlannedBatch]:
    order = np.random.default_rng(seed).permutation(len(lengths))
    queues: list[list[int]] = [[] for _ in sizes]
    for index in order:
        bucket = bucket_of[index]
        queues[bucket].append(int(index))
        if len(queues[bucket]) == batch_size:
            yield _PlannedBatch(int(bucket), np.array(queues[bucket]))
            queues[bucket] = []
    left = {bucket: rows for bucket, rows in enumerate(queues) if rows}
    together = [row for rows in left.values() for row in rows]
    largest = len(sizes) - 1
    fits = bool(together) and bool((lengths[together].max(axis=0) <= sizes[largest]).all())
    if fits and -(-len(together) // batch_size) < len(left):
        left = {largest: together}
    for bucket, rows in left.items():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            padding = [PADDING] * (batch_size - len(part))
            yield _PlannedBatch(bucket, np.array(part + padding))


def _positions(
    plan: Sequence[_PlannedBatch], answer_lengths: np.ndarray, buckets: int, groups: int
) -> np.ndarray:
    """Return, for each bucket, the most answer tokens that a group of any batch holds."""
    most = np.zeros(buckets, np.int64)
    for batch in plan:
        counts = np.where(batch.rows == PADDING, 0, answer_lengths[batch.rows])
        most[batch.bucket] = max(most[batch.bucket], counts.reshape(groups, -1).sum(axis=1).max())
    return most


def _round_up(size: Any, multiple: int) -> Any:
    return -(-size // multiple) * multiple


def _check(
    pairs: Sequence[Pair],
    batch_size: int,
    epochs: int,
    buckets: int,
    micro_batches: int,
    groups: int,
    process_count: int,
) -> None:
    sizes: Iterable[tuple[str, int]] = (
        ("batch_size", batch_size),
        ("epochs", epochs),
        ("buckets", buckets),
        ("micro_batches", micro_batches),
        ("groups", groups),
    )
    for name, size in sizes:
        if size < 1:
            raise UserError(f"{name}: expected at least 1, got {size}")
    if not pairs:
        raise UserError(
            "no pairs to make batches of, expected at least one: check what was dropped"
        )
    if batch_size % (micro_batches * groups):
        raise UserError(
            f"batch_size {batch_size} is not divisible by micro_batches {micro_batches} x "
            f"data-parallel groups {groups} = {micro_batches * groups}: "
            f"the next that is: {_round_up(batch_size, micro_batches * groups)}"
        )
    if groups % process_count:
        raise UserError(
            f"data-parallel groups {groups} are not divisible by process_count {process_count}: "
            "give every process the same number of shards"
        )
