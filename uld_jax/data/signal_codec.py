"""Signals as bytes: the curve of a position's sorted probabilities, at as few knots as will do.

Sorted probabilities fall smoothly: over the logarithm of the rank, the logarithm of a tail of
thousands is nearly a line between a few dozen ranks. A position stores codes round(−log2 p · S) at
the ranks of a fixed grid, all up to `detail` and then each a factor 1 + 1/detail past the last.
The decoder draws lines between them and scales the result to a mass of 1 − r̂. The encoder searches
the (detail, S) of fewest bits that changes the probabilities by at most the budget in total, and
it measures that change on the decoder's own output: what it states is certified by construction,
not by a model of the rounding.

A record is one version byte, a CRC-32, and a raw LZMA stream of
columns in the order in which `decode_signal` reads them.
"""

import functools
import lzma
import math
import zlib
from typing import Any

import numpy as np

from uld_jax.data.signal import Signal, check_signal

VERSION = 1
# Steps an octave, and ranks told one by one; about half an octave apart. The last detail is "all".
STEPS = tuple(sorted({1, *(2 << j for j in range(20)), *(3 << j for j in range(20))}))
DETAILS = (*(d for d in STEPS if d <= 1536), 1 << 31)
# Ranks past this are not told: no vocabulary is larger.
MAX_COUNT = 1 << 22
MAX_POSITIONS = 1 << 20
MAX_BODY = 1 << 28
ENTROPY_STEPS = 4096
_EXCESS_STEPS = 8
_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": 1 << 16, "lc": 0, "lp": 0, "pb": 0}]


def encode_signal(signal: Signal, *, epsilon: float) -> bytes:
    """A signal as bytes.

    Storing it changes the probabilities of a position by at most epsilon / 2 in total, and raises
    its tail mass by at most a part in 2^15; `error` in the decoded signal includes both. An error
    of at most epsilon before is one of at most 1.5 epsilon after.

    Args:
        signal: Whose `error` is its tail mass and what else is known to be wrong with it.
        epsilon: At least 1e-4.

    Returns:
        The record; equal signals give equal bytes.

    Raises:
        ValueError: The signal is malformed, or epsilon is too small.

    Example:
        >>> rows, zero, one = np.array([[0.75, 0.2, 0.05]]), np.zeros(1), np.ones(1)
        >>> from uld_jax.data.signal import truncate_signal
        >>> signal = truncate_signal(rows, zero, one, epsilon=0.01, cap=8)
        >>> decoded = decode_signal(encode_signal(signal, epsilon=0.01))
        >>> float(abs(decoded.probs - signal.probs).sum()) < 0.005
        True
    """
    if not 1e-4 <= epsilon < 1:
        raise ValueError(f"epsilon: expected 1e-4 <= epsilon < 1, got {epsilon}")
    check_signal(signal)
    if len(signal) > MAX_POSITIONS or signal.counts.max(initial=1) > MAX_COUNT:
        raise ValueError("signal: expected at most 2^20 positions of 2^22 probabilities")
    if signal.entropy.max(initial=0) >= 2**16 / ENTROPY_STEPS:
        raise ValueError(f"entropy: expected below 16 nats, got {signal.entropy.max()}")
    tail_codes = _round_tail(signal.tail_mass)
    tails = _tails(tail_codes).astype(np.float64)
    known = np.maximum(signal.error.astype(np.float64) - signal.tail_mass, 0)
    # Rounded to what the excess can be stored as; the rest of the half is the tail's rounding.
    budget = _excess(math.ceil(_EXCESS_STEPS * (1 - math.log2(0.499 * epsilon))))
    fits = [
        _fit(signal.position(i), 1 - tails[i], max(budget - known[i], epsilon / 16))
        for i in range(len(signal))
    ]
    excess = [_round_excess(known[i] + fit[3]) for i, fit in enumerate(fits)]
    body = _varints(np.array([len(signal), 0 if signal.ids is None else signal.ids.shape[1]]))
    body += _varints(signal.counts)
    for column in ([fit[0] for fit in fits], [fit[1] for fit in fits], excess):
        body += np.array(column, np.uint8).tobytes()
    entropy = np.floor(signal.entropy * ENTROPY_STEPS).astype(np.uint32)
    for codes, width in ((tail_codes, 3), (entropy, 2)):
        # Byte by byte, the high ones together: they repeat.
        body += b"".join(
            (codes >> 8 * b & 255).astype(np.uint8).tobytes() for b in reversed(range(width))
        )
    if signal.ids is not None and signal.log_probs is not None:
        body += signal.ids.astype("<i4").tobytes() + signal.log_probs.astype("<f2").tobytes()
    body += b"".join(_varints(np.diff(fit[2], prepend=0)) for fit in fits)
    packed = lzma.compress(body, lzma.FORMAT_RAW, filters=_FILTERS)
    return bytes([VERSION]) + zlib.crc32(packed).to_bytes(4, "little") + packed


