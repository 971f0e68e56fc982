import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uld_jax.data import SignalStore, SignalWriter, truncate_signal
from uld_jax.data.pack import collate
from uld_jax.data.tokenize import Encoded, Pair
from uld_jax.errors import UserError

ids = itertools.count()


def encoded(prompt, answer, base):
    tokens = np.arange(base, base + prompt + answer, dtype=np.int32)
    return Encoded(tokens, np.arange(prompt, prompt + answer, dtype=np.int32))


def pair(student, teacher):
    number = next(ids)
    return Pair(str(number), encoded(*student, base=100), (encoded(*teacher, base=500),))


def pack(pairs, **changes):
    options = {
        "student_length": 8,
        "teacher_lengths": [10],
        "positions": 12,
        "micro_batches": 1,
        "groups": 1,
        "convention": "token_mean",
        "skip_student_eos": False,
        "skip_teacher_eos": False,
        "student_pad_id": 7,
        "teacher_pad_id": 9,
    }
    batch = collate(pairs, **(options | changes))
    (teacher,) = batch.pop("teachers")
    return batch | {f"teacher_{name}": array for name, array in teacher.items()}


def test_a_batch_by_hand():
    pairs = [pair((2, 3), (4, 2)), pair((1, 2), (3, 4))]
    batch = pack(pairs, skip_student_eos=True, positions=6)
    expected = {
        "student_tokens": [[100, 101, 102, 103, 104, 7, 7, 7], [100, 101, 102, 7, 7, 7, 7, 7]],
        "student_segment_ids": [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5],
        "teacher_tokens": [
            [500, 501, 502, 503, 504, 505, 9, 9, 9, 9],
            [500, 501, 502, 503, 504, 505, 506, 9, 9, 9],
        ],
        "teacher_segment_ids": [[1] * 6 + [0] * 4, [1] * 7 + [0] * 3],
        "student_index": [[1, 2, 3, 8, 9, 0]],
        "targets": [[102, 103, 104, 101, 102, 0]],
        "ce_weight": [[1, 1, 1, 1, 1, 0]],
        "teacher_index": [[3, 4, 0, 12, 0, 0]],
        "teacher_uld_weight": [[1, 1, 0, 1, 0, 0]],
    }
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], [value], err_msg=name)
        kind = np.float32 if name.endswith("weight") else np.int32
        assert batch[name].dtype == kind, name


def test_official_weights_make_the_mean_of_row_means():
    pairs = [pair((2, 4), (2, 3)), pair((1, 2), (3, 4)), pair((2, 1), (2, 2)), None]
    batch = pack(pairs, convention="official", skip_student_eos=True)
    np.testing.assert_allclose(
        batch["teacher_uld_weight"][0, 0], [1 / 3] * 3 + [0, 1] + [0] * 7, rtol=1e-6
    )
    distance = np.random.default_rng(0).random(12)
    mean = (batch["teacher_uld_weight"] * distance).sum() / batch["teacher_uld_weight"].sum()
    assert mean == pytest.approx((distance[:3].mean() + distance[4]) / 2)


PAIRS = st.lists(
    st.one_of(
        st.none(),
        st.builds(
            pair,
            st.tuples(st.integers(1, 4), st.integers(1, 4)),
            st.tuples(st.integers(1, 5), st.integers(1, 5)),
        ),
    ),
    min_size=12,
    max_size=12,
)


