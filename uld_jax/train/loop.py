"""The training loop: batches onto the mesh, steps, metrics, checkpoints, resume."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uld_jax.config import RunConfig
from uld_jax.data import Loader
from uld_jax.errors import Preempted, UserError
from uld_jax.files import AnyPath
from uld_jax.losses import Comparison
from uld_jax.models import Decoder
from uld_jax.sharding import BATCH_AXES
from uld_jax.teacher import StreamedTeacher
from uld_jax.train.checkpoint import Checkpoints
from uld_jax.train.clock import Clock
from uld_jax.train.cost import memory_peak, utilisation
from uld_jax.train.feed import FedBatch, Feed
from uld_jax.train.on_policy import OnPolicy
from uld_jax.train.optimizer import make_schedule
from uld_jax.train.preemption import stop_requests
from uld_jax.train.program import Program, make_program
from uld_jax.train.state import TrainState
from uld_jax.train.step import Metrics
from uld_jax.train.watch import Reporter, Tracer
from uld_jax.types import Batch, SortedSignal, TeacherSignal, TeacherTokens, TokenSignal


def fit(
    student: Decoder,
    teachers: Sequence[Decoder | StreamedTeacher | None],
    loader: Loader,
    config: RunConfig,
    *,
    mesh: Mesh,
    workdir: AnyPath,
    comparisons: Sequence[Comparison | None] | None = None,
    on_policy: OnPolicy | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> Decoder:
    """Distils the teachers into the student, from the newest checkpoint in the workdir if any.

    Args:
        student: Where to start; its arrays are given up to the training state.
        teachers: The frozen teachers, on the same mesh or streaming from their own; None for one
            whose signals the loader has.
        loader: The batches of all epochs.
        config: The run.
        mesh: The student's device mesh.
        workdir: Checkpoints, metrics.jsonl and TensorBoard events go here.
        comparisons: By which each teacher is compared, see `make_comparison`; None for ULD.
        on_policy: Replaces some of each batch's answers by the student's own; None for none, as it
            must be where a teacher streams, which reads batches ahead.
        progress: Called with the step, the number of steps and the step's metrics.

    Returns:
        The trained student.

    Raises:
        Preempted: SIGTERM or the notice of a pre-emption came; the step under way is saved.
        UserError: More than `train.max_nonfinite_steps` steps in a row were not finite, or a
            checkpoint could not be written or is of another model.
        ValueError: On-policy rows beside a teacher that streams.
    """
    steps = step_count(loader, config)
    streams = [teacher if isinstance(teacher, StreamedTeacher) else None for teacher in teachers]
    if on_policy is not None and any(streams):
        raise ValueError("on_policy: expected None where a teacher streams")
    here = [None if isinstance(teacher, StreamedTeacher) else teacher for teacher in teachers]
    program, params = make_program(
        student, here, config, steps=steps, mesh=mesh, comparisons=comparisons
    )
    iterator = loader.iterator()
    with Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints:
        state = _start(checkpoints, iterator, program, params)
        run = _Run(program, make_schedule(config.optimizer, steps), mesh, config)
        clock, first = run.clock, int(state.step)
        tracer = Tracer(workdir / "profile", config.train.profile_from, config.train.profile_steps)
        feed = Feed(iterator, streams, steps - first)
        reporter = Reporter(workdir, first=first, steps=steps, progress=progress)
        with reporter, stop_requests() as stop_requested:
            for step in range(first + 1, steps + 1):
                tracer.before(step)
                with clock.spent_on("input"):
                    batch, host = feed.take(), {}
                if on_policy is not None:
                    jax.block_until_ready(state)  # which the samples are drawn from
                    now, key = program.student(state.params), jax.random.wrap_key_data(state.key)
                    with clock.spent_on("sampling"):
                        arrays, host["on_policy_rows"] = on_policy.batch(now, loader, step - 1, key)
                    batch = dataclasses.replace(batch, arrays=arrays)
                with clock.spent_on("host"):
                    state = run.step(step, state, batch, host)
                if any(streams):
                    # So no more signals exist than the student needs for this step and the next.
                    run.wait_for_the_step_before()
                    with clock.spent_on("host"):
                        feed.fill()
                    with clock.spent_on("teacher"):
                        jax.block_until_ready(batch.signals)
                stopping = stop_requested(step) and step < steps
                tracer.after(step, state, last=stopping or step == steps)
                saving = stopping or step % config.train.checkpoint_every == 0 or step == steps
                if saving or step % config.train.log_every == 0:
                    reporter.report(run.flush())
                if saving:
                    reporter.flush()
                    with clock.spent_on("host"):
                        checkpoints.save(state, batch.iterator_state)
                if stopping:
                    raise Preempted(step)
    return program.student(state.params)


def _start(
    checkpoints: Checkpoints,
    iterator: grain.DatasetIterator[dict[str, Any]],
    program: Program,
    params: nnx.State,
) -> TrainState:
    """The state of the newest checkpoint, with the iterator moved to it, or a fresh one."""
    like = jax.eval_shape(program.fresh, params)
    restored = checkpoints.restore(like, program.shardings)
    if restored is None:
        return jax.jit(program.fresh, out_shardings=program.shardings)(params)
    state, iterator_state = restored
    iterator.set_state(iterator_state)
    return state


def step_count(loader: Loader, config: RunConfig) -> int:
    """The optimizer steps of the whole run: all batches, or `train.max_steps` of them.

    Args:
        loader: The batches of all epochs.
        config: The run.

    Returns:
        The number of steps.
    """
    return min(len(loader), config.train.max_steps or len(loader))


@dataclasses.dataclass
class _Run:
    """The program, the metrics that are still on the devices, and the time."""

    program: Program
    schedule: Callable[[int], Any]
    mesh: Mesh
    config: RunConfig
    pending: list[tuple[dict[str, Any], Metrics]] = dataclasses.field(default_factory=list)
    clock: Clock = dataclasses.field(default_factory=Clock)
    flops: float = 0.0

    def step(
        self,
        step: int,
        state: TrainState,
        fed: FedBatch,
        host: Mapping[str, float],
    ) -> TrainState:
        program = self.program
        batch = to_mesh(fed.arrays, self.mesh, fed.signals)
        with jax.set_mesh(self.mesh):
            state, metrics = program.step(state, program.teacher_params, batch, program.frozen)
        cost = program.cost(batch)
        self.pending.append(({"step": step, **host, "teacher_share": cost.teacher_share}, metrics))
        self.flops += cost.total
        return state

    def wait_for_the_step_before(self) -> None:
        """Waits for all steps but the newest."""
        jax.block_until_ready([metrics for _, metrics in self.pending[:-1]])

    def flush(self) -> list[dict[str, Any]]:
        """Fetches the pending metrics, adds rate and time, and stops a run that has diverged."""
        fetched = [(host, jax.device_get(metrics)) for host, metrics in self.pending]
        times = {name: round(t, 4) for name, t in self.clock.lap(len(fetched)).items()}
        devices = [*self.mesh.devices.flat]
        flops, seconds = self.flops / max(1, len(fetched)), max(times["seconds"], 1e-4)
        hardware = {
            "mfu": utilisation(flops, seconds, devices),
            "memory_bytes": memory_peak(self.mesh.local_devices),
        }
        times |= {name: value for name, value in hardware.items() if value is not None}
        self.pending, self.flops, rows = [], 0.0, []
        for host, metrics in fetched:
            row = {**host, **{name: value.item() for name, value in metrics.items()}}
            row["learning_rate"] = float(self.schedule(row["step"] - 1))
            tokens = row["student_tokens"] + row["teacher_tokens"]
            row |= {**times, "tokens_per_second": round(tokens / seconds, 1)}
            rows.append(row)
        limit = self.config.train.max_nonfinite_steps
        bad = [row for row in rows if row["nonfinite_in_a_row"] > limit]
        if bad:
            raise UserError(
                f"step {bad[0]['step']}: loss or gradients were not finite in more than {limit} "
                "steps in a row (train.max_nonfinite_steps); lower optimizer.learning_rate or "
                "compute in float32 (student.dtype)"
            )
        return rows


def to_mesh(
    arrays: Mapping[str, Any], mesh: Mesh, signals: Sequence[SortedSignal | None] | None = None
) -> Batch:
    """Puts this process's part of a batch on the mesh: rows and groups over data and fsdp.

    Args:
        arrays: What `uld_jax.data.collate` returns.
        mesh: The device mesh.
        signals: For each teacher the signal that stands for its tokens, there already, or None.

    Returns:
        The global batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    put = functools.partial(jax.make_array_from_process_local_data, sharding)
    students = {name: put(array) for name, array in arrays.items() if name != "teachers"}
    teachers = []
    for teacher, signal in zip(
        arrays["teachers"], signals or [None for _ in arrays["teachers"]], strict=True
    ):
        if signal is not None:
            teachers.append(TeacherSignal(put(teacher["uld_weight"]), signal))
            continue
        placed = jax.tree.map(put, dict(teacher))
        if "signal" in placed:
            kind = TokenSignal if "ids" in placed["signal"] else SortedSignal
            own = kind(**placed["signal"])
            teachers.append(TeacherSignal(placed["uld_weight"], own))
        else:
            teachers.append(TeacherTokens(**placed))
    return Batch(**students, teachers=tuple(teachers))
