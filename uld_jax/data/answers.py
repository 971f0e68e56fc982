"""A teacher's answers on disk: an ArrayRecord data set that TFDS reads, with a manifest.

A finished directory holds `answers-train.array_record-00000-of-00012`, …, TFDS's
`dataset_info.json` and `features.json`, and `manifest.json`, which is written last.
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from uld_jax.data.records import Example
from uld_jax.data.shards import Kind, ShardWriter, read_manifest, verify_shard
from uld_jax.errors import UserError
from uld_jax.files import fetched, locate, write_text

# Why there is no answer.
REASONS = ("empty_prompt", "long_prompt", "empty_answer", "long_answer", "cut_answer")
DATASET = "answers"
# TFDS's own files beside the shards.
METADATA = ("dataset_info.json", "features.json")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a teacher wrote to a question.

    Attributes:
        text: The answer.
        tokens: How many it wrote.
        cut: Whether it had not ended when it had written as many as it may.
        dropped: One of `REASONS` where the answer does not count, else empty.

    Example:
        >>> Answer("Norway", 2).dropped
        ''
    """

    text: str
    tokens: int
    cut: bool = False
    dropped: str = ""


def answer_id(example_id: str, sample: int, samples: int) -> str:
    """The id of one of several answers.

    Args:
        example_id: Of the question.
        sample: Counted from 0.
        samples: Answers to each question.

    Returns:
        The question's own id where it has one answer.

    Example:
        >>> answer_id("q7", 0, 1), answer_id("q7", 2, 3)
        ('q7', 'q7#2')
    """
    return example_id if samples == 1 else f"{example_id}#{sample}"


class AnswerWriter:
    """Fills a directory with answers, `shard_size` questions a shard.

    Shards are written in any order and by any number of processes, each its own; one of them
    finishes. A writer on a directory that another left unfinished continues it.

    Args:
        directory: Made if need be.
        provenance: What the answers follow from, as JSON values.
        examples: The questions.
        split: The name of the data set's one split.
        samples: Answers to each question.
        shard_size: Questions of a shard.

    Raises:
        UserError: The directory holds something else, each differing field named; or two
            questions have one id.

    Example:
        >>> import tempfile
        >>> examples = [Example(str(i), "qa", "", "Why?", ("?",), "") for i in range(3)]
        >>> directory, settings = tempfile.mkdtemp(), {"split": "train", "samples": 1}
        >>> writer = AnswerWriter(directory, {"model": "m"}, examples, **settings, shard_size=2)
        >>> for shard in writer.missing_shards():
        ...     writer.write_shard(shard, [Answer("So.", 2) for _ in writer.examples_of(shard)])
        >>> writer.finish()["answers"]
        3
        >>> verify_answers(directory)["tokens"]
        6
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        provenance: Mapping[str, Any],
        examples: Sequence[Example],
        *,
        split: str,
        samples: int,
        shard_size: int,
    ) -> None:
        seen: set[str] = set()
        for example in examples:
            if example.id in seen:
                raise UserError(f"{directory}: two questions have the id {example.id!r}")
            seen.add(example.id)
        self._examples = examples
        self._split, self._samples = split, samples
        self._features = _features(samples)
        settings = {
            "provenance": dict(provenance),
            "split": split,
            "samples": samples,
            "total": len(examples),
            "shard_size": shard_size,
        }
        self._shards = ShardWriter(directory, kind_of(split), settings)

    @property
    def finished(self) -> bool:
        """Whether the manifest is there."""
        return self._shards.finished

    def missing_shards(self) -> list[int]:
        """The shards that are still to be written, by this process or others, ascending."""
        return self._shards.missing_shards()

    def examples_of(self, shard: int) -> Sequence[Example]:
        """The questions of a shard.

        Args:
            shard: Its number.

        Returns:
            The questions.
        """
        return [self._examples[i] for i in self._shards.examples_of(shard)]

    def write_shard(self, shard: int, answers: Sequence[Answer]) -> None:
        """Writes one shard in one step; a reader, or a writer after a kill, sees all or none.

        Args:
            shard: Its number.
            answers: Those to its first question, then those to the next, ….

        Raises:
            ValueError: There are not `samples` answers to each question.
            UserError: The data set is finished already.
        """
        asked = [(e, sample) for e in self.examples_of(shard) for sample in range(self._samples)]
        if len(answers) != len(asked):
            raise ValueError(f"shard {shard}: expected {len(asked)} answers, got {len(answers)}")
        dropped: dict[str, list[str]] = {reason: [] for reason in REASONS}
        kept, records = [], []
        for (example, sample), answer in zip(asked, answers, strict=True):
            if answer.dropped:
                dropped[answer.dropped].append(answer_id(example.id, sample, self._samples))
                continue
            kept.append(answer)
            fields = {**dataclasses.asdict(example), "answers": [answer.text]}
            if self._samples > 1:
                fields["sample"] = sample
            records.append(_serialize(self._features, fields))
        note = {
            "records": len(records),
            "record_bytes": sum(map(len, records)),
            "tokens": sum(answer.tokens for answer in kept),
            "cut": sum(answer.cut for answer in kept),
            "dropped": {reason: ids for reason, ids in dropped.items() if ids},
        }
        self._shards.write(shard, records, note)

    def counts(self) -> dict[str, Any]:
        """What the shards hold together, once none is missing.

        Returns:
            "answers", their "tokens", how many of them the limit of tokens "cut", and "dropped":
            reason to number.

        Raises:
            ValueError: Shards are missing.
        """
        return _counts(self._shards.notes())

    def finish(self) -> dict[str, Any]:
        """Writes TFDS's files and then the manifest, which makes the data set whole.

        Returns:
            The manifest.

        Raises:
            ValueError: Shards are missing.
        """
        if self.finished:
            return self._shards.manifest()
        notes = self._shards.notes()
        self._write_metadata(notes)
        return self._shards.finish({**_counts(notes), "shards": notes})

    def _write_metadata(self, notes: Sequence[Mapping[str, Any]]) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.dataset_info import DatasetIdentity
        from tensorflow_datasets.core.splits import SplitDict

        directory = self._shards.directory
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.as_path(directory),
            dataset_name=DATASET,
            split=self._split,
            filetype_suffix="array_record",
        )
        split = tfds.core.SplitInfo(
            name=self._split,
            shard_lengths=[note["records"] for note in notes],
            num_bytes=sum(note["record_bytes"] for note in notes),
            filename_template=template,
        )
        version = tfds.core.Version("1.0.0")
        info = tfds.core.DatasetInfo(
            builder=DatasetIdentity(
                name=DATASET, version=version, data_dir=str(directory), module_name=""
            ),
            description="A teacher's answers; manifest.json says what they follow from.",
            features=self._features,
        )
        info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
        info.set_splits(SplitDict([split]))
        with tempfile.TemporaryDirectory() as scratch:
            info.write_to_directory(scratch)
            for path in sorted(pathlib.Path(scratch).iterdir()):
                write_text(directory / path.name, path.read_text())


def verify_answers(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Compares every byte of a finished data set of answers with its manifest.

    Args:
        directory: Of the data set.

    Returns:
        The manifest.

    Raises:
        UserError: It is unfinished or damaged.
    """
    return open_answers(directory)[1]


