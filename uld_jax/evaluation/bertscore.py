"""BERTScore, from the extra `bertscore`; needs torch, which nothing else here does."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uld_jax.errors import UserError

# As the paper: English's default of bert-score, layer 17, rescaled by its baseline.
MODEL = "roberta-large"


def bert_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    model: str = MODEL,
    batch_size: int = 64,
) -> list[float]:
    """BERTScore F1 of each prediction against the best of its references, in percent.

    A model that bert-score knows by name, also as the last part of a path, is read at the layer
    that it recommends, and rescaled by its baseline for English where it has one, so that
    unrelated texts have about 0. Any other is read at its last layer and not rescaled.

    Args:
        predictions: One answer an example.
        references: At least one text an example.
        model: A directory or hub id of a BERT-like model.
        batch_size: Texts computed together.

    Returns:
        A value a prediction. An empty prediction has what bert-score gives it: a similarity of 0
        before it is rescaled.

    Raises:
        UserError: bert-score is not installed, or the model does not open.

    Example:
        >>> bert_scores(["Oslo"], [["Oslo"]], model="no/such")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: ...

    Reference:
        Zhang et al., "BERTScore: Evaluating Text Generation with BERT", 2020
        (https://arxiv.org/abs/1904.09675).
    """
    require_bert_score()
    scorer = _scorer(model, batch_size)
    # bert-score 0.3.13 cannot tokenise an empty text with transformers 5.
    pairs = [
        (i, prediction, text)
        for i, (prediction, texts) in enumerate(zip(predictions, references, strict=True))
        for text in texts
        if prediction.strip() and text.strip()
    ]
    best: dict[int, float] = {}
    if pairs:
        places, texts, golds = zip(*pairs, strict=True)
        *_, f1 = scorer.score(list(texts), list(golds), batch_size=batch_size)
        for i, value in zip(places, f1.tolist(), strict=True):
            best[i] = max(best.get(i, value), value)
    baseline = float(scorer.baseline_vals[2]) if scorer.rescale_with_baseline else 0.0
    of_nothing = -baseline / (1 - baseline)
    return [100 * best.get(i, of_nothing) for i in range(len(predictions))]


def require_bert_score() -> None:
    """Refuses to begin what could not end.

    Raises:
        UserError: bert-score is not installed.
    """
    if importlib.util.find_spec("bert_score") is None:
        raise UserError(
            "BERTScore needs the package bert-score, which is not installed: "
            "pip install 'uld-jax[bertscore]'"
        )


def _scorer(model: str, batch_size: int) -> Any:
    # By name: type checkers need not have what only this extra brings.
    package = importlib.import_module("bert_score")
    layers: dict[str, int] = importlib.import_module("bert_score.utils").model2layers
    known = next((name for name in (model, Path(model).name) if name in layers), None)
    root = Path(str(package.__file__)).parent
    baseline = root / "rescale_baseline" / "en" / f"{known}.tsv"
    try:
        return package.BERTScorer(
            model_type=model,
            num_layers=layers[known] if known else _layer_count(model),
            batch_size=batch_size,
            lang="en",
            rescale_with_baseline=baseline.is_file(),
            baseline_path=str(baseline) if baseline.is_file() else None,
            use_fast_tokenizer=True,
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--bertscore={model}: no model that opens ({reason}); give a directory of a "
            "BERT-like model, or download it first"
        ) from error


def _layer_count(model: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).num_hidden_layers
