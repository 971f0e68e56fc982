"""A teacher on devices of its own, whose signals are moved to the student's devices.

A batch's rows lie over the batch shards of the student's mesh (one group of answer positions each)
and over those of the teacher's. The greatest common divisor of both numbers is how many *units* of
rows there are, each held by whole shards of either mesh. A unit's signal is made by its own teacher
devices and copied from one of them to each of its student devices, all of the same process.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uld_jax.data.signal import ROUNDING
from uld_jax.errors import UserError
from uld_jax.models import Decoder
from uld_jax.sharding import BATCH_AXES, batch_shards, constrain
from uld_jax.teacher.signals import top_probabilities
from uld_jax.types import SortedSignal, TeacherTokens

UNITS = "units"


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """What a streaming teacher gives, and how far ahead.

    Attributes:
        depth: Batches whose signals exist before the student needs them.
        batch_size: Rows of a batch, over all processes, that the teacher reads at a time.
        top_k: Probabilities of each position, the rest being a tail mass; 0 for all of them.
        temperature: Divides the teacher's logits.
        chunk_size: Positions of a device whose logits exist at a time.

    Example:
        >>> StreamOptions(depth=1, batch_size=8).top_k
        0
    """

    depth: int
    batch_size: int
    top_k: int = 0
    temperature: float = 1.0
    chunk_size: int = 32


class StreamedTeacher:
    """A frozen teacher that reads batches on a mesh of its own.

    It keeps nothing from batch to batch: a signal depends on the batch alone.

    Args:
        model: The teacher; its parameters lie on its mesh.
        options: What it gives.
        mesh: The teacher's.
        student_mesh: Where the signals go; the two share no device.

    Raises:
        UserError: A process has only a part of a batch shard of a mesh.

    Example:
        >>> from uld_jax.sharding import make_mesh
        >>> from uld_jax.testing import tiny_gemma, toy_batch
        >>> here, there = (make_mesh(1, 1, 1, devices=[d]) for d in jax.devices()[:2])
        >>> model = Decoder(tiny_gemma(), rngs=nnx.Rngs(0))
        >>> nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
        >>> options = StreamOptions(depth=1, batch_size=8, top_k=16)
        >>> teacher = StreamedTeacher(model, options, mesh=here, student_mesh=there)
        >>> signal = teacher.signal(toy_batch()["teachers"][0])
        >>> signal.probs.shape, signal.probs.sharding.device_set == {jax.devices()[1]}
        ((1, 1, 32, 16), True)
    """

    def __init__(
        self, model: Decoder, options: StreamOptions, *, mesh: Mesh, student_mesh: Mesh
    ) -> None:
        shards, groups = batch_shards(mesh), batch_shards(student_mesh)
        self.options = options
        self._mesh = mesh
        self._units = math.gcd(shards, groups)
        if self._units % jax.process_count():
            raise UserError(
                f"{shards} batch shards of the teacher's devices and {groups} of the student's: "
                f"expected multiples of the {jax.process_count()} processes, so that each has "
                "whole ones; lower teacher.tensor or mesh.tensor"
            )
        self._target = NamedSharding(student_mesh, PartitionSpec(None, BATCH_AXES))
        self._copies = _copies(self._target, groups)
        graph, self._params = nnx.split(model)
        self._read = jax.jit(
            functools.partial(_read, graph=graph, options=options),
            static_argnames="plan",
            out_shardings=NamedSharding(mesh, PartitionSpec(BATCH_AXES)),
        )
        # The same devices in the same order, with one axis of units. A program of its own, for in
        # one with kernels that need to know the mesh there may be but one.
        by_unit = Mesh(mesh.devices.reshape(self._units, -1), (UNITS, "copies"))
        self._slots = jax.jit(
            _slots,
            static_argnames="plan",
            out_shardings=NamedSharding(by_unit, PartitionSpec(None, UNITS)),
        )

    def signal(self, teacher: Mapping[str, Any]) -> SortedSignal:
        """Starts reading a batch; returns without waiting for anything.

        Args:
            teacher: This process's part of the teacher's batch, as `uld_jax.data.collate` returns
                it.

        Returns:
            [M, G, N], on the student's mesh once it is there.

        Raises:
            ValueError: `options.batch_size` does not divide the batch, or the teacher's batch
                shards do not divide it.
        """
        plan = _plan(teacher, self._units, self.options.batch_size, batch_shards(self._mesh))
        inputs, index = _arrange(TeacherTokens(**teacher), plan)
        by_row, by_shard = (
            NamedSharding(self._mesh, PartitionSpec(*axes, BATCH_AXES)) for axes in ([None], [])
        )
        put = jax.make_array_from_process_local_data
        with jax.set_mesh(self._mesh):
            inputs = {name: put(by_row, array) for name, array in inputs.items()}
            signal = self._read(self._params, inputs, put(by_shard, index), plan=plan)
        return jax.tree.map(self._move, *self._slots(signal, plan=plan))

    def _move(self, *slots: jax.Array) -> jax.Array:
        """[M, G, N, …] on the student's mesh, from an array [M, units, N, …] of each slot."""
        micro_batches, units, *rest = slots[0].shape
        sources = [_copies_of_parts(array) for array in slots]
        chosen = []
        for _, group, number in self._copies:
            unit, slot = divmod(group, len(slots))
            copies = sources[slot][unit]
            chosen.append(copies[number % len(copies)])
        moved = jax.device_put(chosen, [device for device, _, _ in self._copies])
        shape = (micro_batches, units * len(slots), *rest)
        return jax.make_array_from_single_device_arrays(shape, self._target, moved)


