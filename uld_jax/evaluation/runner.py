"""A model's answers to held-out questions, and their scores."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from uld_jax.data import Example, Side, encode_prompts, first_line
from uld_jax.evaluation.scores import score
from uld_jax.models import LoadedModel, complete


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores and the answers behind them.

    Attributes:
        scores: What `uld_jax.evaluation.score` returns, in percent.
        answers: One dict an example: id, question, references, prediction.
        too_long: Examples whose prompt is over the limit; their prediction is empty.
    """

    scores: dict[str, float]
    answers: list[dict[str, Any]]
    too_long: int


def evaluate(
    m: LoadedModel,
    examples: Sequence[Example],
    side: Side,
    *,
    pool: Sequence[Example],
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answers every question greedily, first line only, and scores the answers.

    Args:
        m: The model.
        examples: Held-out questions with their references.
        side: How the model is prompted.
        pool: Examples that shots are drawn from: the training split.
        seed: Decides which shots.
        max_new_tokens: At most this many tokens an answer.
        batch_size: Prompts answered together.
        progress: Called with the number of answers since the last call.

    Returns:
        The scores and the answers.
    """
    prompts = encode_prompts(examples, side, pool=pool, seed=seed)
    short = [i for i, ids in enumerate(prompts) if len(ids) <= side.max_length]
    texts = complete(
        m,
        [prompts[i] for i in short],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    predictions = [""] * len(prompts)
    for i, text in zip(short, texts, strict=True):
        predictions[i] = first_line(text)
    answers = [
        {"id": e.id, "question": e.question, "references": list(e.answers), "prediction": text}
        for e, text in zip(examples, predictions, strict=True)
    ]
    scores = score(predictions, [e.answers for e in examples])
    return Evaluation(scores, answers, len(prompts) - len(short))