@given(
    PAIRS, st.sampled_from([(1, 1), (2, 3), (3, 2), (1, 4), (6, 2)]), st.booleans(), st.booleans()
)
def test_indices_point_at_the_predicting_state_of_their_own_group(pairs, cut, skip_s, skip_t):
    micro_batches, groups = cut
    batch = pack(
        pairs,
        micro_batches=micro_batches,
        groups=groups,
        positions=48,
        skip_student_eos=skip_s,
        skip_teacher_eos=skip_t,
    )
    rows = len(pairs) // (micro_batches * groups)
    blocks = {
        name: batch[f"{name}_tokens"].reshape(micro_batches, groups, -1)
        for name in ("student", "teacher")
    }
    for m, g in itertools.product(range(micro_batches), range(groups)):
        start = (m * groups + g) * rows
        mine = [p for p in pairs[start : start + rows] if p is not None]
        real = batch["ce_weight"][m, g] == 1
        assert real.sum() == sum(len(p.student.answer) for p in mine)
        student = blocks["student"][m, g]
        np.testing.assert_array_equal(
            student[batch["student_index"][m, g][real] + 1], batch["targets"][m, g][real]
        )
        aligned = batch["teacher_uld_weight"][m, g] > 0
        lengths = [
            max(0, min(len(p.student.answer) - skip_s, len(p.teachers[0].answer) - skip_t))
            for p in mine
        ]
        expected = [
            p.teachers[0].tokens[p.teachers[0].answer[:n]]
            for p, n in zip(mine, lengths, strict=True)
        ]
        found = blocks["teacher"][m, g][batch["teacher_index"][m, g][aligned] + 1]
        np.testing.assert_array_equal(found, np.concatenate([*expected, np.empty(0)]))
        assert not real[real.sum() :].any()


def test_padding_rows_weigh_nothing():
    batch = pack([None, None], micro_batches=2)
    assert batch["student_tokens"].shape == (2, 1, 8)
    assert batch["teacher_uld_weight"].shape == (2, 1, 12)
    assert (batch["student_tokens"] == 7).all()
    assert (batch["teacher_tokens"] == 9).all()
    for name in ("ce_weight", "teacher_uld_weight", "student_segment_ids", "teacher_segment_ids"):
        assert not batch[name].any(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": 2}, "a group has 3 answer positions, expected <= 2"),
        ({"student_length": 4}, "row 0 of student has 5 tokens, expected <= 4"),
        ({"teacher_lengths": [5]}, "row 0 of teacher has 6 tokens, expected <= 5"),
        ({"groups": 2}, "1 rows do not divide into 1 x 2 groups"),
    ],
)
def test_too_small(changes, message):
    with pytest.raises(ValueError, match=message):
        pack([pair((2, 3), (4, 2))], **changes)


def asks(prompt, answer, base):
    """As an encoder-decoder reads it: the prompt apart, the answer after a start token."""
    tokens = np.arange(base, base + 1 + answer, dtype=np.int32)
    tokens[0] = 0
    prompt_ids = np.arange(base + 50, base + 50 + prompt, dtype=np.int32)
    return Encoded(tokens, np.arange(1, 1 + answer, dtype=np.int32), prompt_ids)


def test_an_encoder_decoder_batch_by_hand():
    pairs = [
        Pair("0", asks(3, 2, base=100), (encoded(4, 2, base=500),)),
        None,
        Pair("1", asks(1, 3, base=200), (encoded(2, 2, base=600),)),
    ]
    batch = pack(pairs, student_length=4, student_encoder_length=3, positions=6)
    expected = {
        "student_tokens": [[0, 101, 102, 7], [7] * 4, [0, 201, 202, 203]],
        "student_segment_ids": [[1, 1, 1, 0], [0] * 4, [1] * 4],
        "student_encoder_tokens": [[150, 151, 152], [7] * 3, [250, 7, 7]],
        "student_encoder_segment_ids": [[1, 1, 1], [0] * 3, [1, 0, 0]],
        "student_index": [[0, 1, 8, 9, 10, 0]],
        "targets": [[101, 102, 201, 202, 203, 0]],
        "teacher_index": [[3, 4, 21, 22, 0, 0]],
        "teacher_uld_weight": [[1, 1, 1, 1, 0, 0]],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], [value], err_msg=name)
    assert "teacher_encoder_tokens" not in batch
    with pytest.raises(ValueError, match="row 0 of student_encoder has 3 tokens, expected <= 2"):
        pack(pairs, student_length=4, student_encoder_length=2)


