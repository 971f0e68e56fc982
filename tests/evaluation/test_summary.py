import math

import numpy as np
import pytest

from uld_jax.evaluation import (
    Resampling,
    compare,
    sign_flip_test,
    summarise,
    summarise_readings,
)


def rows(values):
    return [{"f1": f, "em": e} for f, e in values]


def test_means_and_intervals_by_metric():
    found = summarise(rows([(0, 100), (50, 100), (100, 100)]), Resampling(resamples=20_000))
    assert found["scores"] == {"f1": 50.0, "em": 100.0}
    assert found["intervals"]["em"] == [100.0, 100.0]
    # Of the 27 equally likely draws of three one has mean 0 and one 100: 3.7 % each, over 2.5 %.
    assert found["intervals"]["f1"] == [0.0, 100.0]


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 30, 200)  # far more than what is between the two sets
    these, others = hard + 1 + rng.normal(0, 1, 200), hard
    options = Resampling(resamples=500, permutations=999, seed=4)
    found = compare(*([{"f1": x} for x in side] for side in (these, others)), options)["f1"]
    difference = these - others
    assert found["difference"] == pytest.approx(difference.mean())
    assert (found["this"], found["other"]) == pytest.approx((these.mean(), others.mean()))
    assert found["high"] - found["low"] == pytest.approx(
        2 * 1.96 * difference.std() / math.sqrt(200), rel=0.15
    )
    p = sign_flip_test(difference[:, None], permutations=999, seed=4)[0]
    assert found["p"] == p == 0.001


def test_bits_and_calibration_are_ratios_of_sums():
    readings = [
        {"nats": [1.0], "confidence": [0.6], "correct": [True], "bytes": 1},
        {
            "nats": [2.0, 0.5, 0.5],
            "confidence": [0.6, 0.9, 0.9],
            "correct": [False, True, False],
            "bytes": 9,
        },
    ]
    found = summarise_readings(readings, Resampling(resamples=400))
    assert (found["answers"], found["tokens"], found["bytes"]) == (2, 4, 10)
    assert found["bits_per_byte"] == pytest.approx(4 / 10 / math.log(2), rel=1e-12)
    # Of two answers a resample has one twice, or both: no other ratios exist.
    ratios = {x / math.log(2) for x in (1 / 1, 3 / 9)}
    assert {round(x, 9) for x in found["bits_per_byte_interval"]} == {round(x, 9) for x in ratios}
    # Bin (8/15, 9/15]: half right at 0.6; bin (13/15, 14/15]: half right at 0.9.
    assert found["expected_calibration_error"] == pytest.approx(100 * (0.1 + 0.4) / 2)
    assert found["bins"]["count"] == [0] * 8 + [2] + [0] * 4 + [2, 0]
