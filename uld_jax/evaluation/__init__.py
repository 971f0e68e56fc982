"""Scores of predicted answers against references, and how they are shown."""

from uld_jax.evaluation.report import comparison_table, plot_losses, sample_table
from uld_jax.evaluation.runner import Evaluation, evaluate
from uld_jax.evaluation.scores import METRICS, normalise, per_example, score

__all__ = [
    "METRICS",
    "Evaluation",
    "comparison_table",
    "evaluate",
    "normalise",
    "per_example",
    "plot_losses",
    "sample_table",
    "score",
]
