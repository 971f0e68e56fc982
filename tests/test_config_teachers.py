"""Several teachers in one config: paths, overrides, JSON and mistakes."""

import dataclasses
import json

import pytest

from uld_jax.config import (
    ModelConfig,
    RunConfig,
    TeacherConfig,
    apply_overrides,
    differences,
    from_dict,
    to_dict,
    validate,
)
from uld_jax.errors import UserError

SOUND = RunConfig(student=ModelConfig(source="s"), teacher=TeacherConfig(source="a"))

MORE = {
    "extra_teachers.0.source": "b",
    "extra_teachers.0.share": "3",
    "extra_teachers.1.source": "c",
}


def test_more_teachers_are_set_by_their_number():
    config, errors = apply_overrides(SOUND, MORE)
    assert (errors, validate(config, device_count=8)) == ([], [])
    assert [teacher.source for teacher in config.teachers] == [SOUND.teacher.source, "b", "c"]
    assert config.teacher_shares == (0.2, 0.6, 0.2)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert (
        differences(SOUND, config)[0]
        == "extra_teachers.0.source: 'absent' in the workdir, 'b' given"
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "extra_teachers.1.source",
            "b",
            "extra_teachers.1: expected the number of an",
        ),
        (
            "extra_teachers.0.sorce",
            "b",
            "unknown config field 'extra_teachers.0.sorce': ",
        ),
        ("extra_teachers.0.share", "much", "extra_teachers.0.share: expected float, got 'much'"),
    ],
)
def test_a_mistake_in_another_teacher_is_named(path, value, message):
    _, (error,) = apply_overrides(SOUND, {path: value})
    assert error.startswith(message)


def test_an_unsound_value_of_another_teacher_is_named():
    config, _ = apply_overrides(SOUND, MORE | {"extra_teachers.1.shots": "-1"})
    (error,) = validate(config, device_count=8)
    assert error.startswith("extra_teachers.1.shots: expected a finite number >= 0, got -1; set")
    with pytest.raises(UserError, match=r"extra_teachers: expected a tuple, got list; write"):
        dataclasses.replace(SOUND, extra_teachers=[SOUND.teacher])
    with pytest.raises(UserError, match=r"extra_teachers.0: expected TeacherConfig, got ModelC"):
        dataclasses.replace(SOUND, extra_teachers=(SOUND.student,))
