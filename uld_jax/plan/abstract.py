"""A run's train step with shapes in place of arrays: from its config and its models' configs."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from uld_jax import models
from uld_jax.config import BaseModelConfig, RunConfig, TeacherConfig
from uld_jax.losses import Comparison, Transport
from uld_jax.losses.transport import UniformCost
from uld_jax.models import DecoderConfig, EncoderDecoderConfig, Policy
from uld_jax.sharding import BATCH_AXES, MESH_AXES, mesh_shape, parameter_rules
from uld_jax.train import (
    Program,
    TrainState,
    adapt,
    make_program,
    of_ids,
    param_shardings,
)
from uld_jax.types import Batch, SortedSignal, TeacherSignal, TeacherTokens, TokenSignal

ModelConfig = DecoderConfig | EncoderDecoderConfig
# As the loader rounds lengths and positions up.
MULTIPLE = 16
# Of a run: the step has it in the schedule's constants only.
STEPS = 1000


class AbstractStep(NamedTuple):
    """A train step and all that it is given, as shapes that say where they lie.

    Attributes:
        program: Its function and what is fixed.
        state: Parameters, optimizer state, key.
        teachers: Each teacher's parameters, None for one that is not part of the step.
        batch: The data.
        frozen: The student's parameters that are not trained.
    """

    program: Program
    state: TrainState
    teachers: list[nnx.State | None]
    batch: Batch
    frozen: tuple[nnx.State, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of `program.step`."""
        return self.state, self.teachers, self.batch, self.frozen

    def bytes_per_device(self) -> dict[str, float]:
        """What each kind of argument takes on a device, by arithmetic.

        Returns:
            Kind to bytes.
        """
        return {
            "student parameters": bytes_of((self.state.params, self.frozen)),
            "teacher parameters": bytes_of(self.teachers),
            "optimizer state": bytes_of((self.state.opt_state, self.state.step, self.state.key)),
            "batch": bytes_of(self.batch),
        }


def read_configs(config: RunConfig) -> dict[str, ModelConfig]:
    """What the student and each teacher are made of, no weights and no tokenizer read.

    Args:
        config: The run.

    Returns:
        By the path of its config, "student" first.

    Raises:
        UserError: A model that is not there or not supported.
    """
    groups = {"student": config.student, **config.teacher_groups()}
    return {path: models.load_config(group.source) for path, group in groups.items()}


def abstract_step(
    config: RunConfig, made_of: Mapping[str, ModelConfig], mesh: Mesh | AbstractMesh
) -> AbstractStep:
    """Puts the step together as `uld_jax.train.fit` does, without an array.

    Args:
        config: The run.
        made_of: From `read_configs`.
        mesh: The student's.

    Returns:
        The step.

    Raises:
        UserError: A mesh axis does not divide an array axis.

    Example:
        >>> from uld_jax.sharding import make_mesh
        >>> from uld_jax.testing import tiny_config, tiny_gemma
        >>> made_of = {"student": tiny_config(), "teacher": tiny_gemma()}
        >>> step = abstract_step(RunConfig(), made_of, make_mesh(-1, 1, 1))
        >>> step.batch.student_tokens.shape
        (1, 8, 1024)
    """
    student = abstract_model(config.student, made_of["student"])
    student = nnx.eval_shape(functools.partial(_adapted, config=config), student)
    teachers = [
        abstract_model(group, made_of[path]) if group.mode == "online" else None
        for path, group in config.teacher_groups().items()
    ]
    on_mesh: Any = mesh
    program, params = make_program(
        student,
        teachers,
        config,
        steps=STEPS,
        mesh=on_mesh,
        comparisons=_compared_by(config, made_of),
    )
    of_teachers = [
        None if params is None else placed(params, group, on_mesh)
        for params, group in zip(program.teacher_params, config.teachers, strict=True)
    ]
    return AbstractStep(
        program,
        _shapes(jax.eval_shape(program.fresh, params), program.shardings),
        of_teachers,
        abstract_batch(config, made_of, mesh),
        tuple(placed(own, config.student, on_mesh) for own in program.frozen),
    )


def _compared_by(
    config: RunConfig, made_of: Mapping[str, ModelConfig]
) -> list[Comparison | None] | None:
    """As many tokens in common as there can be: no tokenizer is read."""
    loss = config.loss
    if loss.distance == "uld":
        return None
    if loss.distance == "transport":
        # The host computes the costs of a run, which take the devices no memory to speak of.
        cost = Transport(UniformCost(), loss.transport_top_k, loss.transport_epsilon)
        return [cost for _ in config.teachers]
    sizes = {path: model.vocab_size for path, model in made_of.items()}
    found = []
    for path in config.teacher_groups():
        ids = np.arange(min(sizes["student"], sizes[path]))
        found.append(of_ids(loss, ids, ids, (sizes["student"], sizes[path])))
    return found


