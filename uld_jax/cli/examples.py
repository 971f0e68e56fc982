"""Which examples a run trains on, is evaluated on, and may show as worked ones."""

from collections.abc import Sequence

import jax
import numpy as np

from uld_jax.config import RunConfig
from uld_jax.data import Example, fingerprint_examples, load_examples, shot_pool
from uld_jax.errors import UserError
from uld_jax.processes import differing


def load_split(config: RunConfig, split: str) -> list[Example]:
    """A split of the configured data, cut to the configured number of examples.

    Args:
        config: The run.
        split: "train" or "eval".

    Returns:
        The examples; a random choice by `data.seed` where the number is limited.

    Raises:
        UserError: The data cannot be read, or not all processes have the same.
    """
    data = config.data
    source, limit = data.source, data.train_examples
    if split == "eval":
        source, limit = data.eval_source or data.source, data.eval_examples
    examples = load_examples(
        source, split, data_dir=data.data_dir or None, manual_dir=data.manual_dir or None
    )
    if limit and limit < len(examples):
        chosen = np.random.default_rng(data.seed).permutation(len(examples))[:limit]
        examples = [examples[i] for i in sorted(chosen)]
    _check_same_everywhere(examples, f"{source}, split {split}")
    return examples


def _check_same_everywhere(examples: Sequence[Example], what: str) -> None:
    """Refuses data that differ between the machines: each process trusts the others' plan."""
    if jax.process_count() == 1:
        return
    different = differing(fingerprint_examples(examples))
    if different:
        raise UserError(
            f"{what}: process {', '.join(map(str, different))} of {jax.process_count()} has other "
            "examples than process 0; expected the same on all: give every machine the same files"
        )


def shot_pool_of(config: RunConfig, train_set: Sequence[Example]) -> Sequence[Example]:
    """What the worked examples in prompts are drawn from.

    Args:
        config: The run.
        train_set: Its training examples.

    Returns:
        Those on no text that the whole evaluation split has; all of them where nothing is drawn.
    """
    data = config.data
    if not any(model.shots for model in (config.student, *config.teachers)):
        return train_set
    held_out = load_examples(
        data.eval_source or data.source,
        "eval",
        data_dir=data.data_dir or None,
        manual_dir=data.manual_dir or None,
        may_be_absent=True,
    )
    return shot_pool(train_set, held_out)
