"""TFDS builders: each file's content is prepared once as ArrayRecord, without TensorFlow."""

import dataclasses
import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from uld_jax.data import catalogue
from uld_jax.data.catalogue import DataSet, expected_names, find_files
from uld_jax.data.records import Example, read_builtin, read_qa_jsonl, read_squad_json
from uld_jax.errors import UserError
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


class _ExampleBuilder(tfds.core.GeneratorBasedBuilder):
    """Shared part: writes one record an example, in the given order."""

    VERSION = tfds.core.Version("1.0.0")

    def _generate_examples(self, examples: list[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, example in enumerate(examples):
            yield number, {**dataclasses.asdict(example), "answers": list(example.answers)}


class _RecordBuilder(_ExampleBuilder):
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
        super().__init__(file_format="array_record", data_dir=data_dir / _digest(files))

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


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


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


class PublishedBuilder(_ExampleBuilder):
    """Shared part: downloads `DATA_SET` or finds its files in a folder, and reads its splits.

    Of files in a folder the copy lies in data_dir/(sha256 of the files)/, as of other files. TFDS
    compares what it downloads with checksums.tsv beside this module, where an URL is in it.

    Args:
        data_dir: Where prepared copies are kept.
        manual_dir: A folder with the files (see `catalogue.find_files`); None downloads them.
    """

    DATA_SET: DataSet

    def __init__(self, *, data_dir: Path, manual_dir: Path | None = None) -> None:
        self._files: dict[str, list[Path]] | None = None
        if manual_dir is not None:
            self._files = find_files(self.DATA_SET, manual_dir)
            data_dir = data_dir / _digest(path for paths in self._files.values() for path in paths)
        super().__init__(file_format="array_record", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        about = self.DATA_SET
        return tfds.core.DatasetInfo(
            builder=self,
            description=about.description,
            citation=about.citation,
            homepage=about.homepage,
            license=about.licence,
            features=record_features(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            files = self._files or self._download(dl_manager, Path(scratch))
            splits = self.DATA_SET.read(files)
        return {split: self._generate_examples(found) for split, found in splits.items()}

    def _download(
        self, dl_manager: tfds.download.DownloadManager, scratch: Path
    ) -> dict[str, list[Path]]:
        about = self.DATA_SET
        try:
            found = dl_manager.download(dict(about.urls))
            archives = [path for path in found.values() if zipfile.is_zipfile(path)]
            for path in archives:
                # TFDS unpacks with TensorFlow alone.
                zipfile.ZipFile(path).extractall(scratch)
        except (
            OSError,
            tfds.download.DownloadError,
            NonMatchingChecksumError,
            zipfile.BadZipFile,
        ) as error:
            urls = ", ".join(about.urls.values())
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"data.source={about.name}: expected to download {urls}, which failed ({reason}); "
                f"get the files otherwise, put them into a folder as {expected_names(about)}, and "
                "set --config.data.manual_dir=FOLDER"
            ) from error
        if archives:
            return find_files(about, scratch)
        return {part: [Path(path)] for part, path in found.items()}


class SquadV1(PublishedBuilder):
    """SQuAD v1.1, splits train and validation."""

    VERSION = tfds.core.Version(catalogue.SQUAD.version)
    DATA_SET = catalogue.SQUAD


class Qed(PublishedBuilder):
    """QED, splits train and validation."""

    VERSION = tfds.core.Version(catalogue.QED.version)
    DATA_SET = catalogue.QED


class FairytaleQa(PublishedBuilder):
    """FairytaleQA, splits train, validation and test."""

    VERSION = tfds.core.Version(catalogue.FAIRYTALEQA.version)
    DATA_SET = catalogue.FAIRYTALEQA


class PubmedQa(PublishedBuilder):
    """PubMedQA's labelled questions, splits train and test."""

    VERSION = tfds.core.Version(catalogue.PUBMEDQA.version)
    DATA_SET = catalogue.PUBMEDQA


class DialogSum(PublishedBuilder):
    """DIALOGSum, splits train, validation and test."""

    VERSION = tfds.core.Version(catalogue.DIALOGSUM.version)
    DATA_SET = catalogue.DIALOGSUM


PUBLISHED = {
    builder.DATA_SET.name: builder for builder in (SquadV1, Qed, FairytaleQa, PubmedQa, DialogSum)
}
