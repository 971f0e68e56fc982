"""A model's answers to the held-out questions, and its reading of theirs: shared and resumable."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from uld_jax import models
from uld_jax.cli import compose
from uld_jax.cli.compose import progress_bar, say
from uld_jax.config import BaseModelConfig, RunConfig
from uld_jax.data import (
    Example,
    Pair,
    Side,
    encode_prompts,
    fingerprint_examples,
    fingerprint_prompts,
    fingerprint_tokenizer,
    pairs_or_reasons,
)
from uld_jax.errors import UserError
from uld_jax.evaluation import Reading, answer_prompts, read_answers
from uld_jax.files import AnyPath, make_directory, remove_tree
from uld_jax.journal import Journal, read_journal
from uld_jax.mirror import Mirror
from uld_jax.processes import is_first, wait_for_all

Records = dict[str, dict[str, Any]]
Add = Callable[[Mapping[str, Mapping[str, Any]]], None]


class Journals(NamedTuple):
    """What has been done so far, until all of it is.

    Attributes:
        place: Directory of the files.
        mirror: Where they are written, if it is in a bucket.
    """

    place: AnyPath
    mirror: Mirror

    @property
    def local(self) -> Path:
        """Directory of the files on this machine."""
        return self.mirror.local

    def remove(self) -> None:
        """Removes all of it."""
        self.mirror.forget()
        if self.place.exists():  # in a bucket once something has been uploaded
            remove_tree(self.place)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a model is asked.

    Attributes:
        config: The run.
        examples: The held-out questions.
        pool: Examples that shots are drawn from.
        mesh: Where models go.
        apart: Whether each process has models of its own and a share of the examples; else all
            compute everything together.
        journals: Of what has been done, which all processes share.
    """

    config: RunConfig
    examples: Sequence[Example]
    pool: Sequence[Example]
    mesh: Mesh
    apart: bool
    journals: Journals

    def answers(self, m: models.LoadedModel) -> Records:
        """The student's answers by example id: "prediction" and whether it is "too_long"."""
        config = self.config
        side = compose.side_of(config.student, m, config.data)

        def make(examples: Sequence[Example], add: Add) -> None:
            prompts = encode_prompts(examples, side, pool=self.pool, seed=config.data.seed)

            def found(answers: Mapping[int, str]) -> None:
                add(
                    {
                        examples[i].id: {
                            "prediction": text,
                            "too_long": len(prompts[i]) > side.max_length,
                        }
                        for i, text in answers.items()
                    }
                )

            answer_prompts(
                m,
                prompts,
                max_length=side.max_length,
                max_new_tokens=config.eval.max_new_tokens,
                batch_size=config.eval.batch_size,
                found=found,
            )

        about = self._about(config.student, m, side)
        about |= {"max_new_tokens": config.eval.max_new_tokens}
        return self._resumed("answers", about, "held-out questions", make)

    def readings(self, which: str, model: BaseModelConfig, m: models.LoadedModel) -> Records:
        """What a model says of each example's first answer, by example id; "left_out" says why.

        Args:
            which: "student" or "teacher", for people.
            model: Its part of the config.
            m: The model.

        Returns:
            Records with "nats", "confidence" and "correct", see `Reading`, or "left_out".
        """
        side = dataclasses.replace(compose.side_of(model, m, self.config.data), append_eos=False)

        def make(examples: Sequence[Example], add: Add) -> None:
            texts = [example.answers[0] for example in examples]
            pairs = pairs_or_reasons(
                examples, texts, side, (), pool=self.pool, seed=self.config.data.seed
            )
            if reasons := {
                example.id: {"left_out": pair}
                for example, pair in zip(examples, pairs, strict=True)
                if isinstance(pair, str)
            }:
                add(reasons)
            left = [pair for pair in pairs if isinstance(pair, Pair)]
            read_answers(
                m,
                [pair.student for pair in left],
                batch_size=self.config.eval.batch_size,
                chunk_size=self.config.loss.chunk_size,
                mesh=self.mesh,
                found=lambda read: add({left[i].id: _record(r) for i, r in read.items()}),
            )

        return self._resumed(
            which, self._about(model, m, side), f"the {which} reads their answers", make
        )

    def _about(self, model: BaseModelConfig, m: models.LoadedModel, side: Side) -> dict[str, Any]:
        """All that decides answers and readings; not batch size or mesh, which may change."""
        return {
            "model": model.source,
            "weights": models.fingerprint(m),
            "dtype": model.dtype,
            "tokenizer": fingerprint_tokenizer(side.tokenizer),
            "prompts": fingerprint_prompts(side.tokenizer, chat=side.chat),
            "shots": side.shots,
            "shots_seed": self.config.data.seed if side.shots else None,
            "shots_pool": fingerprint_examples(self.pool) if side.shots else None,
            "max_length": side.max_length,
            "data": fingerprint_examples(self.examples),
        }

    def _resumed(
        self,
        name: str,
        about: dict[str, Any],
        title: str,
        make: Callable[[Sequence[Example], Add], None],
    ) -> Records:
        """The records of all examples: those in journals, and the others made and kept there."""
        rank, count = jax.process_index(), jax.process_count()
        known = self._known(name, about)
        mine = [
            example
            for place, example in enumerate(self.examples)
            if example.id not in known and (not self.apart or place % count == rank)
        ]
        wait_for_all(f"{name} known")  # before anyone writes what another might see
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(progress_bar(title, len(mine)))
            journal = None
            if self.apart or is_first():
                path = self.journals.local / f"{name}-{rank:05d}.jsonl"
                kept = self.journals.mirror.push_when_due
                journal = stack.enter_context(Journal(path, about, what=name, kept=kept))

            def add(records: Mapping[str, Mapping[str, Any]]) -> None:
                if journal is not None:
                    journal.add(records)
                progress(len(records))

            if mine:
                make(mine, add)
        wait_for_all(f"{name} done")
        known = self._known(name, about)
        return {example.id: known[example.id] for example in self.examples}

    def _known(self, name: str, about: dict[str, Any]) -> Records:
        found: Records = {}
        for path in sorted(self.journals.local.glob(f"{name}-*.jsonl")):
            found |= read_journal(path, about, what=name)
        return found