def abstract_batch(
    config: RunConfig, made_of: Mapping[str, ModelConfig], mesh: Mesh | AbstractMesh
) -> Batch:
    """A batch as large as the config allows any to be.

    Rows are `max_length` long. An answer is as long as `teacher.max_new_tokens` (or
    `train.on_policy_tokens`) and the token that ends it.

    Args:
        config: The run.
        made_of: Its models.
        mesh: The student's.

    Returns:
        Shapes that say where they lie.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    multiple = math.lcm(MULTIPLE, mesh.shape["sequence"])
    parts = config.train.accumulation
    rows = config.data.batch_size // parts
    answer = answer_length(config)
    sharding: Any = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((parts, *shape), dtype, sharding=sharding)

    def positions(*shape: int, dtype: Any = jnp.float32) -> Any:
        count = round_up(rows // groups * answer, multiple)
        return array(groups, count, *shape, dtype=dtype)

    def tokens(prefix: str, path: str, group: BaseModelConfig) -> dict[str, Any]:
        encoder = isinstance(made_of[path], EncoderDecoderConfig)
        lengths = {prefix: answer, f"{prefix}encoder_": group.max_length - answer}
        return {
            name + part: array(rows, round_up(length, multiple))
            for name, length in (lengths if encoder else {prefix: group.max_length}).items()
            for part in ("tokens", "segment_ids")
        }

    def teacher(path: str, group: TeacherConfig) -> TeacherTokens | TeacherSignal:
        if group.mode == "online":
            index = positions(dtype=jnp.int32)
            return TeacherTokens(uld_weight=positions(), index=index, **tokens("", path, group))
        if config.loss.distance != "uld":
            known = (positions(group.cache_ids, dtype=jnp.int32), positions(group.cache_ids))
            return TeacherSignal(positions(), TokenSignal(*known))
        vocabulary = made_of[path].vocab_size
        most = group.cache_cap if group.mode == "cache" else group.stream_top_k or vocabulary
        signal = SortedSignal(positions(min(most, vocabulary)), positions(), positions())
        return TeacherSignal(positions(), signal)

    return Batch(
        **tokens("student_", "student", config.student),
        student_index=positions(dtype=jnp.int32),
        targets=positions(dtype=jnp.int32),
        ce_weight=positions(),
        teachers=tuple(teacher(*item) for item in config.teacher_groups().items()),
    )


def answer_length(config: RunConfig) -> int:
    """The longest answer that a batch has room for, in tokens, its end included.

    Example:
        >>> answer_length(RunConfig(teacher=TeacherConfig(max_new_tokens=150)))
        151
    """
    sampled = config.train.on_policy_tokens if config.train.on_policy_fraction else 0
    return max(config.teacher.max_new_tokens, sampled) + 1


def abstract_mesh(config: RunConfig, devices: int) -> AbstractMesh:
    """The student's mesh without any devices, for programs that are lowered only.

    Args:
        config: A resolved config, whose teachers do not stream.
        devices: How many there would be.

    Returns:
        The mesh.
    """
    axes = config.mesh
    auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    more = {"sequence": axes.sequence, "slices": axes.slices}
    shape = mesh_shape(axes.data, axes.fsdp, axes.tensor, devices, **more)
    return AbstractMesh(shape, MESH_AXES, axis_types=auto)


def abstract_model(group: BaseModelConfig, made_of: ModelConfig) -> models.Decoder:
    """A model without weights, as a run's config has it computed and quantised."""
    policy = Policy(dtype=group.dtype, remat=group.remat)
    config: Any = made_of
    model = models.abstract_decoder(config, policy, jnp.dtype(group.param_dtype))
    if isinstance(group, TeacherConfig) and group.quantize:
        model = nnx.eval_shape(functools.partial(_quantized, kind=group.quantize), model)
    return model


def _quantized(model: models.Decoder, *, kind: str) -> models.Decoder:
    models.quantize(model, kind)
    return model


def _adapted(model: models.Decoder, *, config: RunConfig) -> models.Decoder:
    adapt(model, config)
    return model


def placed(params: nnx.State, group: BaseModelConfig, mesh: Mesh) -> nnx.State:
    """Shapes that say where a model's parameters lie on a mesh."""
    rules = parameter_rules(group.shard_parameters)
    return _shapes(params, param_shardings(params, mesh, rules))


def _shapes(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), tree, shardings
    )


def bytes_of(tree: Any) -> float:
    """What arrays that say where they lie take on one device."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        bits = 4 if leaf.dtype.name == "int4" else 8 * leaf.dtype.itemsize
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits / 8
    return total


def round_up(size: int, multiple: int = MULTIPLE) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
