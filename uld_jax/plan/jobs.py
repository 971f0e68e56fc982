"""The programs that can be planned: a train step, a teacher's answers, a cache of its signals."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uld_jax import models
from uld_jax.config import RunConfig
from uld_jax.models.continuous import length_bucket
from uld_jax.models.flops import forward_flops
from uld_jax.models.pool import Plan as PoolPlan
from uld_jax.models.pool import Request, advance, fill
from uld_jax.plan.abstract import (
    ModelConfig,
    abstract_model,
    abstract_step,
    answer_length,
    bytes_of,
    placed,
    round_up,
)
from uld_jax.sharding import BATCH_AXES, batch_shards, fold_sequence
from uld_jax.teacher import SignalOptions, SignalReader

# What stops an answer: an end of sequence and a line break at least.
STOP_IDS = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile, and what is known of it before.

    Attributes:
        program: Its name, for people.
        mesh: That it runs on.
        lower: Traces it; the mesh is set.
        bytes: Of what it is given, by kind, on a device.
        model_flops: "student" and "teacher", over all devices.
        again: FLOPs that are computed a second time, for a backward pass.
        batch_size: Rows of all devices.
        micro_batches: Parts that they are read in.
        row_length: Tokens of a row, padded, encoder and decoder together.
        answer_positions: Of the batch, padded.
        tokens: That one call reads or writes, padding included.
        then: Makes the job that follows from this one's compiled program.
    """

    program: str
    mesh: Mesh
    lower: Callable[[], Any]
    bytes: Mapping[str, float]
    model_flops: Mapping[str, float]
    again: float
    batch_size: int
    micro_batches: int
    row_length: int
    answer_positions: int
    tokens: int
    then: Callable[[Any], "Job"] | None = None


def train_job(config: RunConfig, made_of: Mapping[str, ModelConfig], mesh: Mesh) -> Job:
    """One train step.

    Args:
        config: The run.
        made_of: Its models, from `read_configs`.
        mesh: The student's.

    Returns:
        The job.

    Raises:
        UserError: A mesh axis does not divide an array axis.
    """
    step = abstract_step(config, made_of, mesh)
    batch = step.batch
    encoder = batch.student_encoder_tokens
    flops = step.program.cost(batch)._asdict()
    length = batch.student_tokens.shape[-1] + (0 if encoder is None else encoder.shape[-1])
    return Job(
        program="train step",
        mesh=mesh,
        lower=lambda: step.program.step.lower(*step.arguments),
        bytes=step.bytes_per_device(),
        model_flops=flops,
        again=flops["student"] / 3 if config.student.remat == "full" else 0.0,
        batch_size=config.data.batch_size,
        micro_batches=config.train.accumulation,
        row_length=length,
        answer_positions=batch.targets.size,
        tokens=config.data.batch_size * length,
    )


def answers_job(config: RunConfig, made_of: Mapping[str, ModelConfig], mesh: Mesh) -> Job:
    """The first teacher's answers: all rows of a pool read the longest prompts that there may be.

    Then follows one token of each row. What refills rows is smaller than both.

    Args:
        config: The run.
        made_of: Its models, from `read_configs`.
        mesh: Where the teacher lies.

    Returns:
        The job.

    Raises:
        UserError: A mesh axis does not divide an array axis.
    """
    own = made_of["teacher"]
    graph, params = _teacher(config, own, mesh)
    mesh = fold_sequence(mesh)  # as generation does with the mesh that the parameters lie on
    new_tokens = config.teacher.max_new_tokens
    rows = round_up(config.teacher.batch_size, batch_shards(mesh))
    longest = min(config.teacher.max_length - 1, own.max_positions - new_tokens)
    width = min(length_bucket(longest), own.max_positions - new_tokens)
    plan = PoolPlan(width, new_tokens)
    array = _over(mesh)
    prompts = array(rows, width), array(rows), array(rows, 3, dtype=jnp.uint32)
    request = _request(config, mesh)

    def token(compiled: Any) -> Job:
        pool = jax.eval_shape(
            lambda params, request, *prompts: fill(graph, params, request, *prompts, plan=plan),
            params,
            request,
            *prompts,
        )
        pool = jax.tree.map(_with_sharding, pool, compiled.output_shardings)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        ended = array(rows, dtype=bool)
        return dataclasses.replace(
            first,
            program="answers, a token of each row",
            lower=lambda: advance.lower(
                graph, params, request, pool, ended, count, count, plan=plan
            ),
            bytes={"teacher parameters": bytes_of(params), "rows and their cache": bytes_of(pool)},
            model_flops=_flops(own, rows=rows, length=1, positions=rows, context=width),
            answer_positions=rows,
            tokens=rows,
            then=None,
        )

    first = Job(
        program="answers, reading the prompts",
        mesh=mesh,
        lower=lambda: fill.lower(graph, params, request, *prompts, plan=plan),
        bytes={"teacher parameters": bytes_of(params), "batch": bytes_of(prompts)},
        model_flops=_flops(own, rows=rows, length=width, positions=rows),
        again=0.0,
        batch_size=rows,
        micro_batches=1,
        row_length=width,
        answer_positions=rows,
        tokens=rows * width,
        then=token,
    )
    return first