def decode_signal(record: bytes) -> Signal:
    """The signal in a record.

    Args:
        record: From `encode_signal`.

    Returns:
        The signal.

    Raises:
        ValueError: Says what is wrong with the bytes.
    """
    if not record:
        raise ValueError("signal: expected a record, got 0 bytes")
    if record[0] != VERSION:
        raise ValueError(f"signal: expected format version {VERSION}, got {record[0]}")
    packed = record[5:]
    if len(record) < 5 or zlib.crc32(packed).to_bytes(4, "little") != record[1:5]:
        raise ValueError(f"signal: the checksum of its {len(record)} bytes is wrong")
    columns = _Columns(_unpack(packed))
    n, width = (int(x) for x in columns.varints(2))
    if n > MAX_POSITIONS or width > MAX_COUNT:
        raise ValueError(f"signal: {n} positions with {width} ids are too many")
    counts = columns.varints(n)
    if n and not 1 <= counts.min() <= counts.max() <= MAX_COUNT:
        raise ValueError(f"signal: a count of {counts.min()} or {counts.max()}")
    details, steps, excess = (columns.integers(n, 1) for _ in range(3))
    if n and (details.max() >= len(DETAILS) or steps.max() >= len(STEPS)):
        raise ValueError("signal: an unknown grid")
    tails, entropy = _tails(columns.integers(n, 3)), columns.integers(n, 2)
    if not (tails <= 1).all():  # a NaN is not either
        raise ValueError(f"signal: a tail mass of {tails.max()}")
    ids = log_probs = None
    if width:
        ids = np.frombuffer(columns.take(4 * n * width), "<i4").reshape(n, width).astype(np.int32)
        log_probs = np.frombuffer(columns.take(2 * n * width), "<f2").reshape(n, width)
        log_probs = log_probs.astype(np.float32)
    ranks = [_knots(int(k), int(d)) for k, d in zip(counts, details, strict=True)]
    codes = columns.varints(sum(map(len, ranks)))
    columns.end()
    probs, start = [np.zeros(0, np.float32)], 0
    for i, knots in enumerate(ranks):
        levels = np.cumsum(codes[start : start + len(knots)])
        start += len(knots)
        probs.append(_curve(levels, knots, STEPS[steps[i]], 1 - float(tails[i])))
    error = tails.astype(np.float64) + _excess(excess)
    signal = Signal(
        counts.astype(np.int32),
        np.concatenate(probs),
        tails,
        (entropy / ENTROPY_STEPS).astype(np.float32),
        np.nextafter(error.astype(np.float32), np.float32(np.inf)),
        ids,
        log_probs,
    )
    check_signal(signal)
    return signal


