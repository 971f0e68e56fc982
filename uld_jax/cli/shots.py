"""Which training examples may be shown as worked ones."""

from collections.abc import Sequence

from uld_jax.config import RunConfig
from uld_jax.data import Example, load_examples, shot_pool


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
