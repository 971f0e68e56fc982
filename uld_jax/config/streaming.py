"""Mistakes in the settings of teachers that stream from devices of their own."""

from uld_jax.config.schema import RunConfig, TeacherConfig

FIELDS = ("mode", "devices", "fsdp", "tensor", "stream_batch_size")


def streaming_devices(config: RunConfig) -> dict[str, int]:
    """How many devices of each process every streaming teacher has, by the path of its group.

    Args:
        config: any config.

    Returns:
        One entry a teacher that streams.

    Example:
        >>> streaming_devices(RunConfig(teacher=TeacherConfig(mode="stream", devices=4)))
        {'teacher': 4}
    """
    groups = config.teacher_groups().items()
    return {path: teacher.devices for path, teacher in groups if teacher.mode == "stream"}


def streaming_errors(
    config: RunConfig, *, device_count: int | None = None, process_count: int = 1
) -> list[str]:
    """Find the mistakes, `FIELDS` being sound on their own.

    Args:
        config: any config.
        device_count: devices of all processes; None = unknown, and not checked.
        process_count: processes, each with as many devices.

    Returns:
        One line each, as `validate`.

    Example:
        >>> streaming_errors(RunConfig(teacher=TeacherConfig(mode="stream")))
        ['teacher.devices: expected at least 1 where teacher.mode is stream, got 0; \
set --config.teacher.devices=1']
    """
    errors = []
    for path, teacher in config.teacher_groups().items():
        if teacher.mode == "stream" and not teacher.devices:
            errors.append(
                f"{path}.devices: expected at least 1 where {path}.mode is stream, got 0; "
                f"set --config.{path}.devices=1"
            )
        if teacher.mode != "stream" and teacher.devices:
            errors.append(
                f"{path}.devices: expected 0 where {path}.mode is {teacher.mode}, "
                f"got {teacher.devices}; set --config.{path}.mode=stream"
            )
    taken = streaming_devices(config)
    if errors or not taken:
        return errors
    if config.train.on_policy_fraction:
        errors.append(
            "train.on_policy_fraction: expected 0 where a teacher streams, since it reads batches "
            f"before the student writes in them, got {config.train.on_policy_fraction}; "
            "set --config.train.on_policy_fraction=0"
        )
    if device_count is None:
        return errors
    present = device_count // process_count
    if sum(taken.values()) >= present:
        which = ", ".join(f"{path}.devices" for path in taken)
        return [
            *errors,
            f"{which}: expected less than the {present} devices of a process, so that the student "
            f"has some, got {sum(taken.values())}; set --config.{next(iter(taken))}.devices lower",
        ]
    for path in taken:
        errors += _shape_errors(path, config, process_count)
    return errors


def _shape_errors(path: str, config: RunConfig, process_count: int) -> list[str]:
    """The teacher's mesh does not fill its devices, or does not divide its batches."""
    teacher: TeacherConfig = config.teacher_groups()[path]
    if teacher.devices % teacher.tensor:
        return [
            f"{path}.tensor: expected a divisor of {path}.devices = {teacher.devices}, "
            f"got {teacher.tensor}; set --config.{path}.tensor={teacher.devices}"
        ]
    shards = teacher.devices * process_count // teacher.tensor
    if shards % teacher.fsdp:
        return [
            f"{path}.fsdp: expected a divisor of {shards} ({path}.devices {teacher.devices} x "
            f"processes {process_count} / {path}.tensor {teacher.tensor}), got {teacher.fsdp}; "
            f"set --config.{path}.fsdp={shards}"
        ]
    batch = config.data.batch_size
    rows = teacher.stream_batch_size or batch // config.train.accumulation
    if rows and batch % rows == rows % shards == 0:
        return []
    return [
        f"{path}.stream_batch_size: expected a divisor of data.batch_size = {batch} that is a "
        f"multiple of {shards} ({path}.devices {teacher.devices} x processes {process_count} / "
        f"{path}.tensor {teacher.tensor}), got {rows}; "
        f"set --config.data.batch_size to a multiple of {shards}"
    ]
