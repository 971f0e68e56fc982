"""Checkpoints of student, optimizer, key and data iterator: asynchronous, atomic, verified."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from uld_jax.errors import UserError
from uld_jax.train.state import TrainState, param_shardings

# What orbax and tensorstore raise for files that are missing, cut short or not what they say.
BROKEN = (ValueError, OSError, KeyError, TypeError, json.JSONDecodeError)

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: Where they lie.
        keep: How many of the newest stay.

    Example:
        >>> import tempfile
        >>> with Checkpoints(Path(tempfile.mkdtemp()), keep=2) as checkpoints:
        ...     checkpoints.steps()
        []
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, state: TrainState, iterator_state: dict[str, Any]) -> None:
        """Starts writing the state; returns as soon as it is copied off the devices.

        Args:
            state: The training state.
            iterator_state: The data iterator's, JSON-able.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "key": state.key}),
            data=ocp.args.JsonSave(iterator_state),
        )
        self._manager.save(int(state.step), args=args)

    def restore(
        self, state: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that reads back whole; broken ones are reported and removed.

        Args:
            state: A state, or its shapes, of the structure to restore.
            shardings: Where its arrays go.

        Returns:
            The state and the data iterator's state, or None where there is no checkpoint.
        """
        abstract = _abstract(state, shardings)
        rest = {"opt_state": abstract.opt_state, "key": abstract.key}
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(rest),
            data=ocp.args.JsonRestore(),
        )
        found = self._newest(args, remove_broken=True)
        if found is None:
            return None
        step, saved = found
        where = shardings.step
        return (
            TrainState(
                step=jax.device_put(jnp.int32(step), where),
                params=saved["params"],
                opt_state=saved["optimizer"]["opt_state"],
                key=saved["optimizer"]["key"],
            ),
            saved["data"],
        )

    def restore_params(self, params: nnx.State, shardings: nnx.State) -> nnx.State | None:
        """The newest whole checkpoint's student parameters, without the optimizer.

        Args:
            params: Parameters, or their shapes.
            shardings: Where they go.

        Returns:
            The parameters, or None where there is no checkpoint.
        """
        target = ocp.args.StandardRestore(_abstract(params, shardings))
        found = self._newest(ocp.args.Composite(params=target), remove_broken=False)
        return None if found is None else found[1]["params"]

    def _newest(self, args: ocp.args.Composite, *, remove_broken: bool) -> tuple[int, Any] | None:
        for step in self.steps():
            try:
                return step, self._manager.restore(step, args=args)
            except BROKEN as error:
                reason = str(error).strip().splitlines()[0][:200]
                log.warning(
                    "checkpoint %s is damaged (%s): falling back to the one before",
                    self.directory / str(step),
                    reason,
                )
                if remove_broken:
                    self._manager.delete(step)
        return None


def restore_params(directory: Path, params: nnx.State, mesh: Mesh) -> nnx.State:
    """The student's parameters in a run's newest checkpoint.

    Args:
        directory: The run's checkpoints.
        params: Parameters, or their shapes, of the structure to restore.
        mesh: Where they go.

    Returns:
        The parameters.

    Raises:
        UserError: There is no checkpoint that can be read.
    """
    found = None
    if directory.is_dir():
        with Checkpoints(directory, keep=1) as checkpoints:
            found = checkpoints.restore_params(params, param_shardings(params, mesh))
    if found is None:
        raise UserError(f"{directory}: no checkpoint that can be read; has the run begun to train?")
    return found


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
