"""What a long command has done so far: a file that a killed one goes on from."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from uld_jax.errors import UserError

FORMAT = 2


class Journal:
    """A JSON-lines file of records; each is on the disk before `add` returns.

    The first line says what the records are of. A last line that is not whole, which a kill may
    leave, is dropped. May be used from several threads, not from several processes.

    Args:
        path: Of the file; made where it is absent.
        about: What all records have in common, as JSON values.
        what: What they are, for people: "signals".
        kept: Called after `add`, by one thread at a time: the file may be copied elsewhere.

    Raises:
        UserError: The file is about something else, is damaged, or cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "answers.jsonl"
        >>> with Journal(path, {"model": "m"}, what="answers") as journal:
        ...     journal.add({"q1": {"text": "Norway"}}, {"q1": "3f2a"})
        >>> with Journal(path, {"model": "m"}, what="answers") as journal:
        ...     journal.has("q1", "3f2a"), journal.has("q2", "77b0"), journal.read("q1")["text"]
        (True, False, 'Norway')
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        *,
        what: str,
        kept: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._what, self._kept = path, what, kept
        self._lock = threading.Lock()
        self._lines: dict[str, tuple[int, str]] = {}
        about = {"format": FORMAT, **about}
        end = 0
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: cannot write: {error.strerror}") from error
        try:
            for start, raw, line in _lines(path, about, what):
                end = start + len(raw)
                if start > 0 and "failed" not in line:
                    self._lines[line["id"]] = (start, line["of"])
            self._file.truncate(end)
            if end == 0:
                self._append([about])
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def has(self, key: str, digest: str) -> bool:
        """Whether there is a record.

        Args:
            key: Of the record.
            digest: Checksum of what it is to be of.

        Returns:
            True, or False where there is none, or only notes of failures.

        Raises:
            UserError: There is one under this key, but of something else.
        """
        found = self._lines.get(key)
        if found is not None and found[1] != digest:
            raise UserError(
                f"{self._path}: its {self._what} for {key!r} are of another text: expected the "
                "same data and prompts as before: use another directory, or delete the file"
            )
        return found is not None

    def read(self, key: str) -> dict[str, Any]:
        """Reads a record.

        Args:
            key: One that `has` is true of.

        Returns:
            What `add` was given.
        """
        with self._lock:
            self._file.seek(self._lines[key][0])
            line = json.loads(self._file.readline())
        return {name: value for name, value in line.items() if name not in ("id", "of")}

    def add(
        self, records: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str] | None = None
    ) -> None:
        """Appends records, and waits once until the disk has them.

        Args:
            records: By key, JSON values, not named "id" or "of"; one with "failed" counts as none.
            digests: By key, checksum of what each is of, where `about` does not say it.

        Raises:
            UserError: The disk is full, or will not be written to.
        """
        digests = dict.fromkeys(records, "") if digests is None else digests
        lines = [{"id": key, "of": digests[key], **record} for key, record in records.items()]
        with self._lock:
            starts = self._append(lines)
            for line, start in zip(lines, starts, strict=True):
                if "failed" not in line:
                    self._lines[line["id"]] = (start, line["of"])
            self._kept()

    def _append(self, lines: list[Any]) -> list[int]:
        start = self._file.seek(0, os.SEEK_END)
        starts = []
        try:
            for line in lines:
                starts.append(start)
                start += self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from error
        return starts


def read_journal(path: Path, about: Mapping[str, Any], *, what: str) -> dict[str, dict[str, Any]]:
    """All records of a file that no process is writing.

    Args:
        path: Of the file.
        about: What all records have in common.
        what: What they are, for people.

    Returns:
        Record by key.

    Raises:
        UserError: The file is about something else, or is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "answers.jsonl"
        >>> with Journal(path, {}, what="answers") as journal:
        ...     journal.add({"q1": {"text": "Norway"}}, {"q1": "3f2a"})
        >>> read_journal(path, {}, what="answers")
        {'q1': {'text': 'Norway'}}
    """
    records = {}
    for start, _, line in _lines(path, {"format": FORMAT, **about}, what):
        if start > 0 and "failed" not in line:
            del line["of"]
            records[line.pop("id")] = line
    return records


def _lines(
    path: Path, about: Mapping[str, Any], what: str
) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Where each whole line begins, its bytes, and what it says."""
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
                if number > 1:
                    _ = line["id"], line["of"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: not a line of a journal of {what}: delete the file to ask "
                    "for all of them again"
                ) from error
            if number == 1 and line != about:
                raise UserError(
                    f"{path}: holds {what} of {line}, expected {about}: use another directory, or "
                    "delete the file"
                )
            yield start, raw, line
            start += len(raw)
