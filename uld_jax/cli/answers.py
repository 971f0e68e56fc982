"""The teacher answers a split, shard by shard, into a directory that survives kills."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from uld_jax import models
from uld_jax.cli import compose
from uld_jax.cli.compose import progress_bar, say
from uld_jax.config import RunConfig
from uld_jax.data import AnswerWriter, Example
from uld_jax.data.shards import MANIFEST, SETTINGS
from uld_jax.files import AnyPath
from uld_jax.processes import is_first, wait_for_all
from uld_jax.teacher import Answerer, Recipe, answer_provenance

# Seconds between looks at what other processes have written.
POLL = 0.5


def answer_split(
    config: RunConfig,
    teacher: models.LoadedModel,
    examples: Sequence[Example],
    *,
    pool: Sequence[Example],
    directory: AnyPath,
    split: str,
    samples: int,
    title: str,
    apart: bool = False,
) -> AnswerWriter:
    """Writes the shards that are missing, with a progress bar.

    Args:
        config: The run.
        teacher: The model.
        examples: The questions.
        pool: Examples that shots are drawn from.
        directory: Where the answers go.
        split: The name of their split.
        samples: Answers to each question.
        title: Of the progress bar.
        apart: Of several processes each has a teacher of its own, and shards go round them; else
            all answer every shard together, with one teacher on all their devices, and the first
            one writes.

    Returns:
        The writer; in the first process no shard is missing, and it is to finish.

    Raises:
        UserError: The directory holds something else, or a prompt cannot be written.
    """
    side = compose.side_of(config.teacher, teacher, config.data)
    recipe = _recipe(config, samples)
    answerer = Answerer(teacher, side, recipe, pool=pool, seed=config.data.seed)
    provenance = answer_provenance(config, teacher, side, examples, pool)
    if not is_first():
        _wait_for(lambda: any((directory / name).is_file() for name in (SETTINGS, MANIFEST)))
    writer = AnswerWriter(
        directory,
        provenance,
        examples,
        split=split,
        samples=samples,
        shard_size=config.generate.shard_size,
    )
    rank, count = jax.process_index(), jax.process_count()
    if not apart:
        wait_for_all("answers")  # else one might see a shard that another has just written
    mine = [s for s in writer.missing_shards() if not apart or s % count == rank]
    total = samples * sum(len(writer.examples_of(shard)) for shard in mine)
    tokens, began = 0, time.monotonic()
    with progress_bar(title, total) as progress:
        for shard in mine:
            answers = answerer.answer(writer.examples_of(shard), progress)
            if apart or is_first():
                writer.write_shard(shard, answers)
            tokens += sum(answer.tokens for answer in answers)
    seconds = time.monotonic() - began
    if mine:
        say(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")
    if is_first():
        _wait_for(lambda: not writer.missing_shards())
    return writer


def wait_until_finished(writer: AnswerWriter, directory: AnyPath) -> None:
    """Waits for the first process, which finishes the directory, and may use it up.

    Args:
        writer: Of the directory.
        directory: The directory.
    """
    _wait_for(lambda: writer.finished or not directory.is_dir())


def dropped_message(config: RunConfig, counts: dict[str, Any]) -> str:
    """One line that counts what has no answer, empty where there is nothing.

    Args:
        config: The run.
        counts: As in the manifest.

    Returns:
        The line.
    """
    limit = f"over teacher.max_length={config.teacher.max_length}"
    why = {
        "empty_prompt": "with an empty prompt",
        "long_prompt": f"with a prompt {limit}, or over the teacher's positions",
        "empty_answer": "with an empty answer",
        "long_answer": f"with an answer {limit}",
        "cut_answer": f"cut at teacher.max_new_tokens={config.teacher.max_new_tokens}",
    }
    dropped = counts["dropped"]
    return compose.limit_message([(text, dropped[reason]) for reason, text in why.items()])


def _recipe(config: RunConfig, samples: int) -> Recipe:
    decoding = config.generate
    return Recipe(
        max_new_tokens=config.teacher.max_new_tokens,
        batch_size=config.teacher.batch_size,
        sampling=models.Sampling(decoding.temperature, decoding.top_k, decoding.top_p),
        samples=samples,
        seed=decoding.seed,
        stop=decoding.stop,
        stop_strings=tuple(json.loads(decoding.stop_strings)),
        keep_cut=decoding.cut_answers == "keep",
    )


def _wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(POLL)
