"""Data sets by their Hugging Face id, read by the optional package `datasets`."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from uld_jax.data.json_files import describe
from uld_jax.data.records import Example
from uld_jax.errors import UserError

# Column of each field, which a source may set; a dot leads into a column that is an object.
COLUMNS = {
    "id": "id",
    "context": "context",
    "question": "question",
    "answers": "answers",
    "title": "title",
}
MAY_BE_MISSING = ("id", "context", "title")
OPTIONS = (*COLUMNS, "config", "revision", "train", "eval")
# What such a data set may call the split that this package calls "eval".
EVAL_SPLITS = ("eval", "validation", "test", "dev")


def read_hugging_face(argument: str, split: str) -> list[Example] | dict[str, int]:
    """Read one split of a data set on the Hugging Face hub, or in a local folder.

    Args:
        argument: ID, or ID?OPTION=VALUE&…: `config` and `revision` of the data set, `train` and
            `eval` to name its splits, and `id`, `context`, `question`, `answers` or `title` to
            name a column, such as answers=output.text. Without them its columns are SQuAD's.
            Answers may be a text, a list of texts, or an object with the list `text`.
        split: "train" or "eval".

    Returns:
        The examples; where there is no such split, the number of examples of those that there are.

    Raises:
        UserError: The package is absent, or the data set, an option or a column is.
    """
    name, _, query = argument.partition("?")
    options = _options(argument, query)
    found = _load(name, options)
    names = (options[split],) if split in options else (split, *EVAL_SPLITS)
    if split == "train":
        names = names[:1]
    chosen = next((own for own in names if own in found), None)
    if chosen is None:
        return {own: len(rows) for own, rows in found.items()}
    columns = {field: options.get(field, column) for field, column in COLUMNS.items()}
    return [
        _example(row, f"hf:{name}: {chosen}[{number}]", columns, f"{chosen}-{number}")
        for number, row in enumerate(found[chosen])
    ]


def _options(argument: str, query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    wrong = [name for name, value in options.items() if name not in OPTIONS or not value]
    if wrong or bool(query) != bool(options):
        raise UserError(
            f"hf:{argument}: expected hf:ID?OPTION=VALUE&… with options of {list(OPTIONS)}, got "
            f"{query}"
        )
    return options


def _load(name: str, options: Mapping[str, str]) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"hf:{name}: expected the package `datasets`, which is not installed: "
            "pip install 'uld-jax[datasets]'"
        ) from error
    try:
        return datasets.load_dataset(name, options.get("config"), revision=options.get("revision"))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"hf:{name}: expected a data set that Hugging Face's `datasets` can load, which "
            f"failed ({reason}); check the id, the network, and whether it needs "
            "?config=NAME"
        ) from error


def _example(
    row: Mapping[str, Any], where: str, columns: Mapping[str, str], number: str
) -> Example:
    values = {field: _column(row, column) for field, column in columns.items()}
    missing = [f for f, value in values.items() if value is None and f not in MAY_BE_MISSING]
    if missing:
        raise UserError(
            f"{where}: no column for {missing}, found {sorted(row)}: name the column in the "
            f"source, as in hf:ID?{missing[0]}=COLUMN"
        )
    texts = {field: values[field] for field in ("context", "question", "title")}
    wrong = [field for field, text in texts.items() if not isinstance(text, str | None)]
    if wrong:
        raise UserError(
            f"{where}: column {columns[wrong[0]]!r} must be a string, got "
            f"{type(texts[wrong[0]]).__name__}: name another with ?{wrong[0]}=COLUMN"
        )
    return Example(
        id=number if values["id"] is None else str(values["id"]),
        kind="qa",
        context=texts["context"] or "",
        question=texts["question"] or "",
        answers=_answers(values["answers"], where, columns["answers"]),
        title=texts["title"] or "",
    )


def _column(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def _answers(value: Any, where: str, column: str) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise UserError(
            f"{where}: column {column!r} must be a text or a list of texts with at least one, got "
            f"{describe(value)}"
        )
    return tuple(value)
