import contextlib
import dataclasses
import lzma
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uld_jax.data import Signal, decode_signal, encode_signal, truncate_signal
from uld_jax.data.signal_codec import _FILTERS, VERSION, _varints


def teacher(seed, rows, vocab):
    """A next-token distribution of a small model: a few likely tokens and a Zipf tail."""
    rng = np.random.default_rng(seed)
    logits = rng.uniform(-1.6, -0.6, (rows, 1)) * np.log(np.arange(1, vocab + 1))
    logits += rng.normal(0, 0.3, (rows, vocab))
    logits[:, : min(3, vocab)] += rng.uniform(0, 8, (rows, 1))
    weights = -np.sort(-np.exp(logits), axis=1)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def signal_of(seed=0, rows=3, vocab=400, *, epsilon, cap=10**6):
    probs = teacher(seed, rows, vocab)
    return truncate_signal(probs, np.zeros(rows), np.arange(rows), epsilon=epsilon, cap=cap)


def change(before, after):
    """float64 [n]: what storing moved in each position."""
    starts = np.cumsum(before.counts) - before.counts
    return np.add.reduceat(np.abs(after.probs.astype(np.float64) - before.probs), starts)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 6),
    vocab=st.sampled_from([1, 2, 3, 50, 2000]),
    epsilon=st.floats(1e-4, 0.5),
    cap=st.sampled_from([1, 2, 40, 10**6]),
)
def test_what_is_read_is_what_was_written_within_the_stated_error(seed, rows, vocab, epsilon, cap):
    signal = signal_of(seed, rows, vocab, epsilon=epsilon, cap=cap)
    record = encode_signal(signal, epsilon=epsilon)
    assert record == encode_signal(signal, epsilon=epsilon)
    read = decode_signal(record)
    np.testing.assert_array_equal(read.counts, signal.counts)
    for name in ("probs", "tail_mass", "entropy", "error"):
        assert getattr(read, name).dtype == np.float32
    assert (read.tail_mass >= signal.tail_mass).all()
    assert (read.tail_mass <= signal.tail_mass * (1 + 2**-15)).all()
    assert (change(signal, read) + read.tail_mass <= read.error).all()
    if cap > vocab:
        assert (read.error <= 1.5 * epsilon).all()
    np.testing.assert_allclose(read.entropy, signal.entropy, atol=1 / 4096)
    mass = np.add.reduceat(read.probs.astype(np.float64), np.cumsum(read.counts) - read.counts)
    assert (mass + read.tail_mass <= 1 + 1e-6).all()
    assert read.ids is None


def test_a_long_tail_takes_few_bytes():
    signal = signal_of(rows=6, vocab=100_000, epsilon=1e-2)
    assert signal.counts.mean() > 1000
    assert len(encode_signal(signal, epsilon=1e-2)) < 6 * 100


def test_what_was_wrong_before_is_in_the_error():
    signal = signal_of(epsilon=0.01)
    worse = dataclasses.replace(signal, error=signal.error + np.float32([0, 0.02, 0.3]))
    errors = [decode_signal(encode_signal(s, epsilon=0.01)).error for s in (signal, worse)]
    assert errors[0].max() <= 0.015
    assert (errors[1] >= worse.error).all()
    assert (errors[1] <= 1.1 * worse.error + 0.005).all()


def test_a_vague_teacher_is_not_told_more_finely_than_it_is_known():
    """An API tells 200 tokens; their sum and the tail are 1 only to what it rounds."""
    rng = np.random.default_rng(0)
    rows = -np.sort(-rng.dirichlet(np.ones(200), 1)) * 0.45
    records = []
    for tail in (0.55, 0.5495):
        signal = truncate_signal(rows, np.array([tail]), np.ones(1), epsilon=1e-3, cap=200)
        records.append(encode_signal(signal, epsilon=1e-3))
        read = decode_signal(records[-1])
        assert (change(signal, read) + read.tail_mass <= read.error).all()
        assert read.error[0] < 0.552
    assert len(records[1]) <= len(records[0])


