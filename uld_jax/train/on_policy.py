"""On-policy rows: answers that the student in training samples, for the teacher to judge."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from uld_jax.data import (
    Example,
    Loader,
    Pair,
    Side,
    encode_prompts,
    first_line,
    pairs_or_reasons,
)
from uld_jax.models import Decoder, EncoderDecoder, Sampling, continue_prompts

# A text may take a token more when it is read again, and it ends with the end-of-text token.
REREAD_TOKENS = 2


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """Replaces answers in a batch by the student's own, sampled from it as it is at that step.

    The text is read again by both tokenizers, so that the same alignment holds as for any other
    answer. A sample that is blank, or that has no room in the batch's padded sizes, leaves the
    row with the answer it had.

    Args:
        student: How the student is prompted.
        teachers: How each teacher is prompted.
        examples: What the batches' pairs are about, by id.
        pool: Examples that shots are drawn from: the training split.
        seed: Decides which shots and which rows.
        fraction: Share of each batch's rows.
        sampling: How tokens are chosen.
        max_new_tokens: At most this many tokens an answer.
        stop_ids: Tokens that end an answer.

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649.
    """

    student: Side
    teachers: Sequence[Side]
    examples: Mapping[str, Example]
    pool: Sequence[Example]
    seed: int
    fraction: float
    sampling: Sampling
    max_new_tokens: int
    stop_ids: Sequence[int]

    @property
    def answer_room(self) -> int:
        """Tokens that a batch must have room for in each row: `make_loader`'s argument."""
        return self.max_new_tokens + REREAD_TOKENS

    def batch(
        self, model: Decoder | EncoderDecoder, loader: Loader, batch: int, key: jax.Array
    ) -> tuple[dict[str, Any], int]:
        """One batch with some of its answers replaced.

        Args:
            model: The student as it is now.
            loader: Holds the batch.
            batch: Counted from 0.
            key: The run's PRNG key; each batch draws from a key of its own.

        Returns:
            What `uld_jax.data.collate` returns, and how many answers were replaced.
        """
        rows = loader.rows(batch)
        chosen = self._choose(rows, batch)
        asked = [pair.id for row in chosen if (pair := rows[row]) is not None]
        sampled = self._sample(model, asked, jax.random.fold_in(key, batch))
        new = {
            row: pair
            for row, pair in zip(chosen, sampled, strict=True)
            if isinstance(pair, Pair) and loader.has_room(batch, pair)
        }
        rows = [new.get(row, pair) for row, pair in enumerate(rows)]
        return loader.collate(batch, rows), len(new)

    def _choose(self, rows: Sequence[Pair | None], batch: int) -> list[int]:
        """Which rows: as many as make up the fraction of all batches so far, or one fewer.

        So there are two numbers of rows in all, and two programs that sample.
        """
        before, now = (int(n * self.fraction * len(rows)) for n in (batch, batch + 1))
        order = np.random.default_rng((self.seed, batch)).permutation(len(rows))
        return [int(row) for row in order if rows[row] is not None][: now - before]

    def _sample(
        self, model: Decoder | EncoderDecoder, ids: Sequence[str], key: jax.Array
    ) -> list[Pair | str]:
        """New pairs about these examples, or why a sample cannot be trained on."""
        if not ids:
            return []
        examples = [self.examples[id_] for id_ in ids]
        shots: Any = {"pool": self.pool, "seed": self.seed}
        found = continue_prompts(
            model,
            encode_prompts(examples, self.student, **shots),
            max_new_tokens=self.max_new_tokens,
            eos_id=self.stop_ids,
            sampling=self.sampling,
            tokenizer=self.student.tokenizer,
            key=key,
            batch_size=len(examples),
        )
        texts = [first_line(str(each.text)) for each in found]
        new = pairs_or_reasons(examples, texts, self.student, self.teachers, **shots)
        return [
            dataclasses.replace(pair, on_policy=True) if isinstance(pair, Pair) else pair
            for pair in new
        ]