def cache_job(config: RunConfig, made_of: Mapping[str, ModelConfig], mesh: Mesh) -> Job:
    """The first teacher's signals for a cache: it reads texts; then follow the probabilities.

    Args:
        config: The run.
        made_of: Its models, from `read_configs`.
        mesh: Where the teacher lies.

    Returns:
        The job.

    Raises:
        UserError: A mesh axis does not divide an array axis.
    """
    own, group, mesh = made_of["teacher"], config.teacher, fold_sequence(mesh)
    model = abstract_model(group, own)
    options = SignalOptions(
        cap=min(group.cache_cap, own.vocab_size),
        ids=group.cache_ids,
        batch_size=group.batch_size,
        chunk_size=config.loss.chunk_size,
    )
    reader = SignalReader(model, own, options, mesh)
    params = placed(nnx.split(model)[1], group, mesh)
    rows, groups = reader.rows, batch_shards(mesh)
    answer = answer_length(config)
    length = reader.padded_length(group.max_length)
    array = _over(mesh)
    texts = {name: array(rows, length) for name in ("tokens_BT", "segment_ids")}
    if isinstance(own, models.EncoderDecoderConfig):
        names = ("encoder_tokens", "encoder_segment_ids")
        texts = {name: array(rows, reader.padded_length(answer)) for name in texts}
        texts |= {name: array(rows, length) for name in names}
    positions = round_up(rows // groups * answer, options.chunk_size)
    index = array(groups, positions)
    sizes = {"rows": rows, "length": texts["tokens_BT"].shape[1]}
    sizes["encoder_length"] = sum(x.shape[1] for x in texts.values()) // 2 - sizes["length"]

    def probabilities(compiled: Any) -> Job:
        hidden = _with_sharding(
            jax.eval_shape(reader.hidden, params, texts), compiled.output_shardings
        )
        return dataclasses.replace(
            first,
            program="cache, probabilities",
            lower=lambda: reader.top.lower(params, hidden, index),
            bytes={"teacher parameters": bytes_of(params), "batch": bytes_of((hidden, index))},
            model_flops=_flops(own, rows=0, length=0, positions=groups * positions),
            answer_positions=groups * positions,
            then=None,
        )

    first = Job(
        program="cache, reading texts",
        mesh=mesh,
        lower=lambda: reader.hidden.lower(params, texts),
        bytes={"teacher parameters": bytes_of(params), "batch": bytes_of(texts)},
        model_flops=_flops(own, **sizes),
        again=0.0,
        batch_size=rows,
        micro_batches=1,
        row_length=sizes["length"] + sizes["encoder_length"],
        answer_positions=0,
        tokens=rows * (sizes["length"] + sizes["encoder_length"]),
        then=probabilities,
    )
    return first


JOBS = {"train": train_job, "answers": answers_job, "cache": cache_job}


def _teacher(config: RunConfig, own: ModelConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Its structure, and its parameters as shapes that say where they lie."""
    graph, params = nnx.split(abstract_model(config.teacher, own))
    return graph, placed(params, config.teacher, mesh)


def _request(config: RunConfig, mesh: Mesh) -> Request:
    everywhere = NamedSharding(mesh, PartitionSpec())

    def scalar(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    decoding = config.generate
    sampling = models.Sampling(decoding.temperature, decoding.top_k, decoding.top_p)
    return Request(
        scalar(jnp.int32, STOP_IDS),
        scalar(jax.eval_shape(lambda: jax.random.key(0)).dtype),
        {name: scalar(jnp.float32) for name in sampling.in_use()},
    )


def _over(mesh: Mesh) -> Callable[..., Any]:
    """Makes shapes whose rows lie over the batch axes."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    return array


def _with_sharding(x: Any, lies: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)


def _flops(own: ModelConfig, **sizes: int) -> dict[str, float]:
    return {"student": 0.0, "teacher": forward_flops(own, **sizes)}
