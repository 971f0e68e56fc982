import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uld_jax.data.align import align_spans, positional_pairs

LENGTH = 12


@pytest.mark.parametrize(
    ("n_student", "n_teacher", "skip_student", "skip_teacher", "expected"),
    [
        (4, 4, False, False, 4),
        (4, 4, True, False, 3),
        (4, 4, False, True, 3),
        (5, 3, True, False, 3),
        (0, 3, True, False, 0),
        (1, 1, True, True, 0),
    ],
)
def test_positional_pairs(n_student, n_teacher, skip_student, skip_teacher, expected):
    n = positional_pairs(
        n_student, n_teacher, skip_student_eos=skip_student, skip_teacher_eos=skip_teacher
    )
    assert n == expected


def test_rows_of_the_golden_fixture():
    row_0 = align_spans([(0, 3), (3, 5), (5, 5)], [(0, 1), (1, 3), (3, 5), (5, 5)])
    assert row_0 == [((0,), (0, 1)), ((1,), (2,)), ((2,), (3,))]
    row_1 = align_spans([(0, 1), (1, 2), (2, 4), (4, 6), (6, 6)], [(0, 2), (2, 6), (6, 6)])
    assert row_1 == [((0, 1), (0,)), ((2, 3), (1,)), ((4,), (2,))]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        pytest.param([], [(0, 2)], [], id="one side is empty"),
        pytest.param([(0, 2), (2, 2)], [(0, 2)], [((0,), (0,))], id="EOS on one side only"),
        pytest.param(
            [(0, 3), (3, 3)],
            [(0, 2), (2, 2)],
            [((0,), (0,)), ((1,), (1,))],
            id="EOS of both, ends that do not meet",
        ),
        pytest.param(
            [(0, 2), (2, 5)],
            [(0, 2), (2, 4)],
            [((0,), (0,)), ((1,), (1,))],
            id="both go on after the last shared end",
        ),
        pytest.param(
            [(0, 2), (2, 4)],
            [(0, 2), (2, 4), (4, 6)],
            [((0,), (0,)), ((1,), (1, 2))],
            id="one side goes on: the last group takes it",
        ),
        pytest.param([(0, 2)], [(0, 3)], [((0,), (0,))], id="no shared end"),
        pytest.param(
            [(0, 3), (0, 3), (0, 3), (3, 4)],
            [(0, 3), (3, 4)],
            [((0, 1, 2), (0,)), ((3,), (1,))],
            id="a character split over tokens that repeat its span",
        ),
        pytest.param(
            [(0, 0), (0, 2)],
            [(0, 0), (0, 2)],
            [((0,), (0,)), ((1,), (1,))],
            id="a word mark without width on both sides",
        ),
        pytest.param(
            [(0, 0), (0, 2)],
            [(0, 2)],
            [((0, 1), (0,))],
            id="on one side only: with the token that follows",
        ),
        pytest.param(
            [(0, 2), (2, 2), (2, 4)],
            [(0, 2), (2, 4)],
            [((0,), (0,)), ((1, 2), (1,))],
            id="the same inside of the text",
        ),
        pytest.param(
            [(0, 2), (1, 3), (3, 4)],
            [(0, 2), (2, 3), (3, 4)],
            [((0, 1), (0, 1)), ((2,), (2,))],
            id="an end inside a span of the token that follows",
        ),
        pytest.param([(0, 2), (2, 2)], [(0, 0), (0, 2)], [((0,), (0, 1))], id="EOS against a mark"),
        pytest.param([(0, 0)], [(0, 0)], [((0,), (0,))], id="EOS alone"),
        pytest.param(
            [(1, 4)], [(0, 1), (1, 4)], [((0,), (0, 1))], id="a separator on one side only"
        ),
    ],
)
def test_edges(student, teacher, expected):
    assert align_spans(student, teacher) == expected


def tokenisation(cuts, copies, eos):
    """Contiguous spans of LENGTH bytes, some repeated, perhaps with EOS."""
    ends = sorted({*cuts, LENGTH})
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    repeated = [span for i, span in enumerate(spans) for _ in range(1 + (i in copies))]
    return repeated + [(LENGTH, LENGTH)] * eos


SIDE = st.builds(
    tokenisation,
    st.sets(st.integers(1, LENGTH - 1)),
    st.sets(st.integers(0, LENGTH)),
    st.booleans(),
)


@given(SIDE, SIDE)
def test_groups_partition_in_order_and_cover_the_same_bytes(student, teacher):
    groups = align_spans(student, teacher)
    both_eos = student[-1] == teacher[-1] == (LENGTH, LENGTH)
    for side, offsets in enumerate((student, teacher)):
        members = list(itertools.chain.from_iterable(group[side] for group in groups))
        expected = [i for i, (a, b) in enumerate(offsets) if b > a or both_eos]
        assert members == expected
    for s, t in groups:
        assert student[s[0]][0] == teacher[t[0]][0]
        assert student[s[-1]][1] == teacher[t[-1]][1]
    ends = {student[s[-1]] for s, _ in groups}
    assert len(groups) == len(ends)


@given(SIDE, SIDE)
def test_groups_are_as_small_as_can_be(student, teacher):
    shared = {b for a, b in student if b > a} & {b for a, b in teacher if b > a}
    wide = [s for s, _ in align_spans(student, teacher) if student[s[0]] != (LENGTH, LENGTH)]
    assert len(wide) == len(shared)


@given(SIDE, SIDE)
def test_sides_can_be_swapped(student, teacher):
    swapped = [(s, t) for t, s in align_spans(teacher, student)]
    assert swapped == align_spans(student, teacher)


@pytest.mark.parametrize("offsets", [[(0, 3), (2, 2)], [(2, 3), (1, 4)], [(3, 1)]])
def test_offsets_that_decrease(offsets):
    with pytest.raises(ValueError, match=r"teacher token .* must not decrease"):
        align_spans([(0, 3)], offsets)
