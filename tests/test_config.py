import dataclasses
import json

import pytest

from uld_jax.config import (
    BaseModelConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    apply_overrides,
    differences,
    from_dict,
    load,
    resolve,
    to_dict,
    validate,
)
from uld_jax.config.fields import FIELDS
from uld_jax.config.schema import GROUPS
from uld_jax.errors import UserError

SOUND = RunConfig(student=ModelConfig(source="student"), teacher=TeacherConfig(source="teacher"))


def test_paper_settings_are_the_defaults_and_not_those_of_optax():
    loss, optimizer = LossConfig(), OptimizerConfig()
    assert (loss.uld_weight, loss.ce_weight) == (1.5, 1.0)
    assert (loss.student_temperature, loss.teacher_temperature) == (1.0, 1.0)
    assert (loss.skip_student_eos, loss.skip_teacher_eos) == (True, False)
    assert (optimizer.pct_start, optimizer.div_factor, optimizer.final_div_factor) == (0.1, 2, 5)
    assert (optimizer.schedule, optimizer.weight_decay) == ("one_cycle", 0.1)


@pytest.mark.parametrize("name", GROUPS)
def test_every_field_is_documented(name):
    described = GROUPS[name].__doc__ + BaseModelConfig.__doc__
    for field in dataclasses.fields(GROUPS[name]):
        assert f"\n        {field.name}: " in described


def test_defaults_lack_only_the_two_models():
    assert [error.split(":")[0] for error in validate(RunConfig())] == [
        "student.source",
        "teacher.source",
    ]
    assert validate(SOUND, device_count=8) == []


def test_config_is_frozen_and_resolve_returns_it():
    assert resolve(SOUND, device_count=8) == SOUND
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOUND.data = DataConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOUND.data.batch_size = 1


def test_a_group_of_the_wrong_class_is_refused():
    with pytest.raises(UserError, match=r"RunConfig.teacher: expected TeacherConfig, got ModelCon"):
        RunConfig(teacher=ModelConfig())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("path", "given", "value"),
    [
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.div_factor", "3", 3.0),
        ("optimizer.div_factor", 3, 3.0),
        ("data.batch_size", "16", 16),
        ("data.batch_size", 16, 16),
        ("mesh.data", "-1", -1),
        ("data.source", "16", "16"),
        ("data.eval_source", "", ""),
        ("loss.skip_teacher_eos", "true", True),
        ("loss.skip_student_eos", "False", False),
        ("teacher.append_eos", True, True),
        ("teacher.source", "a/b.gguf", "a/b.gguf"),
    ],
)
def test_override_is_read_as_the_type_of_its_field(path, given, value):
    config, errors = apply_overrides(RunConfig(), {path: given})
    group, name = path.split(".")
    found = getattr(getattr(config, group), name)
    assert errors == []
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("path", "given", "error"),
    [
        ("data.sorce", "x", "unknown config field 'data.sorce': did you mean 'data.source'?"),
        (
            "learning_rate",
            "1",
            "unknown config field 'learning_rate': did you mean 'optimizer.learning_rate'?",
        ),
        (
            "zzz",
            "1",
            "unknown config field 'zzz': the groups are student, teacher, data, loss, optimizer, "
            "train, mesh, eval, generate",
        ),
        (
            "mesh",
            "8",
            "config group 'mesh' has no value of its own: set one of its fields "
            "(data, fsdp, tensor, sequence, slices)",
        ),
        ("data.batch_size", "many", "data.batch_size: expected int, got 'many'"),
        ("data.batch_size", "3.0", "data.batch_size: expected int, got '3.0'"),
        ("data.batch_size", 3.0, "data.batch_size: expected int, got 3.0"),
        ("data.batch_size", True, "data.batch_size: expected int, got True"),
        ("data.source", 3, "data.source: expected str, got 3"),
        ("optimizer.eps", "tiny", "optimizer.eps: expected float, got 'tiny'"),
        ("optimizer.eps", None, "optimizer.eps: expected float, got None"),
        ("teacher.append_eos", "1", "teacher.append_eos: expected bool, got '1'"),
        ("teacher.append_eos", 1, "teacher.append_eos: expected bool, got 1"),
    ],
)
def test_bad_override_is_one_line_and_changes_nothing(path, given, error):
    assert apply_overrides(SOUND, {path: given}) == (SOUND, [error])