def test_a_teacher_may_be_an_encoder_decoder():
    pairs = [Pair("0", encoded(4, 2, base=100), (asks(3, 2, base=500),))]
    batch = pack(pairs, teacher_lengths=[4], teacher_encoder_lengths=[4])
    np.testing.assert_array_equal(batch["teacher_encoder_tokens"], [[[550, 551, 552, 9]]])
    np.testing.assert_array_equal(batch["teacher_tokens"], [[[0, 501, 502, 9]]])
    np.testing.assert_array_equal(batch["teacher_index"][0, 0, :2], [0, 1])
    assert "student_encoder_tokens" not in batch


def with_tokens(signal):
    """Two tokens a position, kept in half precision."""
    ids = np.arange(2 * len(signal), dtype=np.int32).reshape(-1, 2)
    return dataclasses.replace(signal, ids=ids, log_probs=np.float32(-0.5 - ids))


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Signals of two teachers' answers, of 2 and of 3 positions, in real caches."""
    stores = []
    for name, lengths in (("first", {"0": 2, "1": 3}), ("second", {"0": 3, "1": 1})):
        directory = tmp_path_factory.mktemp(name)
        settings = {"epsilon": 0.05, "cap": 8, "shard_size": 2}
        writer = SignalWriter(directory, {}, total=2, **settings)
        probs = np.sort(np.random.default_rng(len(name)).dirichlet(np.ones(4) / 2, 3))[:, ::-1]
        nothing = np.zeros(3)
        signals = {
            id_: truncate_signal(probs[:n], nothing[:n], nothing[:n], epsilon=0.05, cap=8)
            for id_, n in lengths.items()
        }
        if name == "first":
            signals = {id_: with_tokens(signal) for id_, signal in signals.items()}
        writer.write_shard(0, [*signals.items()])
        writer.finish()
        stores.append(SignalStore(directory))
    return stores


def test_signals_stand_where_the_teachers_positions_would(caches):
    read = encoded(2, 3, base=100), encoded(1, 2, base=200)
    first, second = {"0": 2, "1": 3}, {"0": 3, "1": 1}
    pairs = [
        Pair(id_, student, (encoded(1, first[id_], base=500), encoded(4, second[id_], base=700)))
        for id_, student in zip("01", read, strict=True)
    ]
    options = {
        "student_length": 8,
        "positions": 6,
        "micro_batches": 1,
        "groups": 1,
        "convention": "token_mean",
        "skip_student_eos": False,
        "skip_teacher_eos": False,
        "student_pad_id": 0,
        "teacher_pad_id": 0,
        "teacher_encoder_lengths": (0, 0),
    }
    batch = collate([*pairs, None], teacher_lengths=(0, 8), signals=(caches[0], None), **options)
    given, tokens = batch["teachers"]
    assert sorted(given) == ["signal", "uld_weight"]
    assert sorted(tokens) == ["index", "segment_ids", "tokens", "uld_weight"]
    np.testing.assert_array_equal(given["uld_weight"], [[[1, 1, 0, 1, 1, 0]]])
    np.testing.assert_array_equal(tokens["uld_weight"], [[[1, 1, 1, 1, 0, 0]]])
    signal, width = given["signal"], caches[0].max_count
    assert signal["probs"].shape == (1, 1, 6, width)
    for start, id_ in ((0, "0"), (3, "1")):
        stored = caches[0][id_]
        for n in range(2):
            probs = stored.position(n)
            np.testing.assert_array_equal(signal["probs"][0, 0, start + n, : len(probs)], probs)
            assert not signal["probs"][0, 0, start + n, len(probs) :].any()
            assert signal["tail_mass"][0, 0, start + n] == stored.tail_mass[n]
            assert signal["error"][0, 0, start + n] == stored.error[n] > 0
    for array in signal.values():
        assert not array[0, 0, [2, 5]].any()
    (by_token, _) = collate(
        [*pairs, None],
        teacher_lengths=(0, 8),
        signals=(caches[0], None),
        token_signals=True,
        **options,
    )["teachers"]
    known, log_probs = (by_token["signal"][name][0, 0] for name in ("ids", "log_probs"))
    assert sorted(by_token["signal"]) == ["ids", "log_probs"]
    assert known.tolist() == [[0, 1], [2, 3], [0, 0], [0, 1], [2, 3], [0, 0]]
    np.testing.assert_array_equal(log_probs[[0, 1, 3, 4]], -0.5 - known[[0, 1, 3, 4]])
    assert np.isneginf(log_probs[[2, 5]]).all()
    assert [store.id_count for store in caches] == [2, 0]
    with pytest.raises(UserError, match="example '0' has 3 answer positions, expected 2: it was"):
        collate(pairs, teacher_lengths=(0, 0), signals=(caches[1], caches[1]), **options)


