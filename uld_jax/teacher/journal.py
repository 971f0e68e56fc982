"""What a server has answered so far: a file of signals that a killed run goes on from."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uld_jax.journal import Journal
from uld_jax.teacher.echo import ServedSignal, ServedText


class SignalJournal:
    """Signals in a `Journal`; may be used from several threads, not from several processes.

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
        >>> with SignalJournal(path, {"model": "m"}) as journal:
        ...     journal.add(text, ServedSignal("q1", probs, tails))
        >>> with SignalJournal(path, {"model": "m"}) as journal:
        ...     journal.signal(text).tail_mass
        array([0.125], dtype=float32)
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any], *, kept: Callable[[], None] = lambda: None
    ) -> None:
        self._journal = Journal(path, about, what="signals", kept=kept)

    def __enter__(self) -> "SignalJournal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()

    def has(self, text: ServedText) -> bool:
        """Whether there is a signal for a text.

        Args:
            text: The text.

        Returns:
            True, or False where it is still to be asked for.

        Raises:
            UserError: There is one for its id, but for another text.
        """
        return self._journal.has(text.id, _digest(text))

    def signal(self, text: ServedText) -> ServedSignal:
        """Reads a signal.

        Args:
            text: One that `has` is true of.

        Returns:
            What `add` was given, bit for bit.
        """
        record = self._journal.read(text.id)
        tails = _array(record["tail_mass"])
        return ServedSignal(text.id, _array(record["probs_sorted"]).reshape(len(tails), -1), tails)

    def add(self, text: ServedText, result: ServedSignal | str) -> None:
        """Appends a signal, or the reason why there is none; the latter is asked for again.

        Args:
            text: What it is of.
            result: The signal or the reason.
        """
        record = {"failed": result} if isinstance(result, str) else _record(result)
        self._journal.add({text.id: record}, {text.id: _digest(text)})


def _record(signal: ServedSignal) -> dict[str, str]:
    return {
        "probs_sorted": _base64(signal.probs_sorted),
        "tail_mass": _base64(signal.tail_mass),
    }


def _digest(text: ServedText) -> str:
    # The border between prompt and answer decides which positions count.
    return hashlib.sha256(f"{len(text.prompt)}:{text.text}".encode(errors="replace")).hexdigest()


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _array(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
