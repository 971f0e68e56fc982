"""What a teacher says about an example's answer without token ids, and how far it can be wrong."""

import dataclasses
from collections.abc import Sequence

import numpy as np

# What the float32 softmax of the teacher and the float32 sums of the loss can be off by.
ROUNDING = 4e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """The sorted head of a teacher's distribution at each answer position of one example.

    With p̂ the K kept probabilities, r̂ `tail_mass`, q↓ the student's sorted probabilities and r_q
    the mass of q↓ past its K largest, `losses.truncated_uld` computes

        v = Σ_{k ≤ K} |q↓_k − p̂_k| + max(r_q, r̂).

    Of the exact distance d let p be the teacher's sorted probabilities, r ≤ r̂ their mass past the
    K largest and δ = Σ_{k ≤ K} |p̂_k − p_k|. The dropped part of d lies in [|r_q − r|, r_q + r], so

        v − d ≤ δ + max(r_q, r̂) − |r_q − r| ≤ δ + r̂,
        d − v ≤ δ + r_q + r − max(r_q, r̂) ≤ δ + r:

    |v − d| ≤ δ + r̂ whatever the student, and `error` is that sum, rounded up.

    Attributes:
        counts: int32 [n], K of each position, at least 1.
        probs: float32 [sum(counts)], each position's largest probabilities, descending, one
            position after the other.
        tail_mass: float32 [n], at least the mass of the teacher's other tokens.
        entropy: float32 [n] nats, of the whole distribution.
        error: float32 [n], |v − d| is at most this for every student.
        ids: int32 [n, J], tokens for a loss that needs them, or None.
        log_probs: float32 [n, J], their log-probabilities (kept as float16), or None.

    Example:
        >>> one = np.ones(1, np.float32)
        >>> signal = Signal(np.array([2], np.int32), np.float32([0.5, 0.25]), one / 4, one, one / 4)
        >>> len(signal), signal.position(0).tolist()
        (1, [0.5, 0.25])
    """

    counts: np.ndarray
    probs: np.ndarray
    tail_mass: np.ndarray
    entropy: np.ndarray
    error: np.ndarray
    ids: np.ndarray | None = None
    log_probs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def position(self, index: int) -> np.ndarray:
        """The kept probabilities of one position.

        Args:
            index: Of the position, from 0.

        Returns:
            float32 [K], a view.
        """
        stop = int(self.counts[: index + 1].sum())
        return self.probs[stop - int(self.counts[index]) : stop]


def truncate_signal(
    probs_sorted_NK: np.ndarray,
    tail_mass_N: np.ndarray,
    entropy_N: np.ndarray,
    *,
    epsilon: float,
    cap: int,
) -> Signal:
    """Keeps of each position the fewest probabilities past which at most epsilon is left.

    Args:
        probs_sorted_NK: float [N, K], a teacher's largest probabilities, descending; a teacher
            with fewer than K tokens is padded with zeros.
        tail_mass_N: float [N], the mass of its other tokens.
        entropy_N: float [N] nats, of the whole distribution.
        epsilon: The most that may be dropped, where `cap` and K allow it.
        cap: At most this many a position.

    Returns:
        The signal; each error is its tail mass and what float32 rounds.

    Raises:
        ValueError: Names the argument that is not as described.

    Example:
        >>> rows = np.array([[0.5, 0.3, 0.1], [0.99, 0.01, 0.0]])
        >>> signal = truncate_signal(rows, np.array([0.1, 0]), np.ones(2), epsilon=0.15, cap=9)
        >>> signal.counts.tolist(), signal.tail_mass.round(2).tolist()
        ([3, 1], [0.10000000149011612, 0.009999999776482582])
    """
    probs = np.asarray(probs_sorted_NK)
    tail, entropy = (np.asarray(x, np.float64) for x in (tail_mass_N, entropy_N))
    if probs.ndim != 2 or probs.shape[1] == 0:
        raise ValueError(f"probs_sorted_NK: expected shape [N, K] with K >= 1, got {probs.shape}")
    for name, array in (("tail_mass_N", tail), ("entropy_N", entropy)):
        if array.shape != probs.shape[:1]:
            raise ValueError(f"{name}: expected shape {probs.shape[:1]}, got {array.shape}")
    if cap < 1 or not 0 < epsilon < 1:
        raise ValueError(f"expected cap >= 1 and 0 < epsilon < 1, got {cap} and {epsilon}")
    # From the end, so that what is left of a long tail does not drown in 1 - (nearly 1).
    left = np.cumsum(np.asarray(probs[:, ::-1], np.float64), axis=1)[:, ::-1] + tail[:, None]
    past_NK = np.concatenate([left[:, 1:], tail[:, None]], axis=1)
    counts = np.minimum(np.maximum((past_NK > epsilon).sum(1) + 1, 1), min(cap, probs.shape[1]))
    # A zero is padding or underflow: kept it would say nothing, dropped it costs nothing.
    counts = np.maximum(np.minimum(counts, (probs > 0).sum(1)), 1)
    kept_NK = np.arange(probs.shape[1]) < counts[:, None]
    dropped = past_NK[np.arange(len(probs)), counts - 1]
    tail32 = _up(np.minimum(dropped, 1.0))
    signal = Signal(
        counts.astype(np.int32),
        probs[kept_NK].astype(np.float32),
        tail32,
        entropy.astype(np.float32),
        _up(tail32.astype(np.float64) + ROUNDING),
    )
    check_signal(signal)
    return signal


