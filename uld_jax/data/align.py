"""Which answer tokens of the student go with which of the teacher."""

from collections.abc import Sequence
from typing import NamedTuple

Span = tuple[int, int]
Group = tuple[tuple[int, ...], tuple[int, ...]]


def positional_pairs(
    n_student: int, n_teacher: int, *, skip_student_eos: bool, skip_teacher_eos: bool
) -> int:
    """Count the aligned positions when the i-th answer token goes with the i-th.

        n = max(0, min(n_student - skip_student_eos, n_teacher - skip_teacher_eos))

    Args:
        n_student: Answer tokens of the student.
        n_teacher: Answer tokens of the teacher.
        skip_student_eos: Leave out the student's last answer token.
        skip_teacher_eos: Leave out the teacher's last answer token.

    Returns:
        n: positions 0 to n - 1 of both answers are aligned.

    Example:
        >>> positional_pairs(4, 4, skip_student_eos=True, skip_teacher_eos=False)
        3

    Reference:
        Boizard et al., arXiv 2402.12030: the alignment of its released code.
    """
    return max(0, min(n_student - skip_student_eos, n_teacher - skip_teacher_eos))


def align_spans(student_offsets: Sequence[Span], teacher_offsets: Sequence[Span]) -> list[Group]:
    """Group the tokens of two tokenisations of one text that cover the same bytes.

    A group closes where a token of each side ends at the same byte and the next begins no
    earlier: tokens whose spans overlap, such as those of a split character that repeat its span,
    stay together. If the two ends of the text do not meet, the last group takes what is left on
    both sides.

    Tokens of no width, such as a lone word mark, are a group with those at the same byte on the
    other side; where that has none, they are in the group of the token that follows. Those after
    the last token of width, such as end-of-text, are a group with those of the other side; where
    that has none, they are in no group.

    Args:
        student_offsets: [start, end) bytes of each token; starts and ends never decrease.
        teacher_offsets: The same for the teacher.

    Returns:
        (student indices, teacher indices) a group, ascending on both sides, none empty.

    Raises:
        ValueError: Offsets that decrease, or end before they start.

    Example:
        >>> align_spans([(0, 1), (1, 2), (2, 6), (6, 6)], [(0, 2), (2, 6), (6, 6)])
        [((0, 1), (0,)), ((2,), (1,)), ((3,), (2,))]
    """
    student, teacher = _cuts("student", student_offsets), _cuts("teacher", teacher_offsets)
    groups: list[Group] = []
    i = j = 0
    if student.wide and teacher.wide:
        # An end that one side has nothing after closes no group: the last one takes the rest.
        last = 2 * min(student.end, teacher.end)
        stops = teacher.stops
        for key, s in student.stops.items():
            if key in stops and key < last:
                t = stops[key]
                # Most groups are one token on both sides, for which range is slow.
                own = (i,) if s == i + 1 else tuple(range(i, s))
                groups.append((own, (j,) if t == j + 1 else tuple(range(j, t))))
                i, j = s, t
        groups.append((tuple(range(i, student.wide)), tuple(range(j, teacher.wide))))
    n, m = len(student_offsets), len(teacher_offsets)
    if student.wide < n and teacher.wide < m:
        groups.append((tuple(range(student.wide, n)), tuple(range(teacher.wide, m))))
    return groups


class _Cuts(NamedTuple):
    """Where one side's groups may end.

    Attributes:
        stops: By 2 · byte, and that + 1 after tokens of no width at the byte, ascending: how many
            tokens lie before.
        wide: How many tokens there are up to the last of width.
        end: Its last byte.
    """

    stops: dict[int, int]
    wide: int
    end: int


def _cuts(name: str, offsets: Sequence[Span]) -> _Cuts:
    stops: dict[int, int] = {}
    wide = last_start = last_end = widest = 0
    for stop, (start, end) in enumerate(offsets, 1):
        if end < start or start < last_start or end < last_end:
            raise ValueError(
                f"{name} token {stop - 1} spans [{start}, {end}) after [{last_start}, {last_end}): "
                "starts and ends must not decrease"
            )
        if start < last_end:
            while stops and (key := next(reversed(stops))) // 2 > start:
                del stops[key]
        if end > start:
            stops[2 * end] = wide = stop
            widest = end
        else:
            stops[2 * end + 1] = stop
        last_start, last_end = start, end
    return _Cuts(stops, wide, widest)
