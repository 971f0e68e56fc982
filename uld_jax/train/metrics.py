"""Metrics on disk: one JSON line a step, and TensorBoard events."""

import json
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]  made when the module is imported
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.proto.summary_pb2 import (
    Summary,  # pyright: ignore[reportAttributeAccessIssue]
)

from uld_jax.files import AnyPath, write_text
from uld_jax.mirror import Mirror

METRICS = "metrics.jsonl"
# Of the machine, not of the run: two equal runs do not have these in common.
MEASURED = (
    "seconds",
    "input_seconds",
    "host_seconds",
    "sampling_seconds",
    "teacher_seconds",
    "device_seconds",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
)


class MetricsWriter:
    """Writes every step's scalars to metrics.jsonl and TensorBoard.

    A resumed run first drops what was written after the checkpoint it resumes from, so the file
    reads as if the run had never stopped.

    Args:
        workdir: The run's directory.
        step: The step the run starts from.

    Attributes:
        mirror: Of the workdir, for other files that change while the run goes on.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> workdir = Path(tempfile.mkdtemp())
        >>> with MetricsWriter(workdir, step=0) as writer:
        ...     writer.write({"step": 1, "loss": 2.5})
        >>> read_metrics(workdir)
        [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, workdir: AnyPath, *, step: int) -> None:
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        self.mirror = Mirror(workdir)
        path = self.mirror.local / METRICS
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        folder = self.mirror.local / "tensorboard"
        folder.mkdir(exist_ok=True)
        # SummaryWriter writes in a thread of its own: where that fails, as on a full disk, the
        # next calls wait for it forever. The suffix tells apart files of the same second.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        with self.mirror:
            self._file.close()
            self._events.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one step.

        Args:
            row: "step" and its scalars.
        """
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._write_scalar(f"train/{name}", value, row["step"])

    def flush(self) -> None:
        """Puts all of it in its place: before a checkpoint, which will not write it again."""
        self._events.flush()
        self.mirror.push()

    def write_scores(self, scores: Mapping[str, float], *, step: int) -> None:
        """Adds evaluation scores to the TensorBoard events.

        Args:
            scores: Metric name to value.
            step: The optimizer step they belong to.
        """
        for name, value in scores.items():
            self._write_scalar(f"eval/{name}", value, step)

    def _write_scalar(self, tag: str, value: float, step: int) -> None:
        self._write_event(step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(step=step, wall_time=time.time(), **content))


def read_metrics(workdir: AnyPath) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out.

    Args:
        workdir: The run's directory.

    Returns:
        One dict a step, in order; empty where there is no file.

    Example:
        >>> from pathlib import Path
        >>> read_metrics(Path("/nowhere"))
        []
    """
    path = workdir / METRICS
    if not path.is_file():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]
