"""What a server has answered so far: a file that a killed run goes on from."""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uld_jax.errors import UserError
from uld_jax.teacher.echo import ServedSignal, ServedText

FORMAT = 1


class Journal:
    """A JSON-lines file of signals; each line is on the disk before `add` returns.

    The first line says what the signals are of. A last line that is not whole, which a kill may
    leave, is dropped. May be used from several threads, not from several processes.

    Args:
        path: Of the file; made where it is absent.
        about: What all signals have in common, as JSON values.
        kept: Called after each line, by one thread at a time.

    Raises:
        UserError: The file is about something else, or is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "signals.jsonl"
        >>> text = ServedText("q1", "Where is Oslo?", " Norway")
        >>> probs, tails = np.array([[0.75, 0.125]], np.float32), np.array([0.125], np.float32)
        >>> with Journal(path, {"model": "m"}) as journal:
        ...     journal.add(text, ServedSignal("q1", probs, tails))
        >>> with Journal(path, {"model": "m"}) as journal:
        ...     journal.signal(text).tail_mass
        array([0.125], dtype=float32)
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any], *, kept: Callable[[], None] = lambda: None
    ) -> None:
        self._path, self._kept = path, kept
        self._lock = threading.Lock()
        self._lines: dict[str, tuple[int, str]] = {}
        self._file = path.open("a+b")
        try:
            self._read({"format": FORMAT, **about})
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

    def has(self, text: ServedText) -> bool:
        """Whether there is a signal for a text.

        Args:
            text: The text.

        Returns:
            True, or False where it is still to be asked for.

        Raises:
            UserError: There is one for its id, but for another text.
        """
        found = self._lines.get(text.id)
        if found is not None and found[1] != _digest(text):
            raise UserError(
                f"{self._path}: example {text.id!r} has a signal for another text: expected the "
                "same data and prompts as before: use another directory, or delete the file"
            )
        return found is not None

    def signal(self, text: ServedText) -> ServedSignal:
        """Reads a signal.

        Args:
            text: One that `has` is true of.

        Returns:
            What `add` was given, bit for bit.
        """
        with self._lock:
            self._file.seek(self._lines[text.id][0])
            line = json.loads(self._file.readline())
        tails = _array(line["tail_mass"])
        return ServedSignal(text.id, _array(line["probs_sorted"]).reshape(len(tails), -1), tails)

    def add(self, text: ServedText, result: ServedSignal | str) -> None:
        """Appends a signal, or the reason why there is none; the latter is asked for again.

        Args:
            text: What it is of.
            result: The signal or the reason.
        """
        line: dict[str, Any] = {"id": text.id, "text": _digest(text)}
        if isinstance(result, str):
            line["failed"] = result
        else:
            line["probs_sorted"] = _base64(result.probs_sorted)
            line["tail_mass"] = _base64(result.tail_mass)
        with self._lock:
            start = self._append(line)
            if not isinstance(result, str):
                self._lines[text.id] = (start, line["text"])
            self._kept()

    def _append(self, line: Mapping[str, Any]) -> int:
        start = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from error
        return start

    def _read(self, about: dict[str, Any]) -> None:
        self._file.seek(0)
        start = number = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            number += 1
            try:
                line = json.loads(raw)
                if number > 1 and "failed" not in line:
                    self._lines[line["id"]] = (start, line["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}:{number}: not a line of a journal of signals: delete the file "
                    "to ask for all of them again"
                ) from error
            if number == 1 and line != about:
                raise UserError(
                    f"{self._path}: holds signals of {line}, expected {about}: use another "
                    "directory, or delete the file"
                )
            start += len(raw)
        self._file.truncate(start)
        if number == 0:
            self._append(about)


def _digest(text: ServedText) -> str:
    # The border between prompt and answer decides which positions count.
    return hashlib.sha256(f"{len(text.prompt)}:{text.text}".encode(errors="replace")).hexdigest()


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _array(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
