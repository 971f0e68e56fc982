"""Pairs as the arrays of one training batch."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from uld_jax.data.align import align_spans, positional_pairs
from uld_jax.data.signal import Signal, pad_signals
from uld_jax.data.signal_store import SignalStore
from uld_jax.data.tokenize import Encoded, Pair
from uld_jax.errors import UserError

# What each of a row's n aligned positions weighs: the weighted mean is the convention's mean.
POSITION_WEIGHT: dict[str, Callable[[int], float]] = {
    "token_mean": lambda n: 1.0,
    "official": lambda n: 1.0 / n,
}


def collate(
    pairs: Sequence[Pair | None],
    *,
    student_length: int,
    teacher_lengths: Sequence[int],
    positions: int,
    micro_batches: int,
    groups: int,
    convention: str,
    skip_student_eos: bool,
    skip_teacher_eos: bool,
    student_pad_id: int,
    teacher_pad_id: int,
    alignment: str = "positional",
    student_encoder_length: int = 0,
    teacher_encoder_lengths: Sequence[int] = (0,),
    signals: Sequence[SignalStore | None] = (None,),
    token_signals: bool = False,
) -> dict[str, Any]:
    """Lay pairs out as [micro-batch, row, token] and their answers as [micro-batch, group, N].

    B = M·G·r rows: micro-batch m, group g holds the contiguous block of r rows that starts at
    (m·G + g)·r. A group is what one data-parallel shard holds, and its indices count from its
    own first row, so a gather never leaves the shard.

    Args:
        pairs: B pairs; None is a row of padding.
        student_length: T, tokens a student row is padded to.
        teacher_lengths: S of each teacher, tokens one of its rows is padded to.
        positions: N, answer positions a group is padded to.
        micro_batches: M.
        groups: G.
        convention: How aligned positions are weighted: "token_mean" gives each 1, "official"
            1/n to each of a row's n, so that the weighted mean is the mean over rows of the
            rows' means.
        skip_student_eos: Leave the student's last answer token out of the alignment.
        skip_teacher_eos: Leave a teacher's last answer token out of the alignment.
        student_pad_id: Fills up student rows.
        teacher_pad_id: Fills up teacher rows.
        alignment: Which answer positions of the student go with which of a teacher, a key of
            `ALIGNMENTS`: "positional", the i-th with the i-th; or "span", where both are to
            predict what follows the same text: the first tokens of the groups of `align_spans`.
        student_encoder_length: P, tokens a prompt in the student's encoder is padded to; 0 where
            it has none.
        teacher_encoder_lengths: The teachers'.
        signals: For each teacher its cache, which then takes the place of its tokens, or None.
        token_signals: Take from caches the tokens that they keep by id, not sorted probabilities.

    Returns:
        student_tokens, student_segment_ids: int32 [M, B/M, T]; segment 1 is text, 0 padding.
        student_encoder_tokens, …_segment_ids: int32 [M, B/M, P], where P is not 0.
        student_index: int32 [M, G, N], row·T + t of the hidden state that predicts an answer
            token of the student.
        targets: int32 [M, G, N], that token.
        ce_weight: float32 [M, G, N], 1 on answer tokens, 0 on padding and on answers that the
            student wrote itself.
        teachers: A tuple of one dictionary a teacher: uld_weight: float32 [M, G, N], see
            `convention`, 0 where nothing is aligned; tokens, segment_ids: int32 [M, B/M, S]; the
            same of the encoder; index: int32 [M, G, N], row·S + s of the aligned hidden state, 0
            where there is none. With a cache instead of the last three signal: probs float32
            [M, G, N, K], tail_mass and error float32 [M, G, N]; or, of tokens, ids int32 and
            log_probs float32 [M, G, N, J].

    Raises:
        ValueError: Rows do not divide into groups, T, S or N is too small, or answers without
            the bytes of their tokens are to be aligned by them.
        UserError: A cache has another number of positions for an answer than the teacher.
    """
    if len(pairs) % (micro_batches * groups):
        raise ValueError(f"{len(pairs)} rows do not divide into {micro_batches} x {groups} groups")
    blocks = [
        pairs[start : start + len(pairs) // (micro_batches * groups)]
        for start in range(0, len(pairs), max(1, len(pairs) // (micro_batches * groups)))
    ]
    rows, by_group = (micro_batches, len(pairs) // micro_batches), (micro_batches, groups)
    students = [pair and pair.student for pair in pairs]
    batch: dict[str, Any] = {
        f"student_{name}": array.reshape(*rows, -1)
        for name, array in _pad_rows(
            "student", students, student_length, student_encoder_length, student_pad_id
        ).items()
    }
    batch |= _stack([_student_positions(b, student_length, positions) for b in blocks], by_group)
    skips = {"skip_student_eos": skip_student_eos, "skip_teacher_eos": skip_teacher_eos}
    align = functools.partial(ALIGNMENTS[alignment], **skips)
    teachers = []
    for i, (length, encoder_length, store) in enumerate(
        zip(teacher_lengths, teacher_encoder_lengths, signals, strict=True)
    ):
        aligned = [[*_aligned(block, i, align)] for block in blocks]
        weights = [_weights(each, positions, POSITION_WEIGHT[convention]) for each in aligned]
        teacher = _stack(weights, by_group)
        if store is not None:
            read = _token_positions if token_signals else _signal_positions
            own = [read(each, store, positions) for each in aligned]
            teacher["signal"] = _stack(own, by_group)
        else:
            own = [_teacher_positions(each, length, positions) for each in aligned]
            teacher |= _stack(own, by_group)
            read = [pair and pair.teachers[i] for pair in pairs]
            tokens = _pad_rows("teacher", read, length, encoder_length, teacher_pad_id)
            teacher |= {name: array.reshape(*rows, -1) for name, array in tokens.items()}
        teachers.append(teacher)
    return batch | {"teachers": tuple(teachers)}


def _stack(groups: Sequence[dict[str, np.ndarray]], leading: tuple[int, int]) -> dict[str, Any]:
    """[M, G, N, …] of one dictionary a group."""
    return {
        name: np.stack([group[name] for group in groups]).reshape(*leading, *array.shape)
        for name, array in groups[0].items()
    }


def _pad_rows(
    side: str, rows: Sequence[Encoded | None], length: int, encoder_length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """One model's arrays: what its decoder reads and, where it has one, its encoder."""
    parts = {"": ([row and row.tokens for row in rows], length)}
    if encoder_length:
        parts["encoder_"] = ([row and row.encoder for row in rows], encoder_length)
    arrays = {}
    for name, (texts, width) in parts.items():
        tokens = np.full((len(rows), width), pad_id, np.int32)
        segments = np.zeros((len(rows), width), np.int32)
        for row, ids in enumerate(texts):
            if ids is None:
                continue
            if len(ids) > width:
                whose = f"{side}_encoder" if name else side
                raise ValueError(f"row {row} of {whose} has {len(ids)} tokens, expected <= {width}")
            tokens[row, : len(ids)] = ids
            segments[row, : len(ids)] = 1
        arrays |= {f"{name}tokens": tokens, f"{name}segment_ids": segments}
    return arrays


