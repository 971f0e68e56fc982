"""What some examples show of a pair: how answers align, and what does not fit."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uld_jax.data import (
    Encoded,
    Example,
    Pair,
    Side,
    TokenBytes,
    align_spans,
    byte_offsets,
    encode_prompts,
    pairs_or_reasons,
    positional_pairs,
)

# Groups with more tokens than this on a side are counted together.
LARGEST_GROUP = 4


class AlignedText(NamedTuple):
    """One text in both tokenizers.

    Attributes:
        text: The text.
        student: [start, end) bytes of the student's tokens.
        teacher: Likewise.
        groups: (student indices, teacher indices) that cover the same bytes.
    """

    text: str
    student: list[tuple[int, int]]
    teacher: list[tuple[int, int]]
    groups: list[tuple[tuple[int, ...], tuple[int, ...]]]


class SampleFacts(NamedTuple):
    """Of examples and their answers.

    Attributes:
        examples: Looked at.
        left_out: Reason to number, of those that training leaves out.
        positions: Answer tokens of the student that the loss compares, of those that are left.
        positional_share: Of the longer side's answer tokens, those that the i-th with the i-th
            pairs.
        single_share: Of the student's answer tokens, those whose bytes one token of the teacher has
            and no other.
        group_sizes: "student:teacher" tokens of a group that covers the same bytes, to number.
        length_ratio: Median of the teacher's answer tokens over the student's.
        student_tokens: Median tokens of a student's row.
        teacher_tokens: Of a teacher's.
        student_border: Share of the examples whose answer follows on other tokens than the student
            is given to answer: one of them reaches over the border.
        teacher_border: Likewise of the teacher.
    """

    examples: int
    left_out: dict[str, int]
    positions: int
    positional_share: float
    single_share: float
    group_sizes: dict[str, int]
    length_ratio: float
    student_tokens: int
    teacher_tokens: int
    student_border: float
    teacher_border: float


def align_text(
    text: str, student: Side, teacher: Side, reads: tuple[TokenBytes, TokenBytes] | None = None
) -> AlignedText:
    """Both tokenisations of a text, and which tokens cover the same bytes.

    Args:
        text: Any.
        student: A side.
        teacher: Another.
        reads: `TokenBytes` of both, to be kept over many calls.

    Returns:
        The alignment.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> sides = [Side(toy_tokenizer(kind=k), 64, True) for k in ("byte_level", "metaspace")]
        >>> bool(align_text("the mill", *sides).groups)
        True
    """
    own, other = reads or (TokenBytes(student.tokenizer), TokenBytes(teacher.tokenizer))
    _, spans = byte_offsets(student.tokenizer, text, read=own)
    _, teacher_spans = byte_offsets(teacher.tokenizer, text, read=other)
    return AlignedText(text, spans, teacher_spans, align_spans(spans, teacher_spans))


def sample_facts(
    examples: Sequence[Example],
    answers: Sequence[str],
    student: Side,
    teacher: Side,
    *,
    pool: Sequence[Example],
    seed: int,
    skip_eos: tuple[bool, bool] = (True, False),
) -> SampleFacts:
    """Looks at examples as training does.

    Args:
        examples: Some of the training split.
        answers: One text an example.
        student: How the student is prompted.
        teacher: How the teacher is prompted.
        pool: Examples that shots are drawn from.
        seed: Decides which shots.
        skip_eos: Whether the loss leaves out the last position of the student, of the teacher.

    Returns:
        The facts.
    """
    read = pairs_or_reasons(examples, answers, student, [teacher], pool=pool, seed=seed)
    left_out = Counter(pair for pair in read if isinstance(pair, str))
    kept = [
        (answer, pair) for answer, pair in zip(answers, read, strict=True) if isinstance(pair, Pair)
    ]
    of_kept = [e for e, pair in zip(examples, read, strict=True) if isinstance(pair, Pair)]
    borders = [
        _border_share(texts, encode_prompts(of_kept, side, pool=pool, seed=seed))
        for side, texts in (
            (student, [pair.student for _, pair in kept]),
            (teacher, [pair.teachers[0] for _, pair in kept]),
        )
    ]
    lengths = np.array(
        [(len(pair.student.answer), len(pair.teachers[0].answer)) for _, pair in kept], int
    ).reshape(-1, 2) - np.array(skip_eos, int)
    reads = TokenBytes(student.tokenizer), TokenBytes(teacher.tokenizer)
    sizes: Counter[tuple[int, int]] = Counter()
    for answer, _ in kept:
        for group in align_text(answer.strip(), student, teacher, reads).groups:
            sizes[len(group[0]), len(group[1])] += 1
    paired = sum(
        positional_pairs(*map(int, both), skip_student_eos=False, skip_teacher_eos=False)
        for both in lengths
    )
    tokens = sum(own * number for (own, _), number in sizes.items())
    rows = np.array([(p.student.length, p.teachers[0].length) for _, p in kept]).reshape(-1, 2)
    return SampleFacts(
        examples=len(examples),
        left_out=dict(left_out),
        positions=int(lengths[:, 0].sum()),
        positional_share=_share(paired, lengths.max(axis=1, initial=0).sum()),
        single_share=_share(sizes[1, 1], tokens),
        group_sizes=_histogram(sizes),
        length_ratio=float(np.median(lengths[:, 1] / np.maximum(lengths[:, 0], 1)))
        if kept
        else 0.0,
        student_tokens=int(np.median(rows[:, 0])) if kept else 0,
        teacher_tokens=int(np.median(rows[:, 1])) if kept else 0,
        student_border=borders[0],
        teacher_border=borders[1],
    )


def _border_share(texts: Sequence[Encoded], prompts: Sequence[np.ndarray]) -> float:
    """The share of texts whose tokens before the answer are not the prompt's."""
    crossed = sum(
        not np.array_equal(text.tokens[: text.answer[0]], prompt)
        for text, prompt in zip(texts, prompts, strict=True)
        if not len(text.encoder)  # whose prompt and answer are two texts
    )
    return _share(crossed, len(texts))


def _histogram(sizes: Counter[tuple[int, int]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for both, number in sorted(sizes.items()):
        names = (str(size) if size <= LARGEST_GROUP else f">{LARGEST_GROUP}" for size in both)
        found[":".join(names)] += number
    return dict(found)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
