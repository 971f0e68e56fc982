"""Scores of predicted answers against references, and how they are shown."""

from uld_jax.evaluation.bertscore import bert_scores, require_bert_score
from uld_jax.evaluation.calibration import Reliability, reliability
from uld_jax.evaluation.paper_plot import plot_differences
from uld_jax.evaluation.paper_table import Baseline, Line, to_csv, to_markdown
from uld_jax.evaluation.predictions import Prediction, pair_predictions, read_predictions
from uld_jax.evaluation.published import Published, find_published, read_published
from uld_jax.evaluation.report import (
    comparison_table,
    plot_losses,
    plot_reliability,
    sample_table,
)
from uld_jax.evaluation.resampling import bootstrap_sums, percentile_interval, sign_flip_test
from uld_jax.evaluation.runner import Evaluation, answer_prompts, evaluate
from uld_jax.evaluation.scores import METRICS, normalise, per_example, score
from uld_jax.evaluation.summary import Resampling, compare, summarise, summarise_readings
from uld_jax.evaluation.teacher_answers import TeacherAnswers, answered, read_teacher_answers
from uld_jax.evaluation.teacher_forcing import Reading, bits_per_byte, read_answers

__all__ = [
    "METRICS",
    "Baseline",
    "Evaluation",
    "Line",
    "Prediction",
    "Published",
    "Reading",
    "Reliability",
    "Resampling",
    "TeacherAnswers",
    "answer_prompts",
    "answered",
    "bert_scores",
    "bits_per_byte",
    "bootstrap_sums",
    "compare",
    "comparison_table",
    "evaluate",
    "find_published",
    "normalise",
    "pair_predictions",
    "per_example",
    "percentile_interval",
    "plot_differences",
    "plot_losses",
    "plot_reliability",
    "read_answers",
    "read_predictions",
    "read_published",
    "read_teacher_answers",
    "reliability",
    "require_bert_score",
    "sample_table",
    "score",
    "sign_flip_test",
    "summarise",
    "summarise_readings",
    "to_csv",
    "to_markdown",
]
