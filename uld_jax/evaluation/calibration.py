"""Whether a model is right as often as it is sure: reliability and its expected error."""

import dataclasses

import numpy as np

BINS = 15


@dataclasses.dataclass(frozen=True, eq=False)
class Reliability:
    """Predictions by their confidence, in bins of equal width over (0, 1].

    Attributes:
        count: int64 [M], predictions in each bin.
        confidence: float64 [M], their mean confidence; 0 where there are none.
        accuracy: float64 [M], the part of them that is right; 0 where there are none.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_error(self) -> float:
        """Σ_m count_m / N · |accuracy_m − confidence_m|, the expected calibration error.

        Reference:
            Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
        """
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.count * gaps).sum() / self.count.sum())


def reliability(confidence: np.ndarray, correct: np.ndarray, *, bins: int = BINS) -> Reliability:
    """Sort predictions into bins ((m − 1) / M, m / M] of their confidence.

    Args:
        confidence: float [N], the largest probability of each prediction, in [0, 1].
        correct: bool [N], whether it is the right one.
        bins: M.

    Returns:
        The bins.

    Raises:
        ValueError: there are no predictions, not as many of both, or a confidence is out of range.

    Example:
        >>> found = reliability(np.array([0.2, 0.9, 0.9]), np.array([False, True, True]), bins=2)
        >>> found.count.tolist(), round(found.expected_error, 4)
        ([1, 2], 0.1333)

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2
        (https://arxiv.org/abs/1706.04599).
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1 or not len(confidence):
        raise ValueError(
            f"expected as many confidences as outcomes, at least one, got arrays of shapes "
            f"{confidence.shape} and {correct.shape}"
        )
    # Rounding in float32 may leave a probability slightly over 1; not a NaN, nor a logit.
    if not ((confidence >= 0) & (confidence <= 1 + 1e-5)).all():
        raise ValueError("expected confidences from 0 to 1")
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    divisor = np.maximum(count, 1)
    means = (np.bincount(place, x, minlength=bins) / divisor for x in (confidence, correct))
    return Reliability(count, *means)