def _copies(target: NamedSharding, groups: int) -> list[tuple[Any, int, int]]:
    """Each device of this process, the group it holds, and how many before it hold the same.

    Groups count from this process's first.
    """
    places = target.addressable_devices_indices_map((1, groups))
    starts = {device: (index or (None, slice(0)))[1].start or 0 for device, index in places.items()}
    local = {start: group for group, start in enumerate(sorted(set(starts.values())))}
    held = dict.fromkeys(local.values(), 0)
    copies = []
    for device, start in starts.items():
        copies.append((device, local[start], held[local[start]]))
        held[local[start]] += 1
    return copies


def _copies_of_parts(array: jax.Array) -> list[list[jax.Array]]:
    """Of each part of the second axis that this process has, the copies on its devices."""
    parts: dict[int, list[jax.Array]] = {}
    for shard in array.addressable_shards:
        parts.setdefault(shard.index[1].start or 0, []).append(shard.data)
    return [parts[start] for start in sorted(parts)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a batch is read: sizes over all processes.

    Attributes:
        units: Of rows, see above.
        shards: Batch shards of the teacher's mesh in a unit.
        groups: Of answer positions in a unit: batch shards of the student's mesh.
        micro_batches: M.
        positions: N of a group.
        passes: Parts of its rows, one after the other.
    """

    units: int
    shards: int
    groups: int
    micro_batches: int
    positions: int
    passes: int


def _plan(teacher: Mapping[str, np.ndarray], units: int, batch_size: int, shards: int) -> _Plan:
    micro_batches, local_groups, positions = teacher["index"].shape
    processes = jax.process_count()
    rows = micro_batches * teacher["tokens"].shape[1] * processes
    if rows % batch_size or batch_size % shards:
        raise ValueError(
            f"batch_size: expected a divisor of the batch's {rows} rows and a multiple of the "
            f"teacher's {shards} batch shards, got {batch_size}"
        )
    groups = local_groups * processes // units
    return _Plan(
        units, shards // units, groups, micro_batches, positions, passes=rows // batch_size
    )


def _arrange(given: TeacherTokens, plan: _Plan) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """This process's rows by pass, and where each shard's answer positions lie in its unit.

    Returns:
        The teacher's inputs, each [passes, rows, tokens], every pass with the same number of rows
        of each unit; and int32 [shards, n], indices into the tokens of a unit's rows, all
        micro-batches one after the other; each shard has some of its unit's positions.
    """
    micro_batches, groups, positions = given.index.shape
    units = groups // plan.groups
    inputs = {}
    for name, array in given.inputs.items():
        by_unit = np.reshape(array, (micro_batches, units, -1, array.shape[-1])).swapaxes(0, 1)
        by_pass = by_unit.reshape(units, plan.passes, -1, array.shape[-1]).swapaxes(0, 1)
        inputs[name] = by_pass.reshape(plan.passes, -1, array.shape[-1])
    tokens = given.tokens.shape[1] * given.tokens.shape[2] // groups
    starts = tokens * np.arange(micro_batches * plan.groups, dtype=np.int32)
    index = np.reshape(given.index, (micro_batches, units, plan.groups, positions)).swapaxes(0, 1)
    index = index.reshape(units, -1, positions) + starts[:, None]
    index = index.reshape(units, -1)
    index = np.pad(index, ((0, 0), (0, -index.shape[1] % plan.shards)))
    return inputs, index.reshape(units * plan.shards, -1)


def _read(
    params: nnx.State,
    inputs: dict[str, jax.Array],
    index_SN: jax.Array,
    *,
    graph: nnx.GraphDef[Decoder],
    plan: _Plan,
    options: StreamOptions,
) -> SortedSignal:
    """The signal [shards, n] at these positions of each shard."""
    t = nnx.merge(graph, params)
    taken_UNE = _hidden(t, inputs, index_SN.reshape(plan.units, -1))
    by_shard_SNE = taken_UNE.reshape(*index_SN.shape, -1)
    vocab = t.head_VD.shape[0]
    top = top_probabilities(
        constrain(by_shard_SNE, "batch", None, None),
        t.head_VD,
        k=min(options.top_k or vocab, vocab),
        temperature=options.temperature,
        softcap=t.config.logit_softcap or None,
        chunk_size=options.chunk_size,
    )
    return SortedSignal(top.probs, top.tail_mass, top.tail_mass + ROUNDING)


def _slots(signal: SortedSignal, *, plan: _Plan) -> Sequence[SortedSignal]:
    """The signals [M, units, N] of the first group of each unit, then of its second, and so on."""
    sizes = (plan.micro_batches, plan.groups, plan.positions)

    def by_slot(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        x = x.reshape(plan.units, -1, *rest)[:, : math.prod(sizes)]
        return jnp.moveaxis(x.reshape(plan.units, *sizes, *rest), (2, 1), (0, 1))

    slots = jax.tree.map(by_slot, signal)
    return [jax.tree.map(lambda x, i=i: x[i], slots) for i in range(plan.groups)]


def _hidden(t: Decoder, inputs: dict[str, jax.Array], index_UN: jax.Array) -> jax.Array:
    """The hidden states [units, n, E] at these positions, one pass over some rows at a time."""
    units = index_UN.shape[0]
    like = jax.eval_shape(lambda x: t.hidden(**x), jax.tree.map(lambda x: x[0], inputs))

    def read(taken_UNE: jax.Array, one: Any) -> tuple[jax.Array, None]:
        number, inputs = one
        hidden_URE = t.hidden(**inputs).reshape(units, -1, like.shape[-1])
        size = hidden_URE.shape[1]
        here_UN = index_UN - number * size
        at_UN = jnp.clip(here_UN, 0, size - 1)
        found_UNE = jnp.take_along_axis(hidden_URE, at_UN[..., None], axis=1)
        return jnp.where((here_UN == at_UN)[..., None], found_UNE, taken_UNE), None

    empty = jnp.zeros((*index_UN.shape, like.shape[-1]), like.dtype)
    passes = jnp.arange(len(next(iter(inputs.values()))))
    return jax.lax.scan(read, empty, (passes, inputs))[0]
