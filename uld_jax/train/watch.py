"""What a run leaves for those who watch it: metrics, a heartbeat, traces of chosen steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from uld_jax.files import AnyPath, write_json
from uld_jax.mirror import Mirror
from uld_jax.processes import is_first
from uld_jax.train.metrics import MetricsWriter


class Reporter:
    """Writes the metrics and a heartbeat, in the first process, and shows progress in all.

    heartbeat.json has the last step, the number of steps, the seconds of a step and the time: a run
    whose file is older than a few steps has stopped.

    Args:
        workdir: The run's directory.
        first: The step that the run starts from.
        steps: How many it has.
        progress: Called with a step, the number of steps and the step's metrics.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> workdir = Path(tempfile.mkdtemp())
        >>> with Reporter(workdir, first=0, steps=9) as reporter:
        ...     reporter.report([{"step": 1, "total": 2.5, "seconds": 0.5}])
        >>> sorted(path.name for path in workdir.iterdir())
        ['heartbeat.json', 'metrics.jsonl', 'tensorboard']
    """

    def __init__(
        self,
        workdir: AnyPath,
        *,
        first: int,
        steps: int,
        progress: Callable[[int, int, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._steps, self._progress = steps, progress
        self._writer = MetricsWriter(workdir, step=first) if is_first() else None

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*exception)

    def report(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the metrics of steps that have ended.

        Args:
            rows: One a step, with its "step" and "seconds".
        """
        for row in rows:
            if self._writer is not None:
                self._writer.write(row)
            if self._progress is not None:
                self._progress(row["step"], self._steps, row)
        if rows and self._writer is not None:
            last = {name: rows[-1][name] for name in ("step", "seconds")}
            mirror = self._writer.mirror
            beat = {**last, "steps": self._steps, "time": round(time.time(), 3)}
            write_json(mirror.local / "heartbeat.json", beat)
            mirror.push_when_due()

    def flush(self) -> None:
        """Puts all of it in its place."""
        if self._writer is not None:
            self._writer.flush()


class Tracer:
    """Records some steps with jax.profiler, for TensorBoard's profile page or Perfetto.

    Args:
        directory: Where traces go; every process writes its own there.
        first: The first step to record; 0 for none.
        steps: How many.

    Example:
        >>> from pathlib import Path
        >>> tracer = Tracer(Path("/nowhere"), 0, 1)
        >>> tracer.before(1)
        >>> tracer.after(1, None)
    """

    def __init__(self, directory: AnyPath, first: int, steps: int) -> None:
        self._directory, self._first, self._last = directory, first, first + steps - 1
        self._mirror: Mirror | None = None

    def before(self, step: int) -> None:
        """Starts, if it is time.

        Args:
            step: About to be taken.
        """
        if self._first and step == self._first:
            self._mirror = Mirror(self._directory)
            jax.profiler.start_trace(str(self._mirror.local))

    def after(self, step: int, results: object, *, last: bool = False) -> None:
        """Stops, if it is time.

        Args:
            step: Taken.
            results: Arrays that are there when the step has ended.
            last: Whether there are no more.
        """
        if self._mirror is not None and (last or step >= self._last):
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._mirror.close()
            self._mirror = None