def test_good_overrides_are_set_beside_bad_ones():
    config, errors = apply_overrides(SOUND, {"data.sed": "1", "data.seed": "7", "mesh.fsdp": "x"})
    assert config.data.seed == 7
    assert len(errors) == 2
    assert SOUND.data.seed == 0


# One unsound value for every rule that a field has on its own.
UNSOUND = {
    "student.source": "",
    "student.dtype": "float16",
    "student.param_dtype": "float64",
    "student.remat": "all",
    "student.shots": -1,
    "student.chat": "yes",
    "student.max_length": 0,
    "student.lora_rank": -1,
    "student.lora_alpha": 0.0,
    "student.lora_targets": "attention.query,mlp",
    "teacher.source": "",
    "teacher.dtype": "float16",
    "teacher.param_dtype": "float64",
    "teacher.remat": "all",
    "teacher.shots": -1,
    "teacher.chat": "yes",
    "teacher.share": 0.0,
    "teacher.cache_epsilon": 0.6,
    "teacher.cache_cap": 0,
    "teacher.cache_ids": -1,
    "teacher.cache_shard_size": 0,
    "teacher.server_top_k": 0,
    "teacher.server_concurrency": 0,
    "teacher.server_retries": -1,
    "teacher.server_max_failed": 1.0,
    "teacher.max_length": 0,
    "teacher.mode": "offline",
    "teacher.quantize": "int2",
    "teacher.max_new_tokens": 0,
    "teacher.batch_size": 0,
    "teacher.devices": -1,
    "teacher.fsdp": 0,
    "teacher.tensor": 0,
    "teacher.stream_depth": 0,
    "teacher.stream_batch_size": -1,
    "teacher.stream_top_k": -1,
    "data.source": "",
    "data.task": "summary",
    "data.titles": "student",
    "data.train_examples": -1,
    "data.eval_examples": -1,
    "data.answers": "golden",
    "data.batch_size": 0,
    "data.buckets": 0,
    "data.seed": -1,
    "loss.uld_weight": -0.1,
    "loss.ce_weight": float("inf"),
    "loss.student_temperature": 0.0,
    "loss.teacher_temperature": float("nan"),
    "loss.distance": "js",
    "loss.beta": 1.0,
    "loss.alpha": 0.0,
    "loss.transport_top_k": 0,
    "loss.transport_epsilon": 0.0,
    "loss.convention": "mean",
    "loss.alignment": "bytes",
    "loss.method": "quick",
    "loss.label_smoothing": 1.0,
    "loss.z_loss": -0.1,
    "loss.chunk_size": 0,
    "loss.hidden_weight": -0.1,
    "loss.hidden_kind": "kl",
    "loss.attention_weight": -0.1,
    "loss.attention_kind": "cosine",
    "loss.feature_layers": "first",
    "optimizer.learning_rate": 0.0,
    "optimizer.schedule": "linear",
    "optimizer.pct_start": 1.0,
    "optimizer.div_factor": 0.5,
    "optimizer.final_div_factor": 0.5,
    "optimizer.weight_decay": -1.0,
    "optimizer.b1": 1.0,
    "optimizer.b2": -0.1,
    "optimizer.eps": 0.0,
    "optimizer.clip_norm": -1.0,
    "train.epochs": 0,
    "train.max_steps": -1,
    "train.accumulation": 0,
    "train.checkpoint_every": 0,
    "train.keep_checkpoints": 0,
    "train.log_every": 0,
    "train.profile_from": -1,
    "train.profile_steps": 0,
    "train.max_nonfinite_steps": 0,
    "train.on_policy_fraction": 1.5,
    "train.on_policy_temperature": 0.0,
    "train.on_policy_tokens": 0,
    "train.seed": -1,
    "mesh.data": 0,
    "mesh.fsdp": -2,
    "mesh.tensor": 0,
    "mesh.sequence": 0,
    "mesh.slices": 0,
    "eval.batch_size": 0,
    "eval.max_new_tokens": 0,
    "eval.samples": -1,
    "generate.split": "test",
    "generate.samples": 0,
    "generate.temperature": -1.0,
    "generate.top_k": -1,
    "generate.top_p": 0.0,
    "generate.seed": -1,
    "generate.stop": "line",
    "generate.stop_strings": '["Question:", ""]',
    "generate.cut_answers": "maybe",
    "generate.shard_size": 0,
}