def open_answers(directory: str | os.PathLike[str]) -> tuple[pathlib.Path, dict[str, Any]]:
    """The same, and where TFDS can read the data set: of a bucket's, the local copy.

    Args:
        directory: Of the data set.

    Returns:
        The local directory and the manifest.

    Raises:
        UserError: It is unfinished or damaged.
    """
    kind, place = kind_of("train"), locate(directory)
    manifest = read_manifest(place, kind)
    digests = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    local = fetched(place, {**digests, **dict.fromkeys(METADATA, "")})
    for shard in manifest["shards"]:
        verify_shard(local / shard["name"], shard, kind)
    return local, manifest


def kind_of(split: str) -> Kind:
    """What `shards` is to know of a data set of answers."""
    return Kind(
        what="data set of answers",
        command="uld-jax generate",
        format=1,
        stem=DATASET,
        suffix=f"-{split}.array_record-{{shard:05d}}-of-{{shards:05d}}",
        # Grain wants to read records one by one.
        options="group_size:1,max_parallelism:1",
        fields=("split", "samples", "answers", "tokens", "cut", "dropped"),
    )


def _counts(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "answers": sum(note["records"] for note in notes),
        "tokens": sum(note["tokens"] for note in notes),
        "cut": sum(note["cut"] for note in notes),
        "dropped": {
            reason: sum(len(note["dropped"].get(reason, ())) for note in notes)
            for reason in REASONS
        },
    }


def _serialize(features: Any, fields: Mapping[str, Any]) -> bytes:
    """A record in the one order of its fields: as TFDS writes it, each process has its own."""
    from tensorflow_datasets.proto import tf_example_pb2

    # Its classes are made when the module is imported.
    kind: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
    example = kind.FromString(features.serialize_example(fields))
    return example.SerializeToString(deterministic=True)


def _features(samples: int) -> Any:
    import numpy as np

    # Half a second of imports that `import uld_jax.data` should not cost.
    from uld_jax.data.builders import record_features

    return record_features({"sample": np.int32} if samples > 1 else {})
