"""Where examples come from: shipped questions, files by path, or a registered TFDS data set."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_jax.data.answers import answer_id, open_answers
from uld_jax.data.records import SPLITS, Example
from uld_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

__all__ = ["Example", "load_examples"]

BUILTIN_DIRECTORY = Path(__file__).parent / "builtin_qa"
SCHEMES = ("builtin", "squad_json:PATH", "jsonl:PATH", "tfds:NAME", "generated:DIR")
# What a registered data set may call the split that this package calls "eval".
TFDS_EVAL_SPLITS = ("eval", "validation", "test")


def load_examples(source: str, split: str, *, data_dir: str | Path | None = None) -> list[Example]:
    """Read one split of a data set; the first call prepares it as ArrayRecord.

    Args:
        source: "builtin" (shipped questions), "squad_json:PATH" (a SQuAD v1.1 file),
            "jsonl:PATH" (JSON lines), "tfds:NAME" (a registered TFDS data set with SQuAD's
            features; the first use needs the network) or "generated:DIR" (what `uld-jax
            generate` has written, every byte verified). Files may end in .gz.
        split: "train" or "eval". A file is split by article, title, context or prompt, so
            that no text is in both.
        data_dir: Where prepared copies are kept, one per file content. Default
            $ULD_JAX_CACHE/tfds, else ~/.cache/uld_jax/tfds.

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
    if split not in SPLITS:
        raise UserError(f"split {split!r} of {source}: expected one of {list(SPLITS)}")
    scheme, _, argument = source.partition(":")
    if scheme == "generated" and argument:
        return _read_generated(os.path.expanduser(argument), split)
    builder = _prepare(source, _cache_directory(data_dir))
    if source.startswith("tfds:"):
        names = TFDS_EVAL_SPLITS if split == "eval" else ("train",)
        read = _squad_like_example
    else:
        names, read = (split,), _own_example
    found = next((name for name in names if name in builder.info.splits), None)
    if found is None:
        sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
        raise UserError(
            f"{source}: split {split!r} is empty, expected at least one example; "
            f"it has {sizes}: a split by group needs two groups, or lines that name their split"
        )
    # TFDS's decorator hides the method's parameters from type checkers.
    records = builder.as_data_source(split=found)  # pyright: ignore[reportCallIssue]
    return [read(record, source) for record in records.__getitems__(range(len(records)))]


def _read_generated(directory: str, split: str) -> list[Example]:
    """A teacher's answers, each an example; of several to a question each has its own id."""
    import tensorflow_datasets as tfds

    local, manifest = open_answers(directory)
    if split != manifest["split"]:
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


def _builder_maker(source: str, directory: Path) -> "Callable[[], tfds.core.DatasetBuilder]":
    # Half a second of imports that `import uld_jax.data` should not cost.
    import tensorflow_datasets as tfds

    from uld_jax.data import builders

    scheme, _, argument = source.partition(":")
    if source == "builtin":
        return lambda: builders.BuiltinQa(directory=BUILTIN_DIRECTORY, data_dir=directory)
    if scheme in ("squad_json", "jsonl") and argument:
        path = Path(argument).expanduser()
        if not path.is_file():
            raise UserError(f"{source}: no such file, expected {path.absolute()}: check the path")
        builder = builders.SquadJson if scheme == "squad_json" else builders.QaJsonl
        return lambda: builder(path=path, data_dir=directory)
    if scheme == "tfds" and argument:
        return lambda: tfds.builder(argument, data_dir=directory, file_format="array_record")
    raise UserError(f"data source {source!r}: expected one of {list(SCHEMES)}")


def _prepare(source: str, directory: Path) -> "tfds.core.DatasetBuilder":
    """Return a prepared builder.

    TFDS writes into a folder beside the target and renames it when complete, so a killed
    preparation leaves no target. Where several processes share the folder the slower ones
    fail at that rename; what the fastest wrote is the same data.
    """
    from tensorflow_datasets.core import DatasetNotFoundError

    make = _builder_maker(source, directory)
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
    return Example(
        id=_decode(record["id"]),
        kind="completion" if _decode(record["kind"]) == "completion" else "qa",
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