def check_signal(signal: Signal) -> None:
    """Checks shapes and values, so that nothing that is no signal is stored or trained on.

    Args:
        signal: To be checked.

    Raises:
        ValueError: Names the field, what was expected and what it is.
    """
    n, total = len(signal.counts), int(signal.counts.sum())
    shapes = {"probs": (total,), "tail_mass": (n,), "entropy": (n,), "error": (n,)}
    for name, shape in shapes.items():
        array = getattr(signal, name)
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
        if not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(f"{name}: expected finite numbers of at least 0")
    if n and signal.counts.min() < 1:
        raise ValueError(f"counts: expected at least 1, got {signal.counts.min()}")
    starts = np.cumsum(signal.counts) - signal.counts
    rises = np.diff(signal.probs) > 0
    rises[starts[1:] - 1] = False
    if rises.any():
        raise ValueError("probs: expected descending probabilities in each position")
    mass = np.add.reduceat(signal.probs.astype(np.float64), starts) if n else np.zeros(0)
    largest = float((mass + signal.tail_mass).max(initial=0))
    if largest > 1 + 1e-3:
        raise ValueError(f"probs and tail_mass: expected a sum of at most 1, got {largest}")
    if (signal.ids is None) != (signal.log_probs is None):
        raise ValueError("ids and log_probs: expected both or neither")
    if signal.ids is not None and signal.log_probs is not None:
        if signal.ids.ndim != 2 or len(signal.ids) != n or signal.ids.shape[1] == 0:
            raise ValueError(f"ids: expected shape ({n}, J) with J >= 1, got {signal.ids.shape}")
        if signal.log_probs.shape != signal.ids.shape:
            raise ValueError(
                f"log_probs: expected shape {signal.ids.shape}, got {signal.log_probs.shape}"
            )
        if np.isnan(signal.log_probs).any() or (signal.ids < 0).any():
            raise ValueError("ids and log_probs: expected no negative id and no NaN")


def pad_signals(
    signals: Sequence[Signal], width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The positions of a batch's signals as the dense arrays that `losses.truncated_uld` takes.

    Args:
        signals: One an example.
        width: K of the result; None for the largest count.

    Returns:
        float32 [n, K] probabilities, zeros past each position's own, and float32 [n] tail mass,
        n being the positions of all signals one after the other.

    Raises:
        ValueError: A position has more than `width` probabilities.

    Example:
        >>> one = np.ones(1, np.float32)
        >>> signal = Signal(np.array([2], np.int32), np.float32([0.5, 0.25]), one / 4, one, one / 4)
        >>> pad_signals([signal], 3)[0].tolist()
        [[0.5, 0.25, 0.0]]
    """
    counts = np.concatenate([np.zeros(0, np.int32), *(s.counts for s in signals)])
    largest = int(counts.max(initial=1))
    width = largest if width is None else width
    if largest > width:
        raise ValueError(f"width: expected at least {largest}, the largest count, got {width}")
    probs = np.zeros((len(counts), width), np.float32)
    probs[np.arange(width) < counts[:, None]] = np.concatenate(
        [np.zeros(0, np.float32), *(s.probs for s in signals)]
    )
    tails = np.concatenate([np.zeros(0, np.float32), *(s.tail_mass for s in signals)])
    return probs, tails


def _up(x: np.ndarray) -> np.ndarray:
    """In float32, and never less."""
    rounded = x.astype(np.float32)
    return np.where(rounded < x, np.nextafter(rounded, np.float32(np.inf)), rounded)