@functools.cache
def _grid(detail: int) -> np.ndarray:
    """Ranks from 1 to MAX_COUNT, of which a position takes those below its count."""
    ranks, rank = [], 1
    while rank <= MAX_COUNT:
        ranks.append(rank)
        rank += max(1, rank // detail)
    return np.array(ranks)


@functools.cache
def _logs(size: int) -> np.ndarray:
    return np.log(np.arange(1, size + 1))


def _knots(count: int, detail: int) -> np.ndarray:
    """The ranks that are told of `count`, ascending; always the first and the last."""
    if DETAILS[detail] >= count:
        return np.arange(1, count + 1)
    grid = _grid(DETAILS[detail])
    return np.append(grid[: np.searchsorted(grid, count)], count)


def _curve(codes: np.ndarray, knots: np.ndarray, steps: int, mass: float) -> np.ndarray:
    """float32 probabilities of all ranks, descending, with this sum."""
    count = int(knots[-1])
    levels = codes / -steps
    if len(knots) < count:
        # Tables of a few sizes only, however many counts there are.
        logs = _logs(1 << (count - 1).bit_length())
        levels = np.interp(logs[:count], logs[knots - 1], levels)
    probs = np.exp2(levels - levels[0])
    scaled = (probs * (max(mass, 0.0) / probs.sum())).astype(np.float32)
    return np.minimum.accumulate(scaled)  # a line's rounding may rise by one unit


def _fit(probs: np.ndarray, mass: float, budget: float) -> tuple[int, int, np.ndarray, float]:
    """(detail, steps, codes, change): the grid of fewest bits within the budget."""
    levels = -np.log2(np.maximum(probs.astype(np.float64), np.finfo(np.float32).tiny))
    # What scaling alone changes no grid can mend.
    budget = max(budget, 1.25 * abs(mass - float(probs.sum(dtype=np.float64))))
    best: tuple[int, int, np.ndarray, float] | None = None
    least = math.inf

    def attempt(knots: np.ndarray, steps: int) -> tuple[np.ndarray, float]:
        codes = np.rint(levels[knots - 1] * STEPS[steps]).astype(np.int64)
        change = np.abs(_curve(codes, knots, STEPS[steps], mass) - probs.astype(np.float64))
        return codes, float(change.sum())

    for detail, size in enumerate(DETAILS):
        knots = _knots(len(probs), detail)
        if best is not None and len(knots) > 2 * len(best[2]):
            break
        low, high = -1, len(STEPS) - 1
        found = attempt(knots, high)
        if found[1] > budget and size < len(probs):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            tried = attempt(knots, middle)
            if tried[1] <= budget:
                high, found = middle, tried
            else:
                low = middle
        # About what LZMA makes of a code: it need only rank the grids.
        bits = 1.2 * len(knots) + 1.4 * np.log2(1 + np.diff(found[0], prepend=0)).sum()
        if bits < least:
            best, least = (detail, high, *found), bits
        if size >= len(probs):
            break
    assert best is not None  # the last detail is every rank
    return best


def _round_tail(tail_mass: np.ndarray) -> np.ndarray:
    """The upper 24 bits of float32, rounded up."""
    return (np.asarray(tail_mass, np.float32).view(np.uint32) + np.uint32(255)) >> np.uint32(8)


def _tails(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << np.uint32(8)).view(np.float32)


def _excess(code: Any) -> Any:
    return 2.0 ** (1 - code / _EXCESS_STEPS)


def _round_excess(value: float) -> int:
    """The code of the least excess that is not below the value."""
    code = math.floor(_EXCESS_STEPS * (1 - math.log2(max(value, 1e-12))))
    code -= _excess(code) < value  # the logarithm was rounded
    return min(max(code, 0), 255)


def _varints(values: np.ndarray) -> bytes:
    """Each in groups of 7 bits, the lowest first, the highest bit set where more follow."""
    values = np.asarray(values, np.int64)
    shifted = values[:, None] >> np.arange(0, 35, 7)
    more = shifted[:, 1:] > 0
    low = (shifted & 127).astype(np.uint8)
    low[:, :-1] |= more.astype(np.uint8) << 7
    return low[np.pad(more, ((0, 0), (1, 0)), constant_values=True)].tobytes()


def _unpack(packed: bytes) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        body = decompressor.decompress(packed, MAX_BODY)
    except lzma.LZMAError as error:
        raise ValueError(f"signal: not an LZMA stream: {error}") from error
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"signal: its LZMA stream does not end with its {len(packed)} bytes")
    return body


class _Columns:
    """Reads columns off a body, and never past its end."""

    def __init__(self, body: bytes) -> None:
        self._body, self._at = body, 0

    def take(self, size: int) -> bytes:
        if self._at + size > len(self._body):
            raise ValueError(
                f"signal: it ends at byte {len(self._body)}, expected {size} from byte {self._at}"
            )
        self._at += size
        return self._body[self._at - size : self._at]

    def integers(self, count: int, width: int) -> np.ndarray:
        """int64 [count] of `width` bytes, stored as columns of bytes, the highest first."""
        columns = np.frombuffer(self.take(count * width), np.uint8).reshape(width, count)
        weights = 256 ** np.arange(width - 1, -1, -1)
        return weights @ columns.astype(np.int64)

    def varints(self, count: int) -> np.ndarray:
        """int64 [count], see `_varints`."""
        if count == 0:
            return np.zeros(0, np.int64)
        rest = np.frombuffer(self._body, np.uint8)[self._at : self._at + 5 * count]
        stops = np.flatnonzero(rest < 128)[:count]
        if len(stops) < count:
            raise ValueError(f"signal: {len(stops)} numbers from byte {self._at}, expected {count}")
        used = self.take(int(stops[-1]) + 1)
        values = np.frombuffer(used, np.uint8).astype(np.int64)
        starts = np.append(0, stops[:-1] + 1)
        places = np.arange(len(values)) - np.repeat(starts, stops + 1 - starts)
        if places.max() > 4:
            raise ValueError("signal: a number of more than 5 bytes")
        return np.add.reduceat((values & 127) << (7 * places), starts)

    def end(self) -> None:
        if self._at != len(self._body):
            raise ValueError(f"signal: {len(self._body) - self._at} bytes too many")
