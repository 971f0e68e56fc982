"""Several processes that run the same program: who writes, what all know, when all go on."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to people."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Goes on when every process has come here.

    Args:
        where: A name, the same in all of them.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"uld-jax: {where}")


def agreed(value: bool) -> bool:
    """What the first process says, for what a file system may show them differently.

    Args:
        value: This process's view.

    Returns:
        The first one's.

    Example:
        >>> agreed(True)
        True
    """
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def differing(digest: str) -> list[int]:
    """The processes that have something else than the first one.

    Args:
        digest: Of what this process has, in hexadecimal digits; every process calls this.

    Returns:
        Their numbers.

    Example:
        >>> differing("e3b0")
        []
    """
    if jax.process_count() == 1:
        return []
    own = np.frombuffer(bytes.fromhex(digest), np.uint8)
    everyone = multihost_utils.process_allgather(own)
    return np.flatnonzero((everyone != everyone[0]).any(-1)).tolist()


def fetch(tree: Any) -> Any:
    """Whole arrays on the host of every process, wherever their shards lie.

    Args:
        tree: Of global arrays; every process calls this with the same ones.

    Returns:
        As many numpy arrays.

    Example:
        >>> fetch({"count": jax.numpy.ones(2)})["count"].tolist()
        [1.0, 1.0]
    """
    if all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def is_lost_process(error: Exception) -> bool:
    """Whether an error is what is heard where another process has gone.

    Args:
        error: Of a collective, or of a barrier.

    Returns:
        Whether it is.

    Example:
        >>> is_lost_process(RuntimeError("Connection closed by peer"))  # but there is no other
        False
    """
    text = str(error).lower()
    signs = ("gloo", "connection closed", "barrier", "heartbeat", "coordination", "unavailable")
    return jax.process_count() > 1 and any(sign in text for sign in signs)
