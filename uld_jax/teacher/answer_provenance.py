"""What a teacher's answers follow from, for the manifest: a record that is compared by field."""

from collections.abc import Sequence
from typing import Any

from uld_jax import models
from uld_jax.config import RunConfig
from uld_jax.data import (
    Example,
    Side,
    fingerprint_examples,
    fingerprint_prompts,
    fingerprint_tokenizer,
)


def answer_provenance(
    config: RunConfig,
    teacher: models.LoadedModel,
    side: Side,
    examples: Sequence[Example],
    pool: Sequence[Example],
) -> dict[str, Any]:
    """All that decides answers; not batch size or mesh, which a resumed command may change.

    Args:
        config: The run.
        teacher: The model.
        side: How it is prompted.
        examples: The questions.
        pool: Examples that shots are drawn from.

    Returns:
        Name to JSON value.
    """
    asked, decoding = config.teacher, config.generate
    return {
        "model": asked.source,
        "revision": models.revision_of(asked.source),
        "weights": models.fingerprint(teacher),
        "dtype": asked.dtype,
        "quantize": asked.quantize,
        "tokenizer": fingerprint_tokenizer(side.tokenizer),
        "prompts": fingerprint_prompts(
            side.tokenizer, chat=side.chat, task=side.task, titles=side.titles
        ),
        "shots": side.shots,
        "shots_seed": config.data.seed if side.shots else None,
        "shots_pool": fingerprint_examples(pool) if side.shots else None,
        "max_length": side.max_length,
        "source": config.data.source,
        "task": side.task,
        "data": fingerprint_examples(examples),
        "max_new_tokens": asked.max_new_tokens,
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "seed": decoding.seed,
        "stop": decoding.stop,
        "stop_strings": decoding.stop_strings,
        "cut_answers": decoding.cut_answers,
    }
