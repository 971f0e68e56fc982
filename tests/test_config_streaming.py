"""Settings of teachers that stream: what their devices and the student's must have in common."""

import pytest

from uld_jax.config import ModelConfig, RunConfig, TeacherConfig, apply_overrides, validate

SOUND = RunConfig(
    student=ModelConfig(source="s"), teacher=TeacherConfig(source="t", mode="stream", devices=4)
)


def errors(overrides, *, devices=8, processes=1):
    config, wrong = apply_overrides(SOUND, overrides)
    assert wrong == []
    return validate(config, device_count=devices, process_count=processes)


@pytest.mark.parametrize(
    ("overrides", "devices", "processes"),
    [
        ({}, 8, 1),
        ({}, None, 1),
        ({"mesh.data": 2, "mesh.tensor": 2, "teacher.tensor": 4}, 8, 1),
        ({"teacher.devices": 2, "teacher.fsdp": 4}, 8, 2),
        ({"teacher.devices": 6, "teacher.tensor": 3, "mesh.data": 2}, 8, 1),
        ({"teacher.stream_batch_size": 4, "data.batch_size": 16, "train.accumulation": 2}, 8, 1),
        ({"train.accumulation": 4, "mesh.tensor": 4, "teacher.stream_batch_size": 8}, 8, 1),
    ],
)
def test_sound(overrides, devices, processes):
    assert errors(overrides, devices=devices, processes=processes) == []


def test_several_teachers_share_what_the_student_leaves():
    second = {"extra_teachers.0.source": "u", "extra_teachers.0.mode": "stream"}
    assert errors(second | {"extra_teachers.0.devices": 2, "mesh.data": 2}) == []
    (error,) = errors(second | {"extra_teachers.0.devices": 4})
    assert error == (
        "teacher.devices, extra_teachers.0.devices: expected less than the 8 devices of a process, "
        "so that the student has some, got 8; set --config.teacher.devices lower"
    )


@pytest.mark.parametrize(
    ("overrides", "processes", "error"),
    [
        (
            {"teacher.devices": 0},
            1,
            "teacher.devices: expected at least 1 where teacher.mode is stream, got 0; "
            "set --config.teacher.devices=1",
        ),
        (
            {"teacher.mode": "online"},
            1,
            "teacher.devices: expected 0 where teacher.mode is online, got 4; "
            "set --config.teacher.mode=stream",
        ),
        (
            {"train.on_policy_fraction": 0.5},
            1,
            "train.on_policy_fraction: expected 0 where a teacher streams, since it reads batches "
            "before the student writes in them, got 0.5; set --config.train.on_policy_fraction=0",
        ),
        (
            {},
            2,
            "teacher.devices: expected less than the 4 devices of a process, so that the student "
            "has some, got 4; set --config.teacher.devices lower",
        ),
        (
            {"teacher.tensor": 3},
            1,
            "teacher.tensor: expected a divisor of teacher.devices = 4, got 3; "
            "set --config.teacher.tensor=4",
        ),
        (
            {"teacher.devices": 2, "teacher.fsdp": 8},
            2,
            "teacher.fsdp: expected a divisor of 4 (teacher.devices 2 x processes 2 / "
            "teacher.tensor 1), got 8; set --config.teacher.fsdp=4",
        ),
        (
            {"train.accumulation": 2, "mesh.tensor": 2, "data.batch_size": 12},
            1,
            "teacher.stream_batch_size: expected a divisor of data.batch_size = 12 that is a "
            "multiple of 4 (teacher.devices 4 x processes 1 / teacher.tensor 1), got 6; "
            "set --config.data.batch_size to a multiple of 4",
        ),
        (
            {"teacher.stream_batch_size": 3},
            1,
            "teacher.stream_batch_size: expected a divisor of data.batch_size = 8 that is a "
            "multiple of 4 (teacher.devices 4 x processes 1 / teacher.tensor 1), got 3; "
            "set --config.data.batch_size to a multiple of 4",
        ),
        (
            {"mesh.data": 8},
            1,
            "mesh: expected axes that multiply to the 4 devices, got data 8 x fsdp 1 x sequence 1 "
            "x tensor 1 = 8; set one axis to -1 to take those that remain",
        ),
    ],
)
def test_contradiction_is_one_error(overrides, processes, error):
    assert errors(overrides, processes=processes) == [error]
