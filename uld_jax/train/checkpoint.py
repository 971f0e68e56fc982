"""Checkpoints of student, optimizer, key and data iterator: asynchronous, atomic, verified."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from uld_jax import buckets
from uld_jax.errors import UserError
from uld_jax.files import AnyPath, absolute, files_below, sha256_of, write_text
from uld_jax.processes import agreed, is_first, is_lost_process
from uld_jax.train.staging import Stage
from uld_jax.train.state import TrainState, param_shardings, split_projections

# In each checkpoint, written when all the rest is on the disk; `sha256sum -c` reads it.
DIGESTS = "SHA256SUMS"

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    orbax compresses without checksums, so a damaged file may read back as other numbers. Each
    checkpoint therefore carries the digests of its files, and is used only where they agree.

    Args:
        directory: Where they lie.
        keep: How many of the newest stay; None opens them for reading only.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with Checkpoints(Path(tempfile.mkdtemp()), keep=2) as checkpoints:
        ...     checkpoints.steps()
        []
    """

    def __init__(self, directory: AnyPath, *, keep: int | None) -> None:
        self.directory = directory
        self._saving = 0
        self._stage = Stage(directory, keep=keep, seal=DIGESTS)
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._stage.keep,
                create=True,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._seal,
                    barrier_sync_fn=_barrier_of_the_unharmed(),
                ),
            )
        self._manager = ocp.CheckpointManager(absolute(self._stage.local), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            with self._writing():
                self._manager.close()
        finally:
            self._stage.close()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, newest first."""
        return sorted({*self._manager.all_steps(), *self._stage.steps()}, reverse=True)

    def save(self, state: TrainState, iterator_state: dict[str, Any]) -> None:
        """Starts writing the state; returns as soon as it is copied off the devices.

        Args:
            state: The training state.
            iterator_state: The data iterator's, JSON-able.

        Raises:
            UserError: This checkpoint, or the one before, could not be written.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(split_projections(state.params)[0]),
            optimizer=ocp.args.StandardSave(_beside_the_student(state)),
            data=ocp.args.JsonSave(iterator_state),
        )
        step = int(state.step)
        with self._writing():
            # Only then is the checkpoint before sealed under its own number.
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=args)

    def restore(
        self, state: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole; damaged ones are reported and removed.

        Args:
            state: A state, or its shapes, of the structure to restore.
            shardings: Where its arrays go.

        Returns:
            The state and the data iterator's state, or None where there is no whole checkpoint.

        Raises:
            UserError: The checkpoint is whole but of another model or optimizer.
        """
        abstract = _abstract(state, shardings)
        student, _ = split_projections(abstract.params)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(student),
            optimizer=ocp.args.StandardRestore(_beside_the_student(abstract)),
            data=ocp.args.JsonRestore(),
        )
        had_any = bool(self.steps())
        found = self._newest(args, student, remove_damaged=True)
        if found is None:
            if had_any:
                log.warning("no whole checkpoint is left: starting again from the beginning")
            return None
        step, saved = found
        optimizer, where = saved["optimizer"], shardings.step
        projections = optimizer.get("projections", nnx.State({}))
        return (
            TrainState(
                step=jax.device_put(jnp.int32(step), where),
                params=nnx.merge_state(saved["params"], projections),
                opt_state=optimizer["opt_state"],
                key=optimizer["key"],
            ),
            saved["data"],
        )

    def restore_params(self, params: nnx.State, shardings: nnx.State) -> nnx.State | None:
        """The newest whole checkpoint's student parameters, without the optimizer.

        Args:
            params: Parameters, or their shapes.
            shardings: Where they go.

        Returns:
            The parameters, or None where there is no whole checkpoint.

        Raises:
            UserError: The checkpoint is whole but of another model.
        """
        target = ocp.args.StandardRestore(_abstract(params, shardings))
        args = ocp.args.Composite(params=target)
        found = self._newest(args, params, remove_damaged=False)
        return None if found is None else found[1]["params"]

    def _newest(
        self, args: ocp.args.Composite, params: nnx.State, *, remove_damaged: bool
    ) -> tuple[int, Any] | None:
        steps = self.steps()
        for step, older in zip(steps, [*steps[1:], None], strict=False):
            path = self.directory / str(step)
            copy = self._stage.fetch(step)
            self._manager.reload()
            if not _is_whole(copy):
                instead = "there is none before it" if older is None else f"trying step {older}"
                log.warning("checkpoint %s is damaged or not complete: %s", path, instead)
                if remove_damaged:
                    self._manager.delete(step)
                    self._stage.remove(step)
                continue
            self._check_model(step, params)
            try:
                return step, self._manager.restore(step, args=args)
            except ValueError as error:
                raise UserError(
                    f"checkpoint {path} is of another optimizer ({_reason(error)}): go on with the "
                    "version of this package that wrote it, or choose another --workdir"
                ) from error
        return None

    def _check_model(self, step: int, params: nnx.State) -> None:
        # orbax would say so of one array in the middle of reading the others.
        handler = ocp.StandardCheckpointHandler()
        leaves = jax.tree.leaves(handler.metadata(self._manager.directory / str(step) / "params"))
        stored = {leaf.name: tuple(leaf.shape) for leaf in leaves}
        wanted = {
            ".".join(map(str, (*path, "value"))): tuple(param.shape)
            for path, param in nnx.to_flat_state(params)
        }
        different = sorted(name for name, _ in stored.items() ^ wanted.items())
        if different:
            name = different[0]
            raise UserError(
                f"checkpoint {self.directory / str(step)} is of another model than the student "
                f"({len(set(different))} parameters differ, such as {name}: "
                f"{stored.get(name, 'absent')} there, {wanted.get(name, 'absent')} here): give "
                "student.source the model that the run began with, or choose another --workdir"
            )

    def _seal(self) -> None:
        """Runs in orbax's thread when all is written, before the folder gets its final name."""
        if is_first():
            # On a disk its name has an end yet that is taken away; in a bucket nothing is renamed.
            step = str(self._saving)
            (path,) = (p for p in self._stage.local.iterdir() if p.name.split(".")[0] == step)
            write_text(path / DIGESTS, _digests(path))
            self._stage.push(path, self._saving)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, *buckets.errors()) as error:
            if is_lost_process(error):
                raise
            raise UserError(
                f"{self.directory}: a checkpoint could not be written ({_reason(error)}); "
                "make room there, then run the same command again: it goes on from the last one"
            ) from error