@contextlib.contextmanager
def open_journals(output: AnyPath | None) -> Iterator[Journals]:
    """Opens the directory beside an output that journals lie in until it is written.

    Args:
        output: The file that is to be written; None for a directory that is soon removed.

    Yields:
        The journals.

    Raises:
        UserError: It cannot be made; or several processes have no place in common.
    """
    if jax.process_count() > 1 and not isinstance(output, Path):
        raise UserError(
            f"--output={output or ''}: expected a file in a directory that all of the processes "
            "see, for they put their answers together beside it"
        )
    with contextlib.ExitStack() as stack:
        if output is None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "scores.json"
        place = output.with_suffix(".journal")
        try:
            make_directory(place)
        except OSError as error:
            raise UserError(
                f"--output={output}: cannot write there ({error.strerror}): choose another "
                "directory"
            ) from error
        mirror = stack.enter_context(Mirror(place))
        for path in place.glob("*.jsonl"):
            mirror.pull(path.name)
        yield Journals(place, mirror)


def say_left_out(config: RunConfig, answers: Records, readings: Mapping[str, Records]) -> None:
    """One line each for questions that were not answered, and answers that were not read.

    Args:
        config: The run.
        answers: See `HeldOut`.
        readings: By model.
    """
    too_long = sum(record["too_long"] for record in answers.values())
    if too_long:
        say(
            f"{too_long} of {len(answers)} prompts are over student.max_length="
            f"{config.student.max_length}: these questions count as unanswered"
        )
    for which, records in readings.items():
        reasons = [record["left_out"] for record in records.values() if "left_out" in record]
        long = sum(reason.startswith("too_long") for reason in reasons)
        message = compose.limit_message(
            [
                (f"over {which}.max_length", long),
                ("with an empty answer", len(reasons) - long),
            ]
        )
        if message:
            say(f"not read by the {which}, {message.removeprefix('left out: ')}")


def _record(reading: Reading) -> dict[str, Any]:
    def numbers(values: np.ndarray) -> list[float]:
        return [float(f"{value:.9g}") for value in values.tolist()]  # exact for float32

    return {
        "nats": numbers(reading.nats),
        "confidence": numbers(reading.confidence),
        "correct": reading.correct.tolist(),
    }
