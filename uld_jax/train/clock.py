"""Where the time of a training run goes, as this process sees it."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Clock:
    """Adds up seconds by what they were spent on, until they are asked for.

    Args:
        now: Seconds since any moment.

    Example:
        >>> clock = Clock()
        >>> with clock.spent_on("input"):
        ...     batch = list(range(8))
        >>> sorted(clock.lap(steps=2))
        ['device_seconds', 'input_seconds', 'seconds']
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._spent: dict[str, float] = {}
        self._since = now()

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Counts what happens inside.

        Args:
            what: A name.
        """
        before = self._now()
        try:
            yield
        finally:
            self._spent[what] = self._spent.get(what, 0.0) + self._now() - before

    def lap(self, steps: int) -> dict[str, float]:
        """The times of the steps since the last call, each a mean over them.

        Args:
            steps: How many there were.

        Returns:
            "seconds" of a step, those spent on each thing as "…_seconds", and the rest, in which
            the process waited for its devices, as "device_seconds".
        """
        now = self._now()
        times = {"seconds": now - self._since, "device_seconds": now - self._since}
        for what, seconds in self._spent.items():
            times[f"{what}_seconds"] = seconds
            times["device_seconds"] -= seconds
        self._spent, self._since = dict.fromkeys(self._spent, 0.0), now
        return {name: seconds / max(1, steps) for name, seconds in times.items()}
