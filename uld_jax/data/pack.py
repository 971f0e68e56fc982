"""Pairs as the arrays of one training batch."""

from collections.abc import Callable, Sequence

import numpy as np

from uld_jax.data.align import positional_pairs
from uld_jax.data.tokenize import Encoded, Pair

# What each of a row's n aligned positions weighs: the weighted mean is the convention's mean.
POSITION_WEIGHT: dict[str, Callable[[int], float]] = {
    "token_mean": lambda n: 1.0,
    "official": lambda n: 1.0 / n,
}


def collate(
    pairs: Sequence[Pair | None],
    *,
    student_length: int,
    teacher_length: int,
    positions: int,
    micro_batches: int,
    groups: int,
    convention: str,
    skip_student_eos: bool,
    skip_teacher_eos: bool,
    student_pad_id: int,
    teacher_pad_id: int,
    student_encoder_length: int = 0,
    teacher_encoder_length: int = 0,
) -> dict[str, np.ndarray]:
    """Lay pairs out as [micro-batch, row, token] and their answers as [micro-batch, group, N].

    B = M·G·r rows: micro-batch m, group g holds the contiguous block of r rows that starts at
    (m·G + g)·r. A group is what one data-parallel shard holds, and its indices count from its
    own first row, so a gather never leaves the shard.

    Args:
        pairs: B pairs; None is a row of padding.
        student_length: T, tokens a student row is padded to.
        teacher_length: S, tokens a teacher row is padded to.
        positions: N, answer positions a group is padded to.
        micro_batches: M.
        groups: G.
        convention: How aligned positions are weighted: "token_mean" gives each 1, "official"
            1/n to each of a row's n, so that the weighted mean is the mean over rows of the
            rows' means.
        skip_student_eos: Leave the student's last answer token out of the alignment.
        skip_teacher_eos: Leave the teacher's last answer token out of the alignment.
        student_pad_id: Fills up student rows.
        teacher_pad_id: Fills up teacher rows.
        student_encoder_length: P, tokens a prompt in the student's encoder is padded to; 0 where
            it has none.
        teacher_encoder_length: The teacher's.

    Returns:
        student_tokens, student_segment_ids: int32 [M, B/M, T]; segment 1 is text, 0 padding.
        teacher_tokens, teacher_segment_ids: int32 [M, B/M, S].
        student_encoder_tokens, …_segment_ids, teacher_…: int32 [M, B/M, P], where P is not 0.
        student_index: int32 [M, G, N], row·T + t of the hidden state that predicts an answer
            token of the student.
        targets: int32 [M, G, N], that token.
        ce_weight: float32 [M, G, N], 1 on answer tokens, 0 on padding and on answers that the
            student wrote itself.
        teacher_index: int32 [M, G, N], row·S + s of the aligned hidden state of the teacher,
            0 where there is none.
        uld_weight: float32 [M, G, N], see `convention`; 0 where nothing is aligned.

    Raises:
        ValueError: Rows do not divide into groups, or T, S or N is too small.
    """
    if len(pairs) % (micro_batches * groups):
        raise ValueError(f"{len(pairs)} rows do not divide into {micro_batches} x {groups} groups")
    group_rows = len(pairs) // (micro_batches * groups)
    skips = {"skip_student_eos": skip_student_eos, "skip_teacher_eos": skip_teacher_eos}
    students = [pair and pair.student for pair in pairs]
    teachers = [pair and pair.teacher for pair in pairs]
    rows = _pad_rows("student", students, student_length, student_encoder_length, student_pad_id)
    rows |= _pad_rows("teacher", teachers, teacher_length, teacher_encoder_length, teacher_pad_id)
    flat = [
        _group_positions(
            pairs[start : start + group_rows],
            student_length,
            teacher_length,
            positions,
            convention,
            **skips,
        )
        for start in range(0, len(pairs), group_rows)
    ]
    batch = {
        name: array.reshape(micro_batches, groups * group_rows, -1) for name, array in rows.items()
    }
    for name in flat[0]:
        stacked = np.stack([group[name] for group in flat])
        batch[name] = stacked.reshape(micro_batches, groups, positions)
    return batch


def _pad_rows(
    side: str, rows: Sequence[Encoded | None], length: int, encoder_length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """One side's arrays: what its decoder reads and, where it has one, its encoder."""
    parts = {side: ([row and row.tokens for row in rows], length)}
    if encoder_length:
        parts[f"{side}_encoder"] = ([row and row.encoder for row in rows], encoder_length)
    arrays = {}
    for name, (texts, width) in parts.items():
        tokens = np.full((len(rows), width), pad_id, np.int32)
        segments = np.zeros((len(rows), width), np.int32)
        for row, ids in enumerate(texts):
            if ids is None:
                continue
            if len(ids) > width:
                raise ValueError(f"row {row} of {name} has {len(ids)} tokens, expected <= {width}")
            tokens[row, : len(ids)] = ids
            segments[row, : len(ids)] = 1
        arrays |= {f"{name}_tokens": tokens, f"{name}_segment_ids": segments}
    return arrays


def _group_positions(
    pairs: Sequence[Pair | None],
    student_length: int,
    teacher_length: int,
    positions: int,
    convention: str,
    *,
    skip_student_eos: bool,
    skip_teacher_eos: bool,
) -> dict[str, np.ndarray]:
    needed = sum(len(pair.student.answer) for pair in pairs if pair is not None)
    if needed > positions:
        raise ValueError(f"a group has {needed} answer positions, expected <= {positions}")
    integers = ("student_index", "targets", "teacher_index")
    group = {name: np.zeros(positions, np.int32) for name in integers}
    group |= {name: np.zeros(positions, np.float32) for name in ("ce_weight", "uld_weight")}
    start = 0
    for row, pair in enumerate(pairs):
        if pair is None:
            continue
        s, t = pair.student, pair.teacher
        here = slice(start, start + len(s.answer))
        group["student_index"][here] = row * student_length + s.answer - 1
        group["targets"][here] = s.tokens[s.answer]
        group["ce_weight"][here] = 0.0 if pair.on_policy else 1.0
        n = positional_pairs(
            len(s.answer),
            len(t.answer),
            skip_student_eos=skip_student_eos,
            skip_teacher_eos=skip_teacher_eos,
        )
        aligned = slice(start, start + n)
        group["teacher_index"][aligned] = row * teacher_length + t.answer[:n] - 1
        group["uld_weight"][aligned] = POSITION_WEIGHT[convention](max(n, 1))
        start += len(s.answer)
    return group