def _answers(block: Sequence[Pair | None]) -> Iterator[tuple[int, Pair, int]]:
    """Row, pair and first position of each answer of a group."""
    start = 0
    for row, pair in enumerate(block):
        if pair is not None:
            yield row, pair, start
            start += len(pair.student.answer)


def _student_positions(
    block: Sequence[Pair | None], length: int, positions: int
) -> dict[str, np.ndarray]:
    needed = sum(len(pair.student.answer) for pair in block if pair is not None)
    if needed > positions:
        raise ValueError(f"a group has {needed} answer positions, expected <= {positions}")
    group: dict[str, np.ndarray] = {"ce_weight": np.zeros(positions, np.float32)}
    group |= {name: np.zeros(positions, np.int32) for name in ("student_index", "targets")}
    for row, pair, start in _answers(block):
        s = pair.student
        here = slice(start, start + len(s.answer))
        group["student_index"][here] = row * length + s.answer - 1
        group["targets"][here] = s.tokens[s.answer]
        group["ce_weight"][here] = 0.0 if pair.on_policy else 1.0
    return group


Indices = tuple[np.ndarray, np.ndarray]


def _by_position(
    student: Encoded, teacher: Encoded, *, skip_student_eos: bool, skip_teacher_eos: bool
) -> Indices:
    count = positional_pairs(
        len(student.answer),
        len(teacher.answer),
        skip_student_eos=skip_student_eos,
        skip_teacher_eos=skip_teacher_eos,
    )
    return np.arange(count), np.arange(count)


