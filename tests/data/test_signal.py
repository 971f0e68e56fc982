import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uld_jax.data import Signal, decode_signal, encode_signal, pad_signals, truncate_signal
from uld_jax.losses import reference_uld, truncated_uld

VOCAB = 60


def distributions(rng, rows, vocab=VOCAB):
    """float64 [rows, vocab] descending: flat, peaked, Zipf, one-hot, tied, in turn."""
    exponents = np.array([0.0, 3.0, 1.1, 40.0, 0.5])[np.arange(rows) % 5, None]
    weights = np.arange(1, vocab + 1) ** -exponents * np.exp(rng.normal(0, 0.5, (rows, vocab)))
    weights[4::5] = np.round(weights[4::5], 1) + 0.01
    return -np.sort(-weights / weights.sum(1, keepdims=True), axis=1)


def entropy_of(probs):
    return -(probs * np.log(np.maximum(probs, 1e-300))).sum(1)


def signal_of(probs, known, *, epsilon, cap=VOCAB):
    top = probs[:, :known].astype(np.float32)
    return truncate_signal(
        top, probs[:, known:].sum(1), entropy_of(probs), epsilon=epsilon, cap=cap
    )


def students_against(rng, teacher, signal):
    """float64 [rows, vocab]: others, and those that are the hardest to tell from the signal."""
    others = distributions(rng, len(teacher))
    worst = [teacher, rng.permuted(others, axis=1), np.full_like(teacher, 1 / VOCAB)]
    moved = teacher.copy()  # the same mass past K, on one token of it alone
    for row, count in enumerate(signal.counts):
        if count < VOCAB:
            moved[row, count:] = 0
            moved[row, count] = min(teacher[row, count:].sum(), teacher[row, count - 1])
    return [*worst, others, moved / moved.sum(1, keepdims=True)]


def values(student, signal):
    """float64 [rows]: the value of truncated_uld, of each row at its own K."""
    return np.array(
        [
            truncated_uld(
                jnp.log(student[row]),
                jnp.asarray(signal.position(row), jnp.float64),
                jnp.asarray(signal.tail_mass[row], jnp.float64),
                method="sort",
            )[0]
            for row in range(len(signal))
        ]
    )


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("epsilon", [0.2, 1e-2, 1e-3])
@pytest.mark.parametrize(("known", "cap"), [(VOCAB, VOCAB), (25, 60), (60, 3)])
def test_the_error_holds_for_every_student_before_and_after_storage(epsilon, known, cap):
    rng = np.random.default_rng(known)
    teacher = distributions(rng, 5)
    exact = signal_of(teacher, known, epsilon=epsilon, cap=cap)
    stored = decode_signal(encode_signal(exact, epsilon=epsilon))
    closest = 0.0
    with jax.enable_x64(True):
        for student in students_against(rng, teacher, exact):
            d = np.asarray(reference_uld(jnp.log(student), jnp.log(teacher)))
            for signal in (exact, stored):
                gap = np.abs(values(student, signal) - d)
                assert (gap <= signal.error).all(), (gap, signal.error)
                closest = max(closest, (gap / signal.error).max())
    assert closest > 0.5  # an error that is never approached would certify nothing


def test_the_error_is_reached():
    """Teacher and student both drop r and agree on it: the value is r, the distance 0."""
    teacher = np.array([[0.5, 0.2, 0.2, 0.1]])
    signal = signal_of(teacher, 4, epsilon=0.4, cap=4)
    assert signal.counts.tolist() == [2]
    with jax.enable_x64(True):
        assert values(teacher, signal)[0] == pytest.approx(signal.error[0], abs=1e-5)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-4, 0.9), st.integers(1, 70), st.integers(1, VOCAB))
def test_the_fewest_probabilities_are_kept(seed, epsilon, cap, known):
    probs = distributions(np.random.default_rng(seed), 5)
    signal = signal_of(probs, known, epsilon=epsilon, cap=cap)
    limit = min(known, cap)
    for row, count in enumerate(signal.counts):
        dropped = probs[row, count:].sum()
        assert 1 <= count <= limit
        assert dropped <= epsilon + 1e-6 or count == limit
        assert count == 1 or probs[row, count - 1 :].sum() > epsilon - 1e-6
        assert dropped - 1e-6 <= signal.tail_mass[row] <= dropped + 1e-6
        assert signal.tail_mass[row] <= signal.error[row] <= dropped + 1e-5
        np.testing.assert_array_equal(signal.position(row), probs[row, :count].astype(np.float32))
    np.testing.assert_allclose(signal.entropy, entropy_of(probs), rtol=1e-6)