def _barrier_of_the_unharmed() -> Any:
    """The barrier of orbax, to which a thread does not come whose write has failed.

    It would come to another barrier than the threads of the other processes, and all would wait
    until the time-out; so the failure gets to its own process, which tells the others.
    """
    if jax.process_count() == 1:
        return None
    barrier = ocp.multihost.get_barrier_sync_fn()

    def meet(*, key: str, timeout_ms: int) -> None:
        # In the "finally" of orbax's thread the error is still under way.
        error = sys.exc_info()[1]
        if error is not None:
            raise error
        barrier(key=key, timeout_ms=timeout_ms)

    return meet


def restore_params(directory: AnyPath, params: nnx.State, mesh: Mesh) -> nnx.State:
    """The student's parameters in a run's newest checkpoint.

    Args:
        directory: The run's checkpoints.
        params: Parameters, or their shapes, of the structure to restore.
        mesh: Where they go.

    Returns:
        The parameters.

    Raises:
        UserError: There is no whole checkpoint, or it is of another model.
    """
    found = None
    if directory.is_dir():
        with Checkpoints(directory, keep=None) as checkpoints:
            found = checkpoints.restore_params(params, param_shardings(params, mesh))
    if found is None:
        raise UserError(f"{directory}: no whole checkpoint; has the run begun to train?")
    return found


def _beside_the_student(state: TrainState) -> dict[str, Any]:
    """What is of use to training alone: an export reads none of it."""
    _, projections = split_projections(state.params)
    beside = {"projections": projections} if projections else {}
    return {"opt_state": state.opt_state, "key": state.key, **beside}


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _digests(path: AnyPath) -> str:
    # Not the files beside the items: orbax writes its times into them after the seal.
    items = [item for item in sorted(path.iterdir()) if item.is_dir()]
    files = [file for item in items for file in files_below(item)]
    # Several at a time: a bucket is asked for each over the network.
    with ThreadPoolExecutor(8) as pool:
        digests = [*pool.map(sha256_of, files)]
    named = zip(digests, files, strict=True)
    return "".join(f"{digest}  {file.relative_to(path)}\n" for digest, file in named)


def _is_whole(path: AnyPath) -> bool:
    """Whether every file is as it was written; all processes get the first one's answer."""
    whole = False
    if is_first() and (path / DIGESTS).is_file():
        whole = (path / DIGESTS).read_bytes() == _digests(path).encode()
    return agreed(whole)


def _reason(error: BaseException) -> str:
    """The operating system's words where tensorstore passes on its error number."""
    text = " ".join(str(error).split())
    number = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(number[1])) if number else text.split(". ")[0][:160]