def spanned(prompt, spans, base):
    tokens = np.arange(base, base + prompt + len(spans), dtype=np.int32)
    answer = np.arange(prompt, prompt + len(spans), dtype=np.int32)
    return Encoded(tokens, answer, spans=np.array(spans, np.int32).reshape(-1, 2))


# The rows of LOSSES.md's fixture, with their end-of-text tokens.
ROWS = (
    ([(0, 3), (3, 5), (5, 5)], [(0, 1), (1, 3), (3, 5), (5, 5)]),
    ([(0, 1), (1, 2), (2, 4), (4, 6), (6, 6)], [(0, 2), (2, 6), (6, 6)]),
)


def test_spans_pair_the_first_tokens_of_groups():
    pairs = [
        Pair(str(n), spanned(2, student, 100), (spanned(3, teacher, 500),))
        for n, (student, teacher) in enumerate(ROWS)
    ]
    options = {"alignment": "span", "student_length": 8, "positions": 9}
    batch = pack(pairs, **options)
    # Groups {0}{0 1}, {1}{2}, EOS; then {0 1}{0}, {2 3}{1}, EOS; the student's answers follow.
    np.testing.assert_array_equal(batch["teacher_uld_weight"][0, 0], [1, 1, 1, 1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(batch["teacher_index"][0, 0], [2, 4, 5, 12, 0, 13, 0, 14, 0])
    np.testing.assert_array_equal(batch["ce_weight"][0, 0], [1] * 8 + [0])
    skipped = pack(pairs, **options, skip_student_eos=True, skip_teacher_eos=True)
    np.testing.assert_array_equal(skipped["teacher_uld_weight"][0, 0], [1, 1, 0, 1, 0, 1, 0, 0, 0])
    one_sided = pack(pairs, **options, skip_student_eos=True)
    for name in ("teacher_uld_weight", "teacher_index"):
        np.testing.assert_array_equal(one_sided[name], skipped[name])
    official = pack(pairs, **options, convention="official", skip_student_eos=True)
    np.testing.assert_allclose(
        official["teacher_uld_weight"][0, 0], [0.5, 0.5, 0, 0.5, 0, 0.5, 0, 0, 0]
    )


@given(PAIRS)
def test_equal_spans_are_positions(pairs):
    def with_spans(read):
        ends = np.arange(len(read.answer) + 1)
        spans = np.stack([ends[:-1], ends[1:]], axis=1)
        return Encoded(read.tokens, read.answer, spans=spans)

    # Cut to the shorter answer, positions and spans of a byte a token say the same.
    pairs = [
        pair
        and Pair(pair.id, with_spans(pair.student), tuple(with_spans(t) for t in pair.teachers))
        for pair in pairs
    ]
    equal = [p for p in pairs if p and len(p.student.answer) == len(p.teachers[0].answer)]
    options = {"student_length": 64, "teacher_lengths": [64], "positions": 128}
    if equal:
        for name, array in pack(equal, **options).items():
            np.testing.assert_array_equal(array, pack(equal, **options, alignment="span")[name])


def test_answers_without_spans_cannot_be_aligned_by_them():
    with pytest.raises(ValueError, match="an answer of 3 tokens has 0 spans, expected as many"):
        pack([pair((2, 3), (4, 2))], alignment="span")
