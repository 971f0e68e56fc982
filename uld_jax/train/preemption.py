"""Requests to stop: SIGTERM, or a notice that a machine will be taken away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Listens for SIGTERM, which then no longer ends this process.

    Of several processes jax has the first notice to any reach all, and has them agree on a step.

    Yields:
        Whether to stop after a step, by its number; all processes ask after every step.

    Example:
        >>> with stop_requests() as stop_requested:
        ...     stop_requested(1)
        False
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may listen
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