def test_padding_of_a_small_vocabulary_is_not_kept():
    rows = np.array([[0.6, 0.3989, 0.0001, 0, 0]])
    signal = truncate_signal(rows, np.array([1e-3]), np.ones(1), epsilon=1e-4, cap=5)
    assert signal.counts.tolist() == [3]
    assert signal.tail_mass[0] == pytest.approx(1e-3)


def test_a_batch_is_padded_with_zeros():
    probs = distributions(np.random.default_rng(0), 5)
    signals = [signal_of(probs[:2], 60, epsilon=0.1), signal_of(probs[2:], 60, epsilon=0.1)]
    dense, tails = pad_signals(signals)
    assert dense.shape == (5, max(s.counts.max() for s in signals))
    for row in range(5):
        kept = signals[row >= 2].position(row - 2 * (row >= 2))
        np.testing.assert_array_equal(dense[row, : len(kept)], kept)
        assert not dense[row, len(kept) :].any()
    np.testing.assert_array_equal(tails, np.concatenate([s.tail_mass for s in signals]))
    assert pad_signals(signals, 64)[0].shape == (5, 64)
    assert pad_signals([])[0].shape == (0, 1)
    with pytest.raises(ValueError, match="width: expected at least"):
        pad_signals(signals, 2)


ROWS = np.array([[0.5, 0.25]])


@pytest.mark.parametrize(
    ("rows", "tail", "entropy", "options", "message"),
    [
        (ROWS[0], [0.25], [1.0], {}, "probs_sorted_NK: expected shape"),
        (ROWS[:, :0], [0.25], [1.0], {}, "probs_sorted_NK: expected shape"),
        (ROWS, [0.25, 0], [1.0], {}, r"tail_mass_N: expected shape \(1,\), got \(2,\)"),
        (ROWS, [0.25], [[1.0]], {}, "entropy_N: expected shape"),
        (ROWS, [0.25], [1.0], {"cap": 0}, "cap >= 1"),
        (ROWS, [0.25], [1.0], {"epsilon": 0}, "epsilon"),
        (ROWS[:, ::-1], [0.25], [1.0], {}, "probs: expected descending"),
        (ROWS, [0.9], [1.0], {}, "expected a sum of at most 1"),
        (ROWS * np.nan, [0.25], [1.0], {}, "expected finite"),
        (ROWS, [np.nan], [1.0], {}, "tail_mass: expected finite"),
        (ROWS, [0.25], [np.inf], {}, "entropy: expected finite"),
    ],
)
def test_what_is_no_distribution_is_refused(rows, tail, entropy, options, message):
    with pytest.raises(ValueError, match=message):
        truncate_signal(
            rows, np.array(tail), np.array(entropy), **{"epsilon": 0.1, "cap": 9} | options
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.array([1, 1], np.int32)}, "expected shape"),
        ({"ids": np.zeros((1, 2), np.int32)}, "expected both or neither"),
        ({"ids": np.zeros((2, 1), np.int32), "log_probs": np.zeros((2, 1))}, "ids: expected shape"),
        ({"ids": np.zeros((1, 2), np.int32), "log_probs": np.zeros((1, 1))}, "log_probs: expected"),
        ({"ids": np.full((1, 1), -1), "log_probs": np.zeros((1, 1))}, "no negative id"),
        ({"ids": np.zeros((1, 1), int), "log_probs": np.full((1, 1), np.nan)}, "no NaN"),
        ({"entropy": np.array([16.0], np.float32)}, "below 16 nats"),
    ],
)
def test_what_is_no_signal_is_not_stored(changes, message):
    one = np.ones(1, np.float32)
    signal = Signal(np.array([2], np.int32), np.float32([0.5, 0.25]), one / 4, one, one / 4)
    encode_signal(signal, epsilon=0.1)
    with pytest.raises(ValueError, match=message):
        encode_signal(dataclasses.replace(signal, **changes), epsilon=0.1)
