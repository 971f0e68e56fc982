import numpy as np
import pytest

from uld_jax.evaluation import plot_reliability, reliability


def by_hand(confidence, correct, bins):
    """The definition, prediction by prediction."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [
            (c, k)
            for c, k in zip(confidence, correct, strict=True)
            if (m - 1) / bins < c <= m / bins or (m == 1 and c == 0)
        ]
        if inside:
            gap = np.mean([k for _, k in inside]) - np.mean([c for c, _ in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


def test_it_is_the_definition():
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    correct = rng.random(500) < confidence**2
    found = reliability(confidence, correct)
    assert len(found.count) == 15
    assert found.count.sum() == 500
    assert found.expected_error == pytest.approx(by_hand(confidence, correct, 15), abs=1e-12)
    assert found.expected_error == pytest.approx(1 / 6, abs=0.05)  # E |c - c²|


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 1.0], [False, False], 1.0),
        ([0.75] * 4, [True, True, True, False], 0.0),  # as often right as it is sure
        ([0.75] * 4, [False] * 4, 0.75),
        # Over and under in one bin make up for each other, in two they do not.
        ([0.72, 0.68, 0.70, 0.70], [True, True, True, False], 0.05),
        ([0.9, 0.9, 0.1, 0.1], [True, False, True, False], 0.4),
        ([0.0, 1.0], [False, True], 0.0),
    ],
)
def test_constructed_cases(confidence, correct, expected):
    found = reliability(np.array(confidence), np.array(correct))
    assert found.expected_error == pytest.approx(expected, abs=1e-12)


def test_the_upper_end_of_a_bin_belongs_to_it():
    confidence = np.array([0.0, 0.2, 0.2000001, 0.4, 1.0])
    found = reliability(confidence, np.zeros(5, bool), bins=5)
    assert found.count.tolist() == [2, 2, 0, 0, 1]


def test_bad_arguments():
    for confidence, correct in (([], []), ([0.5], [True, False])):
        with pytest.raises(ValueError, match="as many confidences as outcomes"):
            reliability(np.array(confidence), np.array(correct))
    for bad in (1.2, -0.1, np.nan):
        with pytest.raises(ValueError, match="confidences from 0 to 1"):
            reliability(np.array([bad]), np.array([True]))


def test_the_plot_has_a_panel_a_model(tmp_path):
    import matplotlib.image

    sizes = []
    for count in (1, 2):
        models = {
            f"model {i}": reliability(np.array([0.2, 0.9]), np.array([False, True]))
            for i in range(count)
        }
        path = tmp_path / f"{count}.png"
        plot_reliability(models, path)
        image = matplotlib.image.imread(path)
        sizes.append(image.shape[1])
        blue = np.abs(image[..., :3] - np.array([0, 0x72, 0xB2]) / 255).max(axis=-1) < 0.02
        assert blue.sum() > 200 * count
    assert sizes[1] > 1.5 * sizes[0]
