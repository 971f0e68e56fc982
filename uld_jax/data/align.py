"""Which answer tokens of the student go with which of the teacher."""

from collections.abc import Sequence

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

    A group closes where a student token and a teacher token end at the same byte. Tokens that
    share a character split over several of them, and so repeat its span, stay together. If the
    two ends of the text do not meet, the last group takes what is left on both sides.

    Tokens of no width are grouped apart: those after the last token of width, such as
    end-of-text, with those of the other side; others, such as a lone word mark, with those at
    the same byte on the other side. Where the other side has none they are in no group.

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
    for name, offsets in (("student", student_offsets), ("teacher", teacher_offsets)):
        _check_monotone(name, offsets)
    student, teacher = _Tokens(student_offsets), _Tokens(teacher_offsets)
    groups = _close_where_ends_meet(student, teacher)
    for byte in student.inner.keys() & teacher.inner.keys():
        groups.append((tuple(student.inner[byte]), tuple(teacher.inner[byte])))
    groups.sort()
    if student.trailing and teacher.trailing:
        groups.append((tuple(student.trailing), tuple(teacher.trailing)))
    return groups


class _Tokens:
    """Token indices of one side: wide ones with their ends, and those of no width."""

    def __init__(self, offsets: Sequence[Span]) -> None:
        self.wide = [i for i, (start, end) in enumerate(offsets) if end > start]
        self.ends = [offsets[i][1] for i in self.wide]
        after = self.wide[-1] + 1 if self.wide else 0
        self.trailing = list(range(after, len(offsets)))
        self.inner: dict[int, list[int]] = {}
        for i, (start, end) in enumerate(offsets[:after]):
            if start == end:
                self.inner.setdefault(start, []).append(i)


def _close_where_ends_meet(student: _Tokens, teacher: _Tokens) -> list[Group]:
    if not student.ends or not teacher.ends:
        return []
    last_ends = (student.ends[-1], teacher.ends[-1])
    met = sorted(set(student.ends) & set(teacher.ends))
    # An end that one side has nothing after closes no group: the last one takes the rest.
    borders = [end for end in met if end < min(last_ends)] + [max(last_ends)]
    return list(zip(_cut(student, borders), _cut(teacher, borders), strict=True))


def _cut(side: _Tokens, borders: list[int]) -> list[tuple[int, ...]]:
    parts: list[tuple[int, ...]] = []
    start = 0
    for border in borders:
        stop = start
        while stop < len(side.ends) and side.ends[stop] <= border:
            stop += 1
        parts.append(tuple(side.wide[start:stop]))
        start = stop
    return parts


def _check_monotone(name: str, offsets: Sequence[Span]) -> None:
    last = (0, 0)
    for i, (start, end) in enumerate(offsets):
        if end < start or start < last[0] or end < last[1]:
            raise ValueError(
                f"{name} token {i} spans [{start}, {end}) after [{last[0]}, {last[1]}): "
                "starts and ends must not decrease"
            )
        last = (start, end)
