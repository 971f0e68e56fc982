"""What per-example values amount to: means with intervals, and two sets of answers compared."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uld_jax.evaluation.calibration import reliability
from uld_jax.evaluation.resampling import bootstrap_sums, percentile_interval, sign_flip_test

Rows = Sequence[Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How intervals and p-values are made.

    Attributes:
        resamples: Of the bootstrap.
        permutations: Of the paired test.
        confidence: Of the intervals.
        seed: Of both.
    """

    resamples: int = 2000
    permutations: int = 10_000
    confidence: float = 0.95
    seed: int = 0


def summarise(rows: Rows, options: Resampling) -> dict[str, dict[str, Any]]:
    """Mean scores with percentile bootstrap intervals over examples.

    Args:
        rows: metric -> value of each example.
        options: See there.

    Returns:
        "scores": metric -> mean, and "intervals": metric -> [low, high].

    Example:
        >>> summarise([{"f1": 50.0}, {"f1": 50.0}], Resampling())
        {'scores': {'f1': 50.0}, 'intervals': {'f1': [50.0, 50.0]}}
    """
    values_NM = _values(rows)
    low_M, high_M = _interval(values_NM, options)
    names = list(rows[0])
    ends = zip(low_M.tolist(), high_M.tolist(), strict=True)
    return {
        "scores": {name: math.fsum(row[name] for row in rows) / len(rows) for name in names},
        "intervals": {name: [*pair] for name, pair in zip(names, ends, strict=True)},
    }


def compare(rows: Rows, others: Rows, options: Resampling) -> dict[str, dict[str, float]]:
    """The mean difference of two sets of answers to the same examples.

    Args:
        rows: metric -> value of each example.
        others: The same of the other set, in the same order.
        options: See there.

    Returns:
        metric -> "this", "other", "difference" = this − other, its paired bootstrap interval "low"
        to "high", and "p" of the two-sided sign-flip permutation test.

    Example:
        >>> found = compare([{"f1": 60.0}] * 9, [{"f1": 50.0}] * 9, Resampling())["f1"]
        >>> found["difference"], found["low"], found["high"], found["p"] < 0.01
        (10.0, 10.0, 10.0, True)
    """
    these_NM, others_NM = _values(rows), _values(others)
    differences_NM = these_NM - others_NM
    low_M, high_M = _interval(differences_NM, options)
    p_M = sign_flip_test(differences_NM, permutations=options.permutations, seed=options.seed)
    columns = (these_NM.mean(0), others_NM.mean(0), differences_NM.mean(0), low_M, high_M, p_M)
    keys = ("this", "other", "difference", "low", "high", "p")
    return {
        name: dict(zip(keys, numbers, strict=True))
        for name, *numbers in zip(rows[0], *(column.tolist() for column in columns), strict=True)
    }


def summarise_readings(
    readings: Sequence[Mapping[str, Any]], options: Resampling
) -> dict[str, Any]:
    """Bits per byte and calibration of a model on answers that it has read.

    Both are ratios of sums over all answers, so long answers count for more. The interval of bits
    per byte resamples whole answers, whose tokens are not independent. The calibration error has
    none: resampling adds noise to each bin, which makes the error larger, not wider.

    Args:
        readings: Of each answer "nats", "confidence" and "correct" by token, and its "bytes".
        options: See there.

    Returns:
        "answers", "tokens", "bytes", "bits_per_byte", "bits_per_byte_interval",
        "expected_calibration_error" in percent, and "bins" with "count", "confidence", "accuracy".

    Example:
        >>> one = {"nats": [math.log(2)] * 8, "confidence": [0.5] * 8, "correct": [True] * 8}
        >>> found = summarise_readings([{**one, "bytes": 4}], Resampling())
        >>> found["bits_per_byte"], found["expected_calibration_error"]
        (2.0, 50.0)
    """
    sums_N2 = np.array([(math.fsum(r["nats"]) / math.log(2), r["bytes"]) for r in readings])
    resampled_R2 = bootstrap_sums(sums_N2, resamples=options.resamples, seed=options.seed)
    ratios_R = resampled_R2[:, 0] / resampled_R2[:, 1]
    bits, size = sums_N2.sum(axis=0)
    bins = reliability(
        np.array([x for r in readings for x in r["confidence"]]),
        np.array([x for r in readings for x in r["correct"]]),
    )
    return {
        "answers": len(readings),
        "tokens": int(bins.count.sum()),
        "bytes": int(size),
        "bits_per_byte": float(bits / size),
        "bits_per_byte_interval": percentile_interval(ratios_R, options.confidence).tolist(),
        "expected_calibration_error": 100 * bins.expected_error,
        "bins": {f.name: getattr(bins, f.name).tolist() for f in dataclasses.fields(bins)},
    }


def _values(rows: Rows) -> np.ndarray:
    return np.array([[row[name] for name in rows[0]] for row in rows], np.float64)


def _interval(values_NM: np.ndarray, options: Resampling) -> np.ndarray:
    sums = bootstrap_sums(values_NM, resamples=options.resamples, seed=options.seed)
    return percentile_interval(sums / len(values_NM), options.confidence)
