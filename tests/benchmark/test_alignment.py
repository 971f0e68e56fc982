from uld_jax.benchmark.alignment import alignment_sheets, group_faults, measure_alignment
from uld_jax.testing import toy_tokenizer

TEXTS = ["the river", "naïve café 漢字 👩🏽‍🚀", "9 8 7", ""]


def test_toy_tokenizers_are_aligned_both_ways():
    tokenizers = {kind: toy_tokenizer(kind=kind) for kind in ("byte_level", "metaspace")}
    case = measure_alignment(tokenizers, TEXTS, repeats=1)
    assert (case["texts"], case["bytes"]) == (4, sum(len(text.encode()) for text in TEXTS))
    for name, own in case["tokenizers"].items():
        ids = [tokenizers[name](text, add_special_tokens=False).input_ids for text in TEXTS]
        assert own["tokens"] == sum(map(len, ids))
        assert min(own["tokenise_us"], own["offsets_us"]) > 0
    one, other = case["pairs"]
    assert (one["student"], one["teacher"]) == (other["teacher"], other["student"])
    for pair in (one, other):
        assert (pair["covered"], pair["violations"], pair["groups"]) == (1.0, 0, one["groups"])
        assert pair["matched"] > 50
        assert 0 < pair["one_to_one"] <= pair["groups"]
        assert pair["align_us"] > 0
    both, pairs = alignment_sheets([case])
    assert [row[0] for row in both.rows] == [*tokenizers]
    assert pairs.rows[0][6:8] == ["100.00%", "0"]
    for sheet in (both, pairs):
        assert {len(row) for row in sheet.rows} == {len(sheet.headings)}


def test_every_fault_of_a_group_is_found():
    student, teacher = [(0, 1), (1, 3), (3, 4)], [(0, 1), (1, 2), (2, 4)]
    good = [((0,), (0,)), ((1, 2), (1, 2))]
    assert group_faults("abcd", student, teacher, good) == []
    for groups, faults in (
        ([((0,), (0,)), ((1,), (1,)), ((2,), (2,))], 2),  # ends that do not meet, then starts
        ([((0,), (0,))], 1),  # open at the end
        ([((0,), (0,)), ((1, 2), (2,))], 3),  # a token left out: not the next, bytes, the end
        ([good[1], good[0]], 7),  # not in order
        ([((), ()), *good], 2),  # empty on both sides
    ):
        assert len(group_faults("abcd", student, teacher, groups)) == faults, groups


def test_nothing_kept_of_a_text_is_no_fault():
    assert group_faults(" ", [(0, 1)], [], []) == []