def test_every_rule_has_an_unsound_value_here():
    assert UNSOUND.keys() == {path for path, field in FIELDS.items() if field.metadata}


@pytest.mark.parametrize("path", UNSOUND)
def test_unsound_value_is_one_error_with_expectation_actual_and_fix(path):
    config, errors = apply_overrides(SOUND, {path: UNSOUND[path]})
    assert errors == []
    (error,) = validate(config, device_count=8)
    assert error.startswith(f"{path}: expected {FIELDS[path].metadata['expected']}, ")
    assert f"got {UNSOUND[path]!r}; set --config.{path}=" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ({"teacher.mode": "cache"}, "teacher.cache: expected the directory of a teacher cache "),
        ({"teacher.cache_ids": "9", "teacher.cache_cap": "8"}, "teacher.cache_ids: expected at "),
    ],
)
def test_a_cache_that_cannot_be(overrides, error):
    (found,) = validate(apply_overrides(SOUND, overrides)[0])
    assert found.startswith(error)
    assert "set --config.teacher.cache" in found


def test_features_need_teachers_that_read_in_the_step():
    stream = {"teacher.mode": "stream", "teacher.devices": 4}
    overrides = {**stream, "loss.hidden_weight": 1, "loss.attention_weight": 1}
    (error,) = validate(apply_overrides(SOUND, overrides)[0], device_count=8)
    assert error.startswith(
        "teacher.mode: expected online where loss.hidden_weight and loss.attention_weight are "
        "above 0, "
    )
    assert error.endswith(
        ", got 'stream'; set --config.teacher.mode=online, or --config.loss.hidden_weight=0 "
        "--config.loss.attention_weight=0"
    )
    cached = {"teacher.mode": "cache", "teacher.cache": "c"}
    overrides = {**cached, "loss.attention_weight": 1}
    (error,) = validate(apply_overrides(SOUND, overrides)[0], device_count=8)
    assert error.startswith("teacher.mode: expected online where loss.attention_weight is above")
    online = {"train.on_policy_fraction": 0.5, "loss.hidden_weight": 1}
    assert validate(apply_overrides(SOUND, online)[0], device_count=8) == []


def test_choices_and_default_are_named():
    (error,) = validate(apply_overrides(SOUND, {"loss.convention": "mean"})[0])
    assert error == (
        "loss.convention: expected one of token_mean, official, got 'mean'; "
        "set --config.loss.convention=token_mean (the default)"
    )


def test_wrong_type_from_a_config_file_is_reported_and_not_compared():
    train = TrainConfig(epochs="3", accumulation=None)  # pyright: ignore[reportArgumentType]
    assert validate(dataclasses.replace(SOUND, train=train), device_count=8) == [
        "train.epochs: expected int, got '3'",
        "train.accumulation: expected int, got None",
    ]


