"""Mistakes in flags and configs: reported together, before anything is loaded or written."""

import pytest

from uld_jax import config as configs
from uld_jax.cli.main import main


@pytest.fixture
def refused(uld, tiny, tmp_path):
    """Runs `train` with bad flags; returns the lines on stderr."""

    def run(*flags, config=tiny.config):
        workdir = tmp_path / "run"
        result = uld("train", *([config] if config else []), f"--workdir={workdir}", *flags)
        assert result.status == 2
        assert not workdir.exists()
        lines = result.err.splitlines()
        assert lines[0].startswith("error: ")
        assert sum("error: " in line for line in lines) == 1
        return lines

    return run


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (
            "--config.data.batch_sise=8",
            "unknown config field 'data.batch_sise': did you mean 'data.batch_size'?",
        ),
        ("--config.data.batch_size=many", "data.batch_size: expected int, got 'many'"),
        ("--config.train.epochs=1.5", "train.epochs: expected int, got '1.5'"),
        ("--config.loss.skip_student_eos=perhaps", "expected bool, got 'perhaps'"),
        ("--config.loss.convention=tokens", "one of token_mean, official, got 'tokens'"),
        ("--config.mesh.data=3", "axes that multiply to the 8 devices, got data 3"),
        ("--config.mesh.fsdp=3", "axes whose product divides the 8 devices, got data -1 x fsdp 3"),
        ("--config.data.batch_size=12", "expected a multiple of 8"),
        ("--config.data=builtin", "config group 'data' has no value of its own"),
    ],
)
def test_one_mistake(refused, flag, expected):
    head, line = refused(flag)
    assert head == "error: 1 error in the config:"
    assert expected in line


def test_batch_size_error_says_what_would_fit(refused):
    _, line = refused("--config.data.batch_size=12", "--config.train.accumulation=2")
    assert line.endswith("got 12; set --config.data.batch_size=16")


def test_all_mistakes_at_once(refused):
    lines = refused(
        "--config.data.sorce=builtin", "--config.train.epochs=0", "--config.loss.uld_weight=-1"
    )
    assert lines[0] == "error: 3 errors in the config:"
    for line, name in zip(
        lines[1:], ("data.sorce", "loss.uld_weight", "train.epochs"), strict=True
    ):
        assert name in line


def test_override_without_value(refused):
    lines = refused("--config.data.batch_size")
    expected = "--config.data.batch_size has no value: write --config.data.batch_size=VALUE"
    assert lines == [f"error: {expected}"]


def test_override_with_its_value_after_a_blank(tiny, uld, tmp_path):
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'run'}", "--config.mesh.data", "3")
    assert "got data 3" in result.err


def test_config_file_absent(refused):
    (line,) = refused(config="--config=nowhere/absent.py")
    assert "config file 'nowhere/absent.py'" in line
    assert "check --config" in line


def test_no_config_at_all(refused):
    (line,) = refused(config=None)
    assert "has no config.json to resume from: give --config=FILE.py" in line


def test_evaluate_without_any_run(uld):
    result = uld("evaluate")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "give --config=FILE.py" in result.err


def test_workdir_of_another_config_names_the_fields(tiny, trained, uld):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    result = uld(
        "train",
        tiny.config,
        f"--workdir={trained}",
        "--config.optimizer.learning_rate=5e-4",
        "--config.train.epochs=3",
    )
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "optimizer.learning_rate: 0.03 in the workdir, 0.0005 given" in result.err
    assert "train.epochs: 2 in the workdir, 3 given" in result.err
    assert "choose another --workdir" in result.err
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_workdir_with_a_broken_config(unfinished, uld):
    saved = unfinished / "config.json"
    saved.write_text(saved.read_text()[:100])
    result = uld("train", f"--workdir={unfinished}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"{saved}: not JSON" in result.err


def test_workdir_below_a_file(tiny, uld, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'file' / 'run'}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "cannot write there (Not a directory); choose another directory" in result.err
    assert (tmp_path / "file").read_text() == "in the way"


def test_workdir_is_required(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train"])
    assert "error: the following arguments are required: --workdir" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["generate", "--help"]])
def test_help_names_what_matters(capsys, arguments):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    out = capsys.readouterr().out
    expected = ["uld-jax fields", "--config.data.batch_size=16", "--workdir=runs/first"]
    if arguments == ["--help"]:
        expected += ["train", "generate", "evaluate", "export", "fields"]
    else:
        expected += ["--config FILE.py", "--workdir DIR"]
    assert [text for text in expected if text not in out] == []


def test_fields_lists_every_field(uld):
    result = uld("fields")
    assert result.status == 0
    missing = [path for path in configs.fields.FIELDS if f"--config.{path}=" not in result.out]
    assert missing == []
    assert "data.batch_size=8 (int)" in result.out
