"""Scores of predictions with a progress bar, and BERTScore where it is asked for."""

from collections.abc import Callable, Iterable, Sequence

from uld_jax.cli.compose import console, progress_bar
from uld_jax.evaluation import Prediction, bert_scores, per_example

Scores = dict[str, float]


def score_predictions(predictions: Sequence[Prediction], bertscore: str | None) -> list[Scores]:
    """The scores of each prediction against its own references.

    Args:
        predictions: The answers.
        bertscore: A model for "bertscore"; None for none.

    Returns:
        metric -> percent for each.
    """
    with progress_bar("scoring", len(predictions)) as progress:
        rows = []
        for p in predictions:
            rows.append(per_example(p.text, p.references))
            progress(1)
    if bertscore:
        texts = [p.text for p in predictions]
        with console.status(f"BERTScore by {bertscore}"):
            found = bert_scores(texts, [p.references for p in predictions], model=bertscore)
        for row, value in zip(rows, found, strict=True):
            row["bertscore"] = value
    return rows


def score_once(
    predictions: Iterable[Prediction], bertscore: str | None
) -> Callable[[Prediction], Scores]:
    """The same for sets of answers that have much in common: no answer is scored twice.

    Args:
        predictions: All that will be asked about.
        bertscore: See `score_predictions`.

    Returns:
        A function from one of them to its scores.
    """
    distinct = list({(p.text, p.references): p for p in predictions}.values())
    rows = score_predictions(distinct, bertscore)
    found = {(p.text, p.references): row for p, row in zip(distinct, rows, strict=True)}
    return lambda p: found[p.text, p.references]
