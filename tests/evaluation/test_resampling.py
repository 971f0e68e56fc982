import itertools

import numpy as np
import pytest
import scipy.stats

from uld_jax.evaluation import bootstrap_sums, percentile_interval, sign_flip_test


def test_sums_are_those_of_the_drawn_examples(monkeypatch):
    values = np.random.default_rng(1).normal(size=(7, 3))
    rng = np.random.default_rng(5)
    expected = [values[rng.integers(0, 7, 7)].sum(axis=0) for _ in range(40)]
    sums = bootstrap_sums(values, resamples=40, seed=5)
    np.testing.assert_allclose(sums, expected, rtol=1e-12)
    # However many are drawn at a time.
    monkeypatch.setattr("uld_jax.evaluation.resampling._AT_A_TIME", 21)
    np.testing.assert_allclose(bootstrap_sums(values, resamples=40, seed=5), sums, rtol=1e-12)
    assert not np.allclose(bootstrap_sums(values, resamples=40, seed=6), sums)


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(2).exponential(size=200)
    sums = bootstrap_sums(values[:, None], resamples=9999, seed=0)
    found = percentile_interval(sums[:, 0] / 200, 0.9)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", n_resamples=9999, rng=1
    ).confidence_interval
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    # F1 as it is: many 0, many 100, some between. The mean of all is 50.
    samples = rng.choice([0, 0, 40, 60, 100, 100], size=(400, 120)).astype(float)
    inside = 0
    for seed, values in enumerate(samples):
        sums = bootstrap_sums(values[:, None], resamples=400, seed=seed)
        low, high = percentile_interval(sums[:, 0] / len(values), 0.9)
        inside += low <= 50 <= high
    # 360 of 400 expected, standard deviation 6; the percentile interval is a little narrow.
    assert 336 <= inside <= 378


def exact_p(differences):
    signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    observed = abs(differences.sum())
    return (np.abs(signs @ differences) >= observed - 1e-9).mean()


def test_p_is_that_of_all_sign_flips():
    rng = np.random.default_rng(4)
    differences = np.round(rng.normal(0.4, 1, size=(12, 3)), 1)
    found = sign_flip_test(differences, permutations=200_000, seed=0)
    expected = [exact_p(column) for column in differences.T]
    np.testing.assert_allclose(found, expected, atol=0.004)
    assert len({round(p, 2) for p in expected}) == 3


def test_p_counts_ties_as_extreme_and_is_never_zero():
    # Multiples of 0.1, whose sums depend on their order: each flip of all signs is a tie.
    differences = np.array([[0.1], [0.2], [0.3], [0.7]])
    found = sign_flip_test(differences, permutations=50_000, seed=0)[0]
    assert found == pytest.approx(2 / 16, abs=0.006)
    certain = sign_flip_test(np.ones((200, 1)), permutations=99, seed=0)[0]
    assert certain == 0.01
    both = np.concatenate([np.zeros((5, 2)), [[1.0, 0.0]]])
    np.testing.assert_array_equal(sign_flip_test(both, permutations=99, seed=0), [1, 1])


def test_p_of_no_difference_is_uniform():
    rng = np.random.default_rng(6)
    p = sign_flip_test(rng.normal(size=(50, 400)), permutations=999, seed=1)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001
    shifted = sign_flip_test(rng.normal(0.6, 1, size=(50, 400)), permutations=999, seed=1)
    assert (shifted < 0.05).mean() > 0.95


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"values \[N >= 1, M\], got an array of shape \(0, 2\)"):
        bootstrap_sums(np.zeros((0, 2)), resamples=1, seed=0)
    with pytest.raises(ValueError, match="at least 1 resample, got 0"):
        sign_flip_test(np.zeros((1, 2)), permutations=0, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        percentile_interval(np.zeros(3), 95)
