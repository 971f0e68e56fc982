"""A model's answers to held-out questions, and their scores."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

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
    predictions = answer_prompts(
        m,
        prompts,
        max_length=side.max_length,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        found=None if progress is None else lambda answers: progress(len(answers)),
    )
    answers = [
        {"id": e.id, "question": e.question, "references": list(e.answers), "prediction": text}
        for e, text in zip(examples, predictions, strict=True)
    ]
    scores = score(predictions, [e.answers for e in examples])
    too_long = sum(len(ids) > side.max_length for ids in prompts)
    return Evaluation(scores, answers, too_long)


def answer_prompts(
    m: LoadedModel,
    prompts: Sequence[np.ndarray],
    *,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
    found: Callable[[Mapping[int, str]], None] | None = None,
) -> list[str]:
    """Continues prompts greedily, first line only.

    Args:
        m: The model.
        prompts: Token ids, int32 [P] each.
        max_length: Prompts over so many tokens are not answered: their answer is empty.
        max_new_tokens: At most this many tokens an answer.
        batch_size: Prompts answered together.
        found: Called with answers by place in `prompts`, as they become known.

    Returns:
        An answer a prompt.
    """
    answers = {i: "" for i, ids in enumerate(prompts) if len(ids) > max_length}
    short = [i for i in range(len(prompts)) if i not in answers]
    report = found or (lambda _: None)
    if answers:
        report(answers)

    def keep(texts: Mapping[int, str]) -> None:
        done = {short[i]: first_line(text) for i, text in texts.items()}
        answers.update(done)
        report(done)

    complete(
        m,
        [prompts[i] for i in short],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        found=keep,
    )
    return [answers[i] for i in range(len(prompts))]
