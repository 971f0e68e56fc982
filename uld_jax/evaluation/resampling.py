"""How sure a mean over examples is: bootstrap intervals and a paired test, in numpy."""

from collections.abc import Iterator

import numpy as np

# Numbers that are drawn at a time: 32 MB of them.
_AT_A_TIME = 4_000_000


def bootstrap_sums(values_NM: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Sums over N examples that are drawn N times with replacement.

    Args:
        values_NM: float [N, M], M values of each example, which are drawn together.
        resamples: R.
        seed: Of the draws.

    Returns:
        float64 [R, M].

    Raises:
        ValueError: there are no examples, or no resamples are asked for.

    Example:
        >>> bootstrap_sums(np.array([[1.0, 2.0]]), resamples=2, seed=0).tolist()
        [[1.0, 2.0], [1.0, 2.0]]

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 6.
    """
    values_NM = _checked(values_NM, resamples)
    n = len(values_NM)
    rng = np.random.default_rng(seed)
    sums = []
    for rows in _chunks(resamples, n):
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        # How often each is drawn, times its values: a matrix product instead of R N M look-ups.
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums.append(counts.astype(np.float64) @ values_NM)
    return np.concatenate(sums)


def percentile_interval(statistics_RM: np.ndarray, confidence: float = 0.95) -> np.ndarray:
    """The central part of a resampled statistic's distribution.

    Args:
        statistics_RM: float [R, ...], one value a resample.
        confidence: The part, in (0, 1).

    Returns:
        float64 [2, ...], lower and upper end.

    Raises:
        ValueError: confidence is out of range.

    Example:
        >>> percentile_interval(np.arange(101.0), 0.5).tolist()
        [25.0, 75.0]

    Reference:
        Efron and Tibshirani, 1993, section 13.3.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    beside = (1 - confidence) / 2
    return np.quantile(statistics_RM, (beside, 1 - beside), axis=0)


def sign_flip_test(differences_NM: np.ndarray, *, permutations: int, seed: int) -> np.ndarray:
    """The two-sided p-value of a mean difference of pairs, by sign-flip permutation.

    Where neither of a pair is better than the other, each difference is as likely as its
    negative. So all signs are drawn anew, `permutations` times:

        p = (1 + #{|mean of the flipped| >= |mean|}) / (1 + permutations)

    Args:
        differences_NM: float [N, M], M differences of each pair, which are flipped together.
        permutations: R.
        seed: Of the signs.

    Returns:
        float64 [M], at least 1 / (1 + permutations).

    Raises:
        ValueError: there are no pairs, or no permutations are asked for.

    Example:
        >>> bool(sign_flip_test(np.ones((20, 1)), permutations=999, seed=0)[0] <= 0.003)
        True
        >>> sign_flip_test(np.zeros((20, 1)), permutations=999, seed=0).tolist()
        [1.0]

    Reference:
        Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005, section 3.2.1;
        Phipson and Smyth, "Permutation P-values Should Never Be Zero", 2010, for the 1 +.
    """
    given_NM = _checked(differences_NM, permutations)
    used_NM = given_NM[(given_NM != 0).any(axis=1)]  # the sign of nothing changes nothing
    observed_M = np.abs(used_NM.sum(axis=0))
    # Sums of the same numbers in another order are equal, not less by a rounding error.
    least_M = observed_M - 1e-12 * np.abs(used_NM).sum(axis=0)
    rng = np.random.default_rng(seed)
    extreme_M = np.zeros(given_NM.shape[1])
    for rows in _chunks(permutations, max(1, len(used_NM))):
        signs = 2.0 * rng.integers(0, 2, (rows, len(used_NM)), dtype=np.int8) - 1.0
        extreme_M += (np.abs(signs @ used_NM) >= least_M).sum(axis=0)
    return (1 + extreme_M) / (1 + permutations)


def _chunks(count: int, width: int) -> Iterator[int]:
    size = max(1, _AT_A_TIME // width)
    for start in range(0, count, size):
        yield min(size, count - start)


def _checked(values_NM: np.ndarray, repeats: int) -> np.ndarray:
    values_NM = np.asarray(values_NM, np.float64)
    if values_NM.ndim != 2 or len(values_NM) == 0:
        raise ValueError(f"expected values [N >= 1, M], got an array of shape {values_NM.shape}")
    if repeats < 1:
        raise ValueError(f"expected at least 1 resample, got {repeats}")
    return values_NM