def _by_span(
    student: Encoded, teacher: Encoded, *, skip_student_eos: bool, skip_teacher_eos: bool
) -> Indices:
    spans = []
    for read, skip in ((student, skip_student_eos), (teacher, skip_teacher_eos)):
        if len(read.spans) != len(read.answer):
            raise ValueError(
                f"an answer of {len(read.answer)} tokens has {len(read.spans)} spans, expected as "
                "many: encode it with `encode_pairs`"
            )
        spans.append(read.spans[: len(read.spans) - skip].tolist())
    firsts = [(s[0], t[0]) for s, t in align_spans(*spans)]
    both = np.asarray(firsts, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


# Which of an answer's tokens go together: indices into both sides' answers.
ALIGNMENTS: dict[str, Callable[..., Indices]] = {"positional": _by_position, "span": _by_span}


class _Aligned(NamedTuple):
    """The positions that an answer has in common with a teacher's, of one row of a group.

    Attributes:
        row: In the group.
        id: Of the example.
        teacher: What it reads.
        positions: int [n], of the group's N.
        theirs: int [n], of the teacher's answer.
    """

    row: int
    id: str
    teacher: Encoded
    positions: np.ndarray
    theirs: np.ndarray


def _aligned(
    block: Sequence[Pair | None], teacher: int, align: Callable[[Encoded, Encoded], Indices]
) -> Iterator[_Aligned]:
    for row, pair, start in _answers(block):
        encoded = pair.teachers[teacher]
        own, theirs = align(pair.student, encoded)
        yield _Aligned(row, pair.id, encoded, start + own, theirs)


def _weights(
    aligned: Sequence[_Aligned], positions: int, weight: Callable[[int], float]
) -> dict[str, np.ndarray]:
    uld_weight = np.zeros(positions, np.float32)
    for each in aligned:
        uld_weight[each.positions] = weight(max(len(each.positions), 1))
    return {"uld_weight": uld_weight}


def _teacher_positions(
    aligned: Sequence[_Aligned], length: int, positions: int
) -> dict[str, np.ndarray]:
    """Where the teacher's hidden states stand."""
    index = np.zeros(positions, np.int32)
    for each in aligned:
        own = each.teacher.answer[each.theirs]
        index[each.positions] = each.row * length + own - 1
    return {"index": index}


def _signal_positions(
    aligned: Sequence[_Aligned], store: SignalStore, positions: int
) -> dict[str, np.ndarray]:
    """What the cache has of them."""
    group = {"probs": np.zeros((positions, store.max_count), np.float32)}
    group |= {name: np.zeros(positions, np.float32) for name in ("tail_mass", "error")}
    for each in aligned:
        signal = _signal(each, store)
        probs, tail_mass = pad_signals([signal], store.max_count)
        group["probs"][each.positions] = probs[each.theirs]
        group["tail_mass"][each.positions] = tail_mass[each.theirs]
        group["error"][each.positions] = signal.error[each.theirs]
    return group


def _token_positions(
    aligned: Sequence[_Aligned], store: SignalStore, positions: int
) -> dict[str, np.ndarray]:
    """The tokens that the cache has by id."""
    group = {
        "ids": np.zeros((positions, store.id_count), np.int32),
        "log_probs": np.full((positions, store.id_count), -np.inf, np.float32),
    }
    for each in aligned:
        signal = _signal(each, store)
        assert signal.ids is not None
        assert signal.log_probs is not None
        group["ids"][each.positions] = signal.ids[each.theirs]
        group["log_probs"][each.positions] = signal.log_probs[each.theirs]
    return group


def _signal(aligned: _Aligned, store: SignalStore) -> Signal:
    signal, expected = store[aligned.id], len(aligned.teacher.answer)
    if len(signal) != expected:
        raise UserError(
            f"teacher cache: example {aligned.id!r} has {len(signal)} answer positions, expected "
            f"{expected}: it was made for other answers, run `uld-jax cache` again"
        )
    return signal
