"""Models and data that cannot be used: one line that names the thing, and nothing written."""

import json

import gguf
import numpy as np
import pytest


@pytest.fixture
def refused(uld, tiny, tmp_path):
    """Runs `train` on bad input; returns the one error line."""

    def run(*flags):
        workdir = tmp_path / "run"
        result = uld("train", tiny.config, f"--workdir={workdir}", *flags)
        assert result.status == 2
        assert not workdir.exists()
        # A data set's first use comes with a notice of TFDS.
        error = result.err.splitlines()[-1]
        assert error.startswith("error: ")
        assert result.err.count("error: ") == 1
        assert "Traceback" not in result.err
        return error

    return run


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("name", ["absent.gguf", "absent"])
def test_model_absent(refused, tmp_path, which, name):
    path = tmp_path / name
    error = refused(f"--config.{which}.source={path}")
    assert f"{path}: no such {'file' if name.endswith('gguf') else 'directory'}" in error


def test_truncated_gguf(refused, tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    error = refused(f"--config.student.source={path}")
    assert f"{path}: not a complete GGUF file" in error
    assert f"its {len(whole) // 2} bytes may be a download cut short: fetch it again" in error


@pytest.mark.real_models
def test_truncated_real_gguf(refused, tmp_path, smollm_gguf):
    path = tmp_path / "model.gguf"
    with smollm_gguf.open("rb") as file:
        path.write_bytes(file.read(smollm_gguf.stat().st_size // 2))
    assert f"{path}: not a complete GGUF file" in refused(f"--config.student.source={path}")


def test_all_wrong_tensors_in_one_message(refused, tiny, tmp_path):
    directory = tiny.copy("student", tmp_path / "model")

    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["surplus.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((5, 32), np.float32)

    tiny.change_weights(directory, spoil)
    error = refused(f"--config.student.source={directory}")
    for part in (
        f"{directory}: 3 problems with its weights",
        "missing model.norm.weight",
        "unexpected surplus.weight",
        "model.layers.1.mlp.up_proj.weight has shape (5, 32), expected (48, 32)",
    ):
        assert part in error


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(refused, tiny, tmp_path, share):
    path = tiny.copy("student", tmp_path / "model") / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    error = refused(f"--config.student.source={path.parent}")
    assert f"{path}: not a complete safetensors file" in error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_model_file_absent(refused, tiny, tmp_path, name):
    path = tiny.copy("student", tmp_path / "model") / name
    path.unlink()
    assert f"{path}: no such" in refused(f"--config.student.source={path.parent}")


def test_unsupported_architecture(refused, tiny, tmp_path):
    path = tiny.copy("teacher", tmp_path / "model") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    error = refused(f"--config.teacher.source={path.parent}")
    assert f"{path}: model_type 'mamba' is not supported; supported: [" in error


def test_data_absent(refused, tmp_path):
    path = tmp_path / "absent.jsonl"
    assert f"{path}: no such file" in refused(f"--config.data.source=jsonl:{path}")


def test_unknown_data_source(refused):
    assert "data source 'squat': expected one of" in refused("--config.data.source=squat")


def test_data_not_json(refused, tiny, tmp_path):
    path = tmp_path / "qa.jsonl"
    source = tiny.write(path, [tiny.record(1), tiny.record(2)])
    path.write_text(path.read_text() + "{no json\n")
    assert f"{path}:3: not JSON" in refused(source)


@pytest.mark.parametrize("field", ["context", "question", "answer"])
def test_data_without_a_field(refused, tiny, tmp_path, field):
    records = [tiny.record(number) for number in range(3)]
    del records[1][field]
    source = tiny.write(tmp_path / "qa.jsonl", records)
    assert f"{tmp_path / 'qa.jsonl'}:2: field '{field}'" in refused(source)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_every_prompt_too_long(refused, which):
    error = refused(f"--config.{which}.max_length=30")
    assert f"{which}.max_length=30: all 16 training prompts leave no room" in error
    assert f"set --config.{which}.max_length higher, or --config.{which}.shots lower" in error


def test_every_answer_too_long_or_empty(refused, tiny, tmp_path):
    records = [
        tiny.record(number, answer="wheat " * 60 if number < 10 else " ") for number in range(20)
    ]
    source = tiny.write(tmp_path / "qa.jsonl", records)
    error = refused(source, "--config.data.answers=gold")
    assert "none of 16 examples is left: 8 with an empty answer" in error
    assert "8 over the student's max_length 256" in error


def test_shots_from_too_few_examples(refused):
    assert "16 shots wanted, but only 15 of the 16" in refused("--config.teacher.shots=16")


def test_chat_without_a_template(refused):
    assert "has no chat template" in refused("--config.student.chat=always")


def test_teacher_that_answers_nothing(uld, tiny, tmp_path, silent_teacher):
    result = uld(
        "train",
        tiny.config,
        f"--workdir={tmp_path / 'run'}",
        f"--config.teacher.source={silent_teacher}",
    )
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "none of 16 examples is left: 16 with an empty answer" in result.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_generate_writes_no_empty_file(uld, tiny, tmp_path, silent_teacher):
    output = tmp_path / "answers.jsonl"
    result = uld(
        "generate", tiny.config, f"--output={output}", f"--config.teacher.source={silent_teacher}"
    )
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "none of 16 questions has an answer; left out: 16 with an empty answer" in result.err
    assert not output.exists()


def test_generate_overwrites_nothing(uld, tiny):
    output = tiny.root / "qa.jsonl"
    before = output.read_bytes()
    result = uld("generate", tiny.config, f"--output={output}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"--output={output}: exists; choose another file" in result.err
    assert output.read_bytes() == before


def test_export_overwrites_nothing(uld, trained):
    result = uld("export", f"--workdir={trained}", f"--output={trained / 'student'}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "student: exists and is not an empty directory; choose another" in result.err


@pytest.mark.parametrize(("command", "output"), [("evaluate", "output.json"), ("export", "output")])
def test_run_without_a_checkpoint(uld, tiny, tmp_path, trained, command, output):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_bytes((trained / "config.json").read_bytes())
    result = uld(command, f"--workdir={workdir}", f"--output={tmp_path / output}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "no whole checkpoint; has the run begun to train?" in result.err
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    assert not (tmp_path / output).exists()