@pytest.mark.parametrize(
    ("overrides", "devices", "error"),
    [
        ({"loss.uld_weight": 0, "loss.ce_weight": 0}, 8, "loss: expected uld_weight or ce_weight"),
        (
            {"teacher.max_length": 32},
            8,
            "teacher.max_new_tokens: expected less than teacher.max_length = 32, which holds "
            "prompt and answer, got 32; set --config.teacher.max_length higher",
        ),
        (
            {"student.lora_targets": "mlp.up"},
            8,
            "student.lora_targets: expected nothing where student.lora_rank is 0 (train all "
            "weights), got 'mlp.up'; set --config.student.lora_rank=8",
        ),
        (
            {"generate.stop": "strings"},
            8,
            "generate.stop: expected strings together with generate.stop_strings, got strings "
            "with []; set",
        ),
        ({"generate.stop_strings": '["Q:"]'}, 8, "generate.stop: expected strings together with"),
        (
            {"generate.samples": 2},
            8,
            "generate.samples: expected 1 where generate.temperature is 0, as all would be the "
            "same, got 2; set --config.generate.temperature=1",
        ),
        (
            {"loss.distance": "kl", "teacher.mode": "stream", "teacher.devices": 4},
            8,
            "teacher.mode: expected online or cache where loss.distance is kl, for which sorted "
            "probabilities are not enough, got 'stream'; set",
        ),
        (
            {"loss.distance": "hybrid", "teacher.mode": "cache", "teacher.cache": "signals"},
            8,
            "teacher.mode: expected online where loss.distance is hybrid, for which",
        ),
        (
            {"loss.distance": "kl", "teacher.mode": "cache", "teacher.cache": "signals"},
            8,
            "teacher.cache_ids: expected at least 1 where loss.distance is kl",
        ),
        (
            {"loss.distance": "transport"},
            8,
            "loss.distance: expected another than transport on 8 devices",
        ),
        ({"student.max_length": 20}, 8, "eval.max_new_tokens: expected less than student.max_len"),
        (
            {"mesh.fsdp": -1},
            8,
            "mesh: expected at most one axis of -1, got data -1 x fsdp -1 x sequence 1 x "
            "tensor 1; set",
        ),
        (
            {"mesh.data": 2, "mesh.fsdp": 2},
            8,
            "mesh: expected axes that multiply to the 8 devices, got data 2 x fsdp 2 x "
            "sequence 1 x tensor 1 = 4; set one axis to -1",
        ),
        (
            {"mesh.tensor": 3},
            8,
            "mesh: expected axes whose product divides the 8 devices, got data -1 x fsdp 1 x "
            "sequence 1 x tensor 3, a product of 3; change",
        ),
        ({"mesh.tensor": 16}, 8, "mesh: expected axes whose product divides the 8 devices"),
        ({"mesh.sequence": 3}, 8, "mesh: expected axes whose product divides the 8 devices"),
        (
            {"mesh.fsdp": 4, "mesh.slices": 4},
            8,
            "mesh.slices: expected a divisor of mesh.data = 2, which spans the slices, got 4; set",
        ),
        ({"mesh.data": 3, "mesh.slices": 2}, None, "mesh.slices: expected a divisor of mesh.data"),
        (
            {"mesh.sequence": 2, "data.batch_size": 6},
            8,
            "data.batch_size: expected a multiple of 4 (train.accumulation 1 x mesh.data 4 x "
            "mesh.fsdp 1), got 6; set --config.data.batch_size=8",
        ),
        (
            {"train.accumulation": 3, "mesh.data": 2, "mesh.fsdp": -1, "data.batch_size": 8},
            8,
            "data.batch_size: expected a multiple of 24 (train.accumulation 3 x mesh.data 2 x "
            "mesh.fsdp 4), got 8; set --config.data.batch_size=24",
        ),
        (
            {"train.accumulation": 3},
            None,
            "data.batch_size: expected a multiple of 3 (train.accumulation 3 x mesh.data 1 x "
            "mesh.fsdp 1), got 8; set --config.data.batch_size=9",
        ),
    ],
)
def test_contradiction_is_one_error(overrides, devices, error):
    config, override_errors = apply_overrides(SOUND, overrides)
    assert override_errors == []
    (found,) = validate(config, device_count=devices)
    assert found.startswith(error)


@pytest.mark.parametrize("text", ["Question:", '["Q:", 3]', '{"Q:": 1}', '"Q:"', "["])
def test_stop_strings_are_a_list_of_texts(text):
    (error,) = validate(apply_overrides(SOUND, {"generate.stop_strings": text})[0])
    assert error.startswith("generate.stop_strings: expected a JSON list of texts")


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        ({"generate.stop": "strings", "generate.stop_strings": '["\\n\\n", "Q:"]'}, 8),
        ({"generate.samples": 4, "generate.temperature": 0.7}, 8),
        ({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, 8),
        ({"mesh.data": 1, "mesh.tensor": -1, "data.batch_size": 3}, 8),
        ({"mesh.data": 2, "mesh.fsdp": 2}, None),
        ({"mesh.sequence": -1, "mesh.data": 2, "mesh.slices": 2, "data.batch_size": 2}, 8),
        ({"mesh.slices": 3}, None),
        ({"train.accumulation": 2, "data.batch_size": 16}, 8),
    ],
)
def test_sound_together(overrides, devices):
    assert validate(apply_overrides(SOUND, overrides)[0], device_count=devices) == []


def test_resolve_reports_everything_at_once():
    config, errors = apply_overrides(RunConfig(), {"data.sorce": "x", "train.epochs": "0"})
    with pytest.raises(UserError) as caught:
        resolve(config, device_count=3, errors=errors)
    first, *lines = str(caught.value).splitlines()
    assert first == "5 errors in the config:"
    assert [line.split(":")[0].strip() for line in lines] == [
        "unknown config field 'data.sorce'",
        "student.source",
        "teacher.source",
        "train.epochs",
        "data.batch_size",
    ]