@pytest.mark.parametrize("width", [1, 7])
def test_ids_and_log_probs_are_kept(width):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 262_144, (3, width)).astype(np.int32)
    log_probs = np.float32(rng.uniform(-20, 0, (3, width)))
    log_probs[0, 0] = -np.inf
    signal = dataclasses.replace(signal_of(epsilon=0.01), ids=ids, log_probs=log_probs)
    read = decode_signal(encode_signal(signal, epsilon=0.01))
    np.testing.assert_array_equal(read.ids, ids)
    np.testing.assert_array_equal(read.log_probs, log_probs.astype(np.float16))
    assert read.ids.dtype == np.int32
    assert read.log_probs.dtype == np.float32


def test_an_answer_without_positions_is_a_signal():
    none = np.zeros(0, np.float32)
    read = decode_signal(
        encode_signal(Signal(none.astype(int), none, none, none, none), epsilon=0.1)
    )
    assert len(read) == len(read.probs) == 0


@pytest.mark.parametrize("epsilon", [0, 9e-5, 1.0, float("nan")])
def test_an_impossible_epsilon_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon: expected 1e-4"):
        encode_signal(signal_of(epsilon=0.1), epsilon=epsilon)


def test_every_flipped_byte_and_every_cut_is_found():
    record = encode_signal(signal_of(epsilon=0.1), epsilon=0.1)
    for at in range(len(record)):
        flipped = bytearray(record)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match="signal: "):
            decode_signal(bytes(flipped))
        with pytest.raises(ValueError, match="signal: "):
            decode_signal(record[:at])
    with pytest.raises(ValueError, match="checksum"):
        decode_signal(record + b"x")


def sealed(packed):
    return bytes([VERSION]) + zlib.crc32(packed).to_bytes(4, "little") + packed


def packed(body):
    return lzma.compress(body, lzma.FORMAT_RAW, filters=_FILTERS)


def body_of(record):
    return lzma.decompress(record[5:], lzma.FORMAT_RAW, filters=_FILTERS)


ONE = _varints([1, 0, 2])  # a position of two probabilities


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "0 bytes"),
        (b"\x09" + bytes(20), "version 1, got 9"),
        (sealed(b"no stream of anybody"), "LZMA stream"),
        (sealed(packed(b"abc")[:-1]), "does not end"),
        (sealed(packed(b"abc") + b"x"), "does not end"),
        (sealed(packed(b"")), "0 numbers"),
        (sealed(packed(b"\x01")), "1 numbers from byte 0, expected 2"),
        (sealed(packed(b"\xff\xff\xff\xff\xff\x01\x00")), "more than 5 bytes|numbers from byte"),
        (sealed(packed(_varints([1 << 30, 0]))), "too many"),
        (sealed(packed(_varints([1, 0, 0]))), "a count of 0"),
        (sealed(packed(_varints([1, 0, 1 << 30]))), "a count of"),
        (sealed(packed(ONE)), "it ends at byte 3"),
        (sealed(packed(ONE + b"\xff\x00\x00" + bytes(5))), "unknown grid"),
        (sealed(packed(ONE + bytes(8))), "0 numbers from byte 11, expected 2"),
        (sealed(packed(ONE + bytes(11))), "1 bytes too many"),
        (sealed(packed(ONE + bytes(3) + b"\xff" * 3 + bytes(4))), "tail mass of nan"),
    ],
)
def test_malformed_bytes_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        decode_signal(record)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_bytes_crash_the_reader(data):
    """With a right checksum: what another program, or another version, might have written."""
    body = bytearray(body_of(encode_signal(signal_of(epsilon=0.1), epsilon=0.1)))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        read = decode_signal(sealed(packed(bytes(body[: data.draw(st.integers(0, len(body)))]))))
        assert (read.probs >= 0).all()
