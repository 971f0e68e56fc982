"""Scores of predicted answers against references, and how they are shown."""

from uld_jax.evaluation.calibration import Reliability, reliability
from uld_jax.evaluation.report import (
    comparison_table,
    plot_losses,
    plot_reliability,
    sample_table,
)
from uld_jax.evaluation.resampling import bootstrap_sums, percentile_interval, sign_flip_test
from uld_jax.evaluation.runner import Evaluation, evaluate
from uld_jax.evaluation.scores import METRICS, normalise, per_example, score
from uld_jax.evaluation.teacher_forcing import Reading, bits_per_byte, read_answers

__all__ = [
    "METRICS",
    "Evaluation",
    "Reading",
    "Reliability",
    "bits_per_byte",
    "bootstrap_sums",
    "comparison_table",
    "evaluate",
    "normalise",
    "per_example",
    "percentile_interval",
    "plot_losses",
    "plot_reliability",
    "read_answers",
    "reliability",
    "sample_table",
    "score",
    "sign_flip_test",
]
