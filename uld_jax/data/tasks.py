"""Where examples come from: shipped or published questions, files, TFDS, Hugging Face."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_jax.data.answers import answer_id, kind_of, open_answers
from uld_jax.data.catalogue import CATALOGUE
from uld_jax.data.hugging_face import read_hugging_face
from uld_jax.data.records import SPLITS, Example
from uld_jax.data.shards import read_manifest
from uld_jax.errors import UserError
from uld_jax.files import locate

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

__all__ = ["Example", "load_examples"]

BUILTIN_DIRECTORY = Path(__file__).parent / "builtin_qa"
SCHEMES = (
    "builtin",
    *CATALOGUE,
    "squad_json:PATH",
    "jsonl:PATH",
    "tfds:NAME",
    "hf:ID",
    "generated:DIR",
)
# What a registered data set may call the split that this package calls "eval".
TFDS_EVAL_SPLITS = ("eval", "validation", "test")


def load_examples(
    source: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    may_be_absent: bool = False,
) -> list[Example]:
    """Read one split of a data set; the first call prepares it as ArrayRecord.

    Args:
        source: "builtin" (shipped questions), "squad", "qed", "fairytaleqa", "pubmedqa" or
            "dialogsum" (as published; the first use needs the network, or `manual_dir`),
            "squad_json:PATH" (a SQuAD v1.1 file), "jsonl:PATH" (JSON lines), "tfds:NAME" (a
            registered TFDS data set with SQuAD's features; the first use needs the network),
            "hf:ID" (one of Hugging Face's, see `hugging_face.read_hugging_face`) or
            "generated:DIR" (what `uld-jax generate` has written, every byte verified). Files may
            end in .gz.
        split: "train" or "eval"; of a published data set one of its own as well, where "eval" is
            the one that the paper evaluates on. A file is split by article, title, context or
            prompt, so that no text is in both.
        data_dir: Where prepared copies are kept, one per file content. Default
            $ULD_JAX_CACHE/tfds, else ~/.cache/uld_jax/tfds.
        manual_dir: A folder with the files of a published data set, or with a folder of its name.
        may_be_absent: Whether a split that is not there counts as an empty one.

    Returns:
        The examples, in the order of the file.

    Raises:
        UserError: The source, split, file or a record in it is not as expected.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "qa.jsonl").write_text(json.dumps(
        ...     {"context": "Oslo is in Norway.", "question": "Where is Oslo?", "answer": "Norway"}
        ... ))
        >>> load_examples(f"jsonl:{folder / 'qa.jsonl'}", "train", data_dir=folder)[0].answers
        ('Norway',)
    """
    if split not in SPLITS and source not in CATALOGUE:
        raise UserError(f"split {split!r} of {source}: expected one of {list(SPLITS)}")
    scheme, _, argument = source.partition(":")
    if scheme == "hf" and argument:
        found = read_hugging_face(argument, split)
    elif scheme == "generated" and argument:
        found = _read_generated(os.path.expanduser(argument), split, may_be_absent)
    else:
        manual = Path(manual_dir).expanduser() if manual_dir else None
        found = _read_prepared(_prepare(source, _cache_directory(data_dir), manual), source, split)
    if isinstance(found, list):
        return found
    if may_be_absent:
        return []
    if source in CATALOGUE:
        raise UserError(f"{source}: split {split!r} is not there, expected eval or one of {found}")
    raise UserError(
        f"{source}: split {split!r} is empty, expected at least one example; it has {found}: a "
        "split by group needs two groups, or lines that name their split"
    )


def task_of(source: str) -> str:
    """How the items of a data set are put where nothing else is asked for.

    Args:
        source: See `load_examples`.

    Returns:
        One of `prompts.TASKS`: a published data set's own, that of the questions which a teacher
        has answered, else "qa".

    Example:
        >>> task_of("pubmedqa"), task_of("jsonl:qa.jsonl")
        ('qa_medical', 'qa')
    """
    if source in CATALOGUE:
        return CATALOGUE[source].task
    scheme, _, argument = source.partition(":")
    if scheme != "generated":
        return "qa"
    directory = locate(os.path.expanduser(argument))
    return read_manifest(directory, kind_of("train"))["provenance"].get("task", "qa")


def _read_prepared(
    builder: "tfds.core.DatasetBuilder", source: str, split: str
) -> list[Example] | dict[str, int]:
    """The examples; where there are none, the sizes of the splits that there are."""
    names, read = (split,), _own_example
    if source.startswith("tfds:"):
        names = TFDS_EVAL_SPLITS if split == "eval" else ("train",)
        read = _squad_like_example
    elif source in CATALOGUE and split == "eval":
        names = (CATALOGUE[source].evaluated,)
    found = next((name for name in names if name in builder.info.splits), None)
    if found is None:
        return {name: info.num_examples for name, info in builder.info.splits.items()}
    # TFDS's decorator hides the method's parameters from type checkers.
    records = builder.as_data_source(split=found)  # pyright: ignore[reportCallIssue]
    return [read(record, source) for record in records.__getitems__(range(len(records)))]


def _read_generated(directory: str, split: str, may_be_absent: bool) -> list[Example]:
    """A teacher's answers, each an example; of several to a question each has its own id."""
    import tensorflow_datasets as tfds

    local, manifest = open_answers(directory)
    if split != manifest["split"]:
        if may_be_absent:
            return []
        raise UserError(
            f"generated:{directory}: split {split!r} is not there, expected the answers' own, "
            f"{manifest['split']!r}: for evaluation name the data set that was answered, "
            "--config.data.eval_source=…"
        )
    builder = tfds.builder_from_directory(local)
    # TFDS's decorator hides the method's parameters from type checkers.
    records = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    examples = []
    for record in records.__getitems__(range(len(records))):
        own = _own_example(record, directory)
        number = answer_id(own.id, int(record.get("sample", 0)), manifest["samples"])
        examples.append(dataclasses.replace(own, id=number))
    return examples


def _cache_directory(data_dir: str | Path | None) -> Path:
    if data_dir is not None:
        return Path(data_dir).expanduser()
    root = os.environ.get("ULD_JAX_CACHE") or Path.home() / ".cache" / "uld_jax"
    return Path(root) / "tfds"


def _builder_maker(
    source: str, directory: Path, manual_dir: Path | None
) -> "Callable[[], tfds.core.DatasetBuilder]":
    # Half a second of imports that `import uld_jax.data` should not cost.
    import tensorflow_datasets as tfds

    from uld_jax.data import builders

    scheme, _, argument = source.partition(":")
    if source == "builtin":
        return lambda: builders.BuiltinQa(directory=BUILTIN_DIRECTORY, data_dir=directory)
    if source in CATALOGUE:
        published = builders.PUBLISHED[source]
        return lambda: published(data_dir=directory, manual_dir=manual_dir)
    if scheme in ("squad_json", "jsonl") and argument:
        path = Path(argument).expanduser()
        if not path.is_file():
            raise UserError(f"{source}: no such file, expected {path.absolute()}: check the path")
        builder = builders.SquadJson if scheme == "squad_json" else builders.QaJsonl
        return lambda: builder(path=path, data_dir=directory)
    if scheme == "tfds" and argument:
        return lambda: tfds.builder(argument, data_dir=directory, file_format="array_record")
    raise UserError(f"data source {source!r}: expected one of {list(SCHEMES)}")


def _prepare(source: str, directory: Path, manual_dir: Path | None) -> "tfds.core.DatasetBuilder":
    """Return a prepared builder.

    TFDS writes into a folder beside the target and renames it when complete, so a killed
    preparation leaves no target. Where several processes share the folder the slower ones
    fail at that rename; what the fastest wrote is the same data.
    """
    from tensorflow_datasets.core import DatasetNotFoundError

    make = _builder_maker(source, directory, manual_dir)
    try:
        builder = make()
    except DatasetNotFoundError as error:
        raise UserError(
            f"{source}: TFDS has no data set of this name: see tfds.list_builders()"
        ) from error
    try:
        # TFDS prints its notices on standard output, which belongs to our commands.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except OSError as error:
        if not builder.data_path.exists():
            raise UserError(f"{source}: could not be prepared in {directory}: {error}") from error
        builder = make()
    return builder


def _decode(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _own_example(record: dict[str, Any], source: str) -> Example:
    del source  # the record was written by our own builder
    kind: Any = _decode(record["kind"])
    return Example(
        id=_decode(record["id"]),
        kind=kind,
        context=_decode(record["context"]),
        question=_decode(record["question"]),
        answers=tuple(_decode(answer) for answer in record["answers"]),
        title=_decode(record["title"]),
    )


def _squad_like_example(record: dict[str, Any], source: str) -> Example:
    for field in ("id", "context", "question", "answers"):
        if field not in record:
            raise UserError(
                f"{source}: feature {field!r} is missing, found {sorted(record)}: only data sets "
                "with SQuAD's features (id, context, question, answers.text) can be read"
            )
    return Example(
        id=_decode(record["id"]),
        kind="qa",
        context=_decode(record["context"]),
        question=_decode(record["question"]),
        answers=tuple(_decode(answer) for answer in record["answers"]["text"]),
        title=_decode(record.get("title", "")),
    )
