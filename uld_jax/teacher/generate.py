"""The teacher's own answers: the text that the student learns to write."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from uld_jax.data import Answer, Example, Side, encode_prompts, first_line
from uld_jax.models import (
    Continuation,
    LoadedModel,
    Sampling,
    continue_prompts,
    end_ids,
    line_stop_ids,
)

STOPS = ("first_line", "strings", "none")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How answers are written.

    Args:
        max_new_tokens: At most this many tokens an answer.
        batch_size: Prompts answered together; it changes no answer.
        sampling: How tokens are chosen.
        samples: Answers to each question.
        seed: Of the sampling.
        stop: "first_line" (that is not blank), "strings" (up to one of them) or "none" (all).
        stop_strings: Texts that end an answer.
        keep_cut: Whether answers that max_new_tokens cut count.

    Raises:
        ValueError: Another rule to stop.

    Example:
        >>> Recipe(max_new_tokens=32, batch_size=16).stop
        'first_line'
    """

    max_new_tokens: int
    batch_size: int
    sampling: Sampling = Sampling()  # noqa: RUF009 - it is frozen
    samples: int = 1
    seed: int = 0
    stop: str = "first_line"
    stop_strings: tuple[str, ...] = ()
    keep_cut: bool = True

    def __post_init__(self) -> None:
        if self.stop not in STOPS:
            raise ValueError(f"stop: expected one of {STOPS}, got {self.stop!r}")


class Answerer:
    """A teacher that answers by one recipe.

    An answer depends on the recipe, on its question and on its number among those to that
    question; not on the other questions, nor on when it is asked for.

    Args:
        teacher: The model.
        side: How it is prompted.
        recipe: How answers are written.
        pool: Examples that shots are drawn from: the training split.
        seed: Decides which shots.
    """

    def __init__(
        self,
        teacher: LoadedModel,
        side: Side,
        recipe: Recipe,
        *,
        pool: Sequence[Example],
        seed: int,
    ) -> None:
        self._teacher, self._side, self._recipe = teacher, side, recipe
        self._pool, self._seed = pool, seed
        self._stop_ids = (line_stop_ids if recipe.stop == "first_line" else end_ids)(teacher)
        # Prompts that leave no room for an answer have none.
        room = teacher.config.max_positions - recipe.max_new_tokens
        self._longest = min(side.max_length - 1, room)

    def answer(
        self, examples: Sequence[Example], progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Answers questions.

        Args:
            examples: The questions.
            progress: Called with the number of answers since the last call.

        Returns:
            `samples` answers to the first question, then those to the next, ….
        """
        recipe, report = self._recipe, progress or (lambda _: None)
        asked = [(e, sample) for e in examples for sample in range(recipe.samples)]
        once = encode_prompts(examples, self._side, pool=self._pool, seed=self._seed)
        prompts = [ids for ids in once for _ in range(recipe.samples)]
        answers = [Answer("", 0, dropped=self._unanswerable(len(ids))) for ids in prompts]
        left = [i for i, answer in enumerate(answers) if not answer.dropped]
        report(len(asked) - len(left))
        found = continue_prompts(
            self._teacher.model,
            [prompts[i] for i in left],
            max_new_tokens=recipe.max_new_tokens,
            eos_id=self._stop_ids,
            sampling=recipe.sampling,
            stop_strings=recipe.stop_strings,
            tokenizer=self._teacher.tokenizer,
            key=jax.random.key(recipe.seed),
            numbers=_numbers([asked[i] for i in left]),
            batch_size=recipe.batch_size,
            progress=progress,
        )
        for i, continuation in zip(left, found, strict=True):
            answers[i] = self._read(asked[i][0], len(prompts[i]), continuation)
        return answers

    def _unanswerable(self, length: int) -> str:
        if length == 0:
            return "empty_prompt"
        return "long_prompt" if length > self._longest else ""

    def _read(self, example: Example, length: int, found: Continuation) -> Answer:
        """The answer in what was written after a prompt of a length."""
        text, cut = str(found.text), found.stop == "length"
        if self._recipe.stop == "first_line":
            # A token may hold text and a line break after it: such a one does not stop its row.
            line, broken, _ = text.partition("\n")
            text, cut = first_line(line), cut and not broken
        elif example.kind == "qa":
            text = text.strip()  # training writes the blank between question and answer
        dropped = ""
        if not text.strip():
            dropped = "empty_answer"
        elif length + len(found.ids) > self._side.max_length:
            dropped = "long_answer"
        elif cut and not self._recipe.keep_cut:
            dropped = "cut_answer"
        return Answer(text, len(found.ids), cut, dropped)


def _numbers(asked: Sequence[tuple[Example, int]]) -> np.ndarray:
    """What is folded into the key for each answer: 64 bits of its question's id, its number."""
    rows = [
        (*np.frombuffer(hashlib.sha256(e.id.encode()).digest()[:8], "<u4").tolist(), sample)
        for e, sample in asked
    ]
    return np.array(rows, np.uint32).reshape(len(rows), 3)


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
        Example id to answer; an answer may be empty. Examples that with their answer are longer
        than the side's max_length have none.
    """
    recipe = Recipe(max_new_tokens=max_new_tokens, batch_size=batch_size)
    answers = Answerer(teacher, side, recipe, pool=pool, seed=seed).answer(examples, progress)
    return {
        example.id: answer.text
        for example, answer in zip(examples, answers, strict=True)
        if answer.dropped in ("", "empty_answer")
    }
