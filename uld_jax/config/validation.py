"""Every mistake in a configuration, found before anything is loaded."""

import json
import math
from collections.abc import Sequence

from uld_jax.config import streaming
from uld_jax.config.convert import flatten, raise_all
from uld_jax.config.fields import value_error
from uld_jax.config.loss import DIVERGENCES, LossConfig
from uld_jax.config.schema import GenerateConfig, MeshConfig, RunConfig, TeacherConfig


def validate(
    config: RunConfig, *, device_count: int | None = None, process_count: int = 1
) -> list[str]:
    """Find every mistake: wrong types, values out of range, fields that contradict each other.

    Args:
        config: any config.
        device_count: devices that the meshes must cover; None = unknown, and not checked.
        process_count: processes, each with as many devices.

    Returns:
        One line each: what, expected, actual, how to mend it. Empty = the config is sound.

    Example:
        >>> validate(RunConfig())[0]
        "student.source: expected a Hugging Face id, a safetensors directory or a .gguf file, \
got ''; set --config.student.source=..."
    """
    values = flatten(config)
    wrong = {path: error for path, value in values.items() if (error := value_error(path, value))}

    def sound(*prefixes: str) -> bool:
        return not any(path.startswith(prefixes) for path in wrong)

    errors = list(wrong.values())
    if sound("loss."):
        errors += _loss_errors(config.loss, device_count)
    if sound("student.lora_") and config.student.lora_targets and not config.student.lora_rank:
        errors.append(
            "student.lora_targets: expected nothing where student.lora_rank is 0 (train all "
            f"weights), got {config.student.lora_targets!r}; set --config.student.lora_rank=8"
        )
    for name, teacher in config.teacher_groups().items():
        if sound(f"{name}."):
            errors += _cache_errors(name, teacher, config.train.on_policy_fraction)
            errors += _server_errors(name, teacher, config.loss.teacher_temperature)
            errors += _distance_errors(name, teacher, config.loss.distance)
            errors += _feature_errors(name, teacher, config.loss) if sound("loss.") else []
    if sound("generate."):
        errors += _generate_errors(config.generate)
    errors += [
        _no_room(answer, length, values[answer], values[length])
        for answer, length in (
            ("teacher.max_new_tokens", "teacher.max_length"),
            ("eval.max_new_tokens", "student.max_length"),
        )
        if sound(answer, length) and values[answer] >= values[length]
    ]
    if not any(path.rpartition(".")[2] in streaming.FIELDS for path in wrong):
        if sound("data.", "train."):
            errors += streaming.streaming_errors(
                config, device_count=device_count, process_count=process_count
            )
        if device_count is not None:
            taken = process_count * sum(streaming.streaming_devices(config).values())
            device_count = device_count - taken if taken < device_count else None
    if process_count > 1 and config.train.on_policy_fraction:
        errors.append(
            "train.on_policy_fraction: expected 0 with several processes, each of which knows only "
            f"its own rows of a batch, got {config.train.on_policy_fraction}; set "
            "--config.train.on_policy_fraction=0, or start one process"
        )
    if sound("mesh."):
        mesh_errors = _mesh_errors(config.mesh, device_count)
        errors += mesh_errors
        if not mesh_errors and sound("data.batch_size", "train.accumulation"):
            errors += _batch_errors(config, device_count)
    return errors


def resolve(
    config: RunConfig,
    *,
    device_count: int | None = None,
    process_count: int = 1,
    errors: Sequence[str] = (),
) -> RunConfig:
    """Return a config that is known to be sound, or report all that is wrong with it.

    Args:
        config: any config; frozen as it is, it needs no copy.
        device_count: devices that the meshes must cover; None = unknown, and not checked.
        process_count: processes, each with as many devices.
        errors: lines that `apply_overrides` returned, to report with the rest.

    Returns:
        The same config.

    Raises:
        UserError: a line with the number of errors, then one line each.

    Example:
        >>> from uld_jax.config import ModelConfig, TeacherConfig
        >>> config = RunConfig(student=ModelConfig("gpt2"), teacher=TeacherConfig("gpt2-large"))
        >>> resolve(config, device_count=8) is config
        True
    """
    found = validate(config, device_count=device_count, process_count=process_count)
    raise_all([*errors, *found])
    return config


def _loss_errors(loss: LossConfig, device_count: int | None) -> list[str]:
    errors = []
    if loss.uld_weight == loss.ce_weight == 0:
        errors.append(
            "loss: expected uld_weight or ce_weight > 0, got 0 for both; "
            "set --config.loss.uld_weight=1.5"
        )
    if loss.distance == "transport" and (device_count or 1) > 1:
        errors.append(
            f"loss.distance: expected another than transport on {device_count} devices, which its "
            "solver cannot be spread over; show the run one (JAX_NUM_CPU_DEVICES=1, "
            "CUDA_VISIBLE_DEVICES=0, TPU_VISIBLE_DEVICES=0)"
        )
    return errors