def test_json_round_trip():
    config, _ = apply_overrides(SOUND, {"optimizer.learning_rate": "3e-5", "mesh.tensor": "2"})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_json_with_unknown_fields_and_wrong_types_names_them_all():
    values = to_dict(SOUND) | {"mesh": 8, "losses": {}, "colour": {"hue": 1}}
    values["data"] |= {"batchsize": 8, "seed": "0"}
    with pytest.raises(UserError) as caught:
        from_dict(values)
    assert str(caught.value).splitlines() == [
        "5 errors in the config:",
        "  data.seed: expected int, got '0'",
        "  unknown config field 'data.batchsize': did you mean 'data.batch_size'?",
        "  config group 'mesh' has no value of its own: set one of its fields (data, fsdp, tensor, "
        "sequence, slices)",
        "  unknown config field 'losses': did you mean 'loss'?",
        "  unknown config field 'colour': the groups are student, teacher, data, loss, optimizer, "
        "train, mesh, eval, generate",
    ]


def test_differences_name_field_and_both_values():
    given, _ = apply_overrides(SOUND, {"data.batch_size": 16, "student.source": "other"})
    assert differences(SOUND, SOUND) == []
    assert differences(SOUND, given) == [
        "student.source: 'student' in the workdir, 'other' given",
        "data.batch_size: 8 in the workdir, 16 given",
    ]


FILE = """
from uld_jax.config import DataConfig, ModelConfig, RunConfig, TeacherConfig

STUDENT = "student"

def get_config(source="builtin"):
    return RunConfig(
        student=ModelConfig(source=STUDENT),
        teacher=TeacherConfig(source="teacher"),
        data=DataConfig(source=source),
    )
"""


def test_load_runs_the_file_with_its_argument_and_overrides(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(FILE)
    assert load(str(path)) == SOUND
    config = load(f"{path}:squad", {"data.batch_size": "16"})
    assert (config.data.source, config.data.batch_size) == ("squad", 16)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.py"]


def test_load_reports_bad_overrides(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(FILE)
    with pytest.raises(
        UserError, match=r"1 error in the config:\n  unknown config field 'data\.s'"
    ):
        load(str(path), {"data.s": "x"})


@pytest.mark.parametrize(
    ("text", "where", "error"),
    [
        ("x = 1\n", "", "expected a function get_config() that returns a RunConfig, found none"),
        ("get_config = 1\n", "", "expected a function get_config()"),
        ("def get_config():\n    return {}\n", "", "expected get_config() to return a RunConfig,"),
        ("x = 1\ndef get_config(:\n", ":2", "SyntaxError: "),
        ("x = 1\nimport no_such_module_\n", ":2", "ModuleNotFoundError: No module named"),
        ("def get_config():\n    return missing\n", ":2", "NameError: name 'missing' is not"),
        ("def get_config(size):\n    return 1 / 0\n", "", "TypeError: get_config() missing 1 req"),
        ("raise ValueError('a\\nb')\n", ":1", "ValueError: a b"),
        (
            "from uld_jax.config import *\nget_config = lambda: RunConfig(data=3)\n",
            ":2",
            "RunConfig.data: expected DataConfig, got int",
        ),
        (
            "from uld_jax.config import *\nget_config = lambda: RunConfig(sed=3)\n",
            ":2",
            "TypeError: RunConfig.__init__() got an unexpected keyword argument 'sed'",
        ),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, text, where, error):
    path = tmp_path / "run.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"config file '{path}{where}': {error}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_one_line(tmp_path):
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(UserError, match="found no file; check --config"):
            load(str(path))


def test_a_config_dict_of_ml_collections_is_taken_as_well(tmp_path):
    file = tmp_path / "dict.py"
    file.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'data': {'batch_size': 32}})\n"
    )
    assert load(str(file)) == RunConfig(data=DataConfig(batch_size=32))
    file.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'data': {'bach_size': 32}})\n"
    )
    with pytest.raises(UserError, match=r"data\.bach_size.*did you mean 'data\.batch_size'"):
        load(str(file))


def test_on_policy_rows_need_a_process_that_knows_the_whole_batch():
    config = dataclasses.replace(SOUND, train=TrainConfig(on_policy_fraction=0.5))
    assert validate(config, device_count=8, process_count=1) == []
    (error,) = validate(config, device_count=8, process_count=2)
    assert error.startswith("train.on_policy_fraction: expected 0 with several processes")
