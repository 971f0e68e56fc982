"""TFDS builders: each file's content is prepared once as ArrayRecord, without TensorFlow."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from uld_jax.data.records import Example, read_builtin, read_qa_jsonl, read_squad_json
from uld_jax.files import sha256_of


def record_features(more: Mapping[str, Any] | None = None) -> tfds.features.FeaturesDict:
    """The features of an `Example`.

    Args:
        more: Others beside them.

    Returns:
        The features.
    """
    text = tfds.features.Text()
    own = dict.fromkeys(("id", "kind", "context", "question", "title"), text)
    return tfds.features.FeaturesDict(
        {**own, "answers": tfds.features.Sequence(text), **(more or {})}
    )


class _RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """Shared part: reads `files`, writes one record an example, in file order.

    The copy lies in data_dir/(sha256 of the files)/, so changed content is a new copy.
    Raise VERSION whenever a reader or the split rule changes what is written.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        files: tuple[Path, ...],
        read: Callable[[], dict[str, list[Example]]],
        data_dir: Path,
    ) -> None:
        self._read = read
        digest = hashlib.sha256()
        for path in files:
            digest.update(bytes.fromhex(sha256_of(path)))
        super().__init__(file_format="array_record", data_dir=data_dir / digest.hexdigest())

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Question-answer and prompt-completion records.",
            features=record_features(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(found) for split, found in self._read().items()}

    def _generate_examples(self, examples: list[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, example in enumerate(examples):
            yield number, {**dataclasses.asdict(example), "answers": list(example.answers)}


class BuiltinQa(_RecordBuilder):
    """The questions shipped with the package, splits train and eval.

    Args:
        directory: Holds train.jsonl and eval.jsonl.
        data_dir: Where prepared copies are kept.
    """

    def __init__(self, *, directory: Path, data_dir: Path) -> None:
        files = (directory / "train.jsonl", directory / "eval.jsonl")
        super().__init__(files=files, read=lambda: read_builtin(directory), data_dir=data_dir)


class SquadJson(_RecordBuilder):
    """A SQuAD v1.1 file, split by article (see `records.split_by_group`).

    Args:
        path: The file, plain or .gz.
        data_dir: Where prepared copies are kept.
    """

    def __init__(self, *, path: Path, data_dir: Path) -> None:
        super().__init__(files=(path,), read=lambda: read_squad_json(path), data_dir=data_dir)


class QaJsonl(_RecordBuilder):
    """A JSON-lines file of questions or prompts (see `records.read_qa_jsonl`).

    Args:
        path: The file, plain or .gz.
        data_dir: Where prepared copies are kept.
    """

    def __init__(self, *, path: Path, data_dir: Path) -> None:
        super().__init__(files=(path,), read=lambda: read_qa_jsonl(path), data_dir=data_dir)
