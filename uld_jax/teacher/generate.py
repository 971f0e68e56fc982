"""The teacher's own answers: the text that the student learns to write."""

from collections.abc import Callable, Sequence

from uld_jax.data import Example, Side, encode_prompts, first_line
from uld_jax.models import LoadedModel, complete


def generate_answers(
    teacher: LoadedModel,
    examples: Sequence[Example],
    side: Side,
    *,
    pool: Sequence[Example],
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Greedy answers, first line only (the paper's rule, section 4.1).

    Args:
        teacher: The model.
        examples: What to answer.
        side: How the teacher is prompted.
        pool: Examples that shots are drawn from: the training split.
        seed: Decides which shots.
        max_new_tokens: At most this many tokens an answer.
        batch_size: Prompts answered together.
        progress: Called with the number of answers since the last call.

    Returns:
        Example id to answer; an answer may be empty. Examples whose prompt is longer than the
        side's max_length have none.
    """
    prompts = {
        example.id: ids
        for example, ids in zip(
            examples, encode_prompts(examples, side, pool=pool, seed=seed), strict=True
        )
        if len(ids) <= side.max_length
    }
    texts = complete(
        teacher,
        list(prompts.values()),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return {id_: first_line(text) for id_, text in zip(prompts, texts, strict=True)}