def _cache_errors(name: str, teacher: TeacherConfig, on_policy_fraction: float) -> list[str]:
    errors = []
    if teacher.mode == "cache" and not teacher.cache:
        errors.append(
            f"{name}.cache: expected the directory of a teacher cache where {name}.mode is cache, "
            f"got ''; make one with `uld-jax cache --output=DIR` and set --config.{name}.cache=DIR"
        )
    if teacher.mode == "cache" and on_policy_fraction:
        errors.append(
            f"{name}.mode: expected online where train.on_policy_fraction is above 0, for a cache "
            "has nothing on new answers, got 'cache'; set --config.train.on_policy_fraction=0"
        )
    if teacher.cache_ids > teacher.cache_cap:
        errors.append(
            f"{name}.cache_ids: expected at most {name}.cache_cap = {teacher.cache_cap}, "
            f"got {teacher.cache_ids}; set --config.{name}.cache_cap higher"
        )
    return errors


def _distance_errors(name: str, teacher: TeacherConfig, distance: str) -> list[str]:
    cached = teacher.mode == "cache" and distance in DIVERGENCES
    if distance == "uld" or teacher.mode == "online" or (cached and teacher.cache_ids):
        return []
    if cached:
        return [
            f"{name}.cache_ids: expected at least 1 where loss.distance is {distance}, as many as "
            f"the cache keeps, got 0; set --config.{name}.cache_ids=64"
        ]
    return [
        f"{name}.mode: expected {'online or cache' if distance in DIVERGENCES else 'online'} where "
        f"loss.distance is {distance}, for which sorted probabilities are not enough, got "
        f"{teacher.mode!r}; set --config.{name}.mode=online or --config.loss.distance=uld"
    ]


def _server_errors(name: str, teacher: TeacherConfig, temperature: float) -> list[str]:
    errors = []
    if teacher.server and not teacher.server_model:
        errors.append(
            f"{name}.server_model: expected the name that the server knows the model by, got ''; "
            f"set --config.{name}.server_model=NAME"
        )
    if teacher.server and temperature != 1:
        errors.append(
            f"loss.teacher_temperature: expected 1 where {name}.server is set, for a server tells "
            f"probabilities at 1 alone, got {temperature}; set --config.loss.teacher_temperature=1"
        )
    return errors


def _feature_errors(name: str, teacher: TeacherConfig, loss: LossConfig) -> list[str]:
    weights = {"hidden_weight": loss.hidden_weight, "attention_weight": loss.attention_weight}
    used = [f"loss.{weight}" for weight, value in weights.items() if value > 0]
    if not used or teacher.mode == "online":
        return []
    return [
        f"{name}.mode: expected online where {' and '.join(used)} "
        f"{'are' if len(used) > 1 else 'is'} above 0, for only a model that reads in the step has "
        f"hidden states and attention, got {teacher.mode!r}; set --config.{name}.mode=online, or "
        + " ".join(f"--config.{weight}=0" for weight in used)
    ]


def _generate_errors(generate: GenerateConfig) -> list[str]:
    errors = []
    if (generate.stop == "strings") != (json.loads(generate.stop_strings) != []):
        errors.append(
            "generate.stop: expected strings together with generate.stop_strings, got "
            f"{generate.stop} with {generate.stop_strings}; set --config.generate.stop=strings "
            """and --config.generate.stop_strings='["Question:"]', or neither"""
        )
    if generate.samples > 1 and generate.temperature == 0:
        errors.append(
            "generate.samples: expected 1 where generate.temperature is 0, as all would be the "
            f"same, got {generate.samples}; set --config.generate.temperature=1"
        )
    return errors


def _no_room(answer: str, length: str, new_tokens: int, max_length: int) -> str:
    return (
        f"{answer}: expected less than {length} = {max_length}, which holds prompt and answer, "
        f"got {new_tokens}; set --config.{length} higher or --config.{answer} lower"
    )


def _mesh_errors(mesh: MeshConfig, device_count: int | None) -> list[str]:
    sizes = [*mesh.axes.values()]
    if sizes.count(-1) > 1:
        return [f"mesh: expected at most one axis of -1, got {mesh}; set the others to 1 or more"]
    known = math.prod(size for size in sizes if size != -1)
    if device_count is not None and -1 in sizes and device_count % known:
        return [
            f"mesh: expected axes whose product divides the {device_count} devices, "
            f"got {mesh}, a product of {known}; change the axes that are not -1"
        ]
    if device_count is not None and -1 not in sizes and device_count != known:
        return [
            f"mesh: expected axes that multiply to the {device_count} devices, "
            f"got {mesh} = {known}; set one axis to -1 to take those that remain"
        ]
    data = mesh.data
    if data == -1:  # of unknown size, 0 passes
        data = 0 if device_count is None else device_count // known
    if data % mesh.slices:
        return [
            f"mesh.slices: expected a divisor of mesh.data = {data}, which spans the slices, "
            f"got {mesh.slices}; set --config.mesh.slices=1, or change mesh.data"
        ]
    return []


def _batch_errors(config: RunConfig, device_count: int | None) -> list[str]:
    mesh, batch = config.mesh, config.data.batch_size
    known = math.prod(size for size in mesh.axes.values() if size != -1)
    # Without a device count, the axis of -1 counts as 1: a necessary condition is left.
    remaining = 1 if device_count is None else device_count // known
    data, fsdp = (remaining if size == -1 else size for size in (mesh.data, mesh.fsdp))
    parts = config.train.accumulation * data * fsdp
    if batch % parts == 0:
        return []
    return [
        f"data.batch_size: expected a multiple of {parts} (train.accumulation "
        f"{config.train.accumulation} x mesh.data {data} x mesh.fsdp {fsdp}), got {batch}; "
        f"set --config.data.batch_size={math.ceil(batch / parts) * parts}"
    ]
