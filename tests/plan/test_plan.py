"""`uld-jax plan` on tiny models that are nothing but a config.json."""

import json
import sys
from types import SimpleNamespace

import jax
import pytest

from tests.plan.commands import STUDENT, run_commands, write_config
from uld_jax.cli.main import main
from uld_jax.config import LossConfig, RunConfig
from uld_jax.plan import CHIPS, size
from uld_jax.plan.abstract import abstract_mesh, abstract_step
from uld_jax.testing import tiny_config, tiny_gemma

CONFIG = """
from uld_jax.config import *

def get_config():
    return RunConfig(
        student=ModelConfig(source="{root}/student", max_length=128, dtype="bfloat16"),
        teacher=TeacherConfig(
            source="{root}/teacher", max_length=128, max_new_tokens=15, param_dtype="bfloat16"
        ),
        data=DataConfig(batch_size=8),
        mesh=MeshConfig(fsdp=2, tensor=2),
    )
"""
SIZES = {"width": 128, "head_dim": 32, "mlp_width": 256, "layers": 3}
TEACHER = tiny_gemma(vocab_size=1024, **SIZES | {"kv_heads": 2, "local_layers": (True,) * 3})
# Its two layers, with their moments, are 150 GiB.
LARGE = tiny_config(vocab_size=512, width=1024, head_dim=32, mlp_width=2**21)


def layer_parameters(c):
    """Those of one layer's matrices, by hand."""
    attention = 2 * c.width * (c.heads + c.kv_heads) * c.head_dim
    return attention + 3 * c.width * c.mlp_width


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    for name, config in (("student", STUDENT), ("teacher", TEACHER), ("large", LARGE)):
        write_config(config, root / name)
    (root / "config.py").write_text(CONFIG.format(root=root))
    return root


@pytest.fixture(scope="module")
def planned(root):
    """What several commands have said, one process having made them all."""
    plan = ["plan", f"--config={root / 'config.py'}"]
    commands = {
        "fits": [*plan, "--topology=v5e:2x2", f"--json={root / 'fits.json'}"],
        "large": [
            *plan,
            "--topology=v5e:2x2",
            f"--json={root / 'large.json'}",
            f"--config.student.source={root / 'large'}",
        ],
        "answers": [
            *plan,
            "--topology=v5e:2x2",
            "--program=answers",
            f"--json={root / 'answers.json'}",
        ],
        "cache": [*plan, "--topology=v5e:2x2", "--program=cache", f"--json={root / 'cache.json'}"],
        "hosts": [*plan, "--topology=v5e:4x4", "--program=cache"],
        "shape": [*plan, "--topology=v5e:3x3"],
        "slices": [*plan, "--topology=2xv5e:2x2"],
        "mesh": [*plan, "--topology=v5e:2x2", "--config.mesh.tensor=3"],
    }
    return run_commands(commands)


def plans(root, name):
    return json.loads((root / f"{name}.json").read_text())["plans"]


def test_parameter_and_optimizer_bytes_are_those_of_arithmetic(root, planned):
    assert planned["fits"]["status"] == 0, planned["fits"]["err"]
    [plan] = plans(root, "fits")
    # Matrices lie on all four chips; f32 and two f32 moments, and bf16. Norms are left out.
    student = STUDENT.vocab_size * STUDENT.width + 3 * layer_parameters(STUDENT)
    teacher = TEACHER.vocab_size * TEACHER.width + 3 * layer_parameters(TEACHER)
    found = plan["bytes"]
    assert found["student parameters"] == pytest.approx(student * 4 / 4, rel=0.02)
    assert found["optimizer state"] == pytest.approx(student * 8 / 4, rel=0.02)
    assert found["teacher parameters"] == pytest.approx(teacher * 2 / 4, rel=0.02)
    # Tokens and segments of two rows-of-128 arrays a model, four rows a chip, and positions.
    assert found["batch"] == 4 * (4 * 4 * 128 + 5 * 64)
    assert plan["fits"]
    assert plan["total_bytes"] == sum(found.values()) < plan["memory_bytes"] == 16 * 2**30


def test_what_the_compiler_says(root, planned):
    [plan] = plans(root, "fits")
    # A layer gathers its weights over fsdp and reduces its outputs over tensor, and there are 3.
    assert plan["collectives"]["all-gather"]["count"] >= 3
    assert plan["collectives"]["all-reduce"]["count"] >= 3
    assert plan["endless_loops"] == 0
    assert plan["compiler_flops"] > 0
    assert plan["compile_seconds"] > 0.1  # not read from a cache
    estimate = plan["estimate"]
    assert estimate["step"] == max(estimate[name] for name in ("compute", "memory", "network"))
    flops = sum(plan["model_flops"].values())
    assert estimate["compute"] == pytest.approx(flops / 197e12)
    assert plan["intensity"] == pytest.approx(flops / plan["moved_bytes"])
    tokens = 8 * 128 / estimate["step"] / 4
    assert estimate["tokens_per_second_per_chip"] == pytest.approx(tokens)


def test_the_text_has_the_numbers_of_the_json(root, planned):
    [plan] = plans(root, "fits")
    out = planned["fits"]["out"]
    for kind, number in plan["bytes"].items():
        assert [kind, size(number)] == line_of(out, kind), out
    for kind, traffic in plan["collectives"].items():
        expected = (
            f"{kind} {traffic['count']:,} {size(traffic['bytes'])} {size(traffic['sent'])} sent"
        )
        assert expected in " ".join(out.split())
    assert f"total {size(plan['total_bytes'])} of 16.00 GiB: fits" in " ".join(out.split())
    assert "ESTIMATE" in out
    assert f"step {plan['estimate']['step']:.4g} s" in out


def line_of(out, kind):
    """The words of the line about a kind of bytes: the kind, and the size."""
    [line] = [line for line in out.splitlines() if line.startswith(f"  {kind} ")]
    return [kind, " ".join(line.split()[len(kind.split()) :])]


def test_a_model_too_large_does_not_fit(root, planned):
    assert planned["large"]["status"] == 0, planned["large"]["err"]
    [plan] = plans(root, "large")
    assert not plan["fits"]
    assert plan["estimate"] is None
    # Parameters and moments are 24 GiB a chip, before any gradient.
    assert plan["total_bytes"] > plan["bytes"]["optimizer state"] > 16 * 2**30
    assert "DOES NOT FIT" in planned["large"]["out"]


def test_a_tpu_mesh_gets_a_tpu_program(planned):
    assert planned["attention"] == [["tpu", "splash"], ["cpu", "xla"]]


def teacher_bytes():
    """On each of four chips, without norms."""
    return (TEACHER.vocab_size * TEACHER.width + 3 * layer_parameters(TEACHER)) * 2 / 4


def test_the_teachers_answers_are_planned(root, planned):
    assert planned["answers"]["status"] == 0, planned["answers"]["err"]
    prompts, token = plans(root, "answers")
    for plan in (prompts, token):
        assert plan["fits"]
        assert plan["bytes"]["teacher parameters"] == pytest.approx(teacher_bytes(), rel=0.02)
        assert plan["model_flops"]["student"] == 0
        assert f"{plan['program']} on v5e:2x2, data 1 x fsdp 2" in planned["answers"]["out"]
    # 128 slots for the prompt and 15 for the answer of 8 rows a chip, keys and values in f32.
    slots = 128 - 1 + 1 + 15
    cache = 2 * 3 * 8 * slots * TEACHER.kv_heads / 2 * TEACHER.head_dim * 4
    assert token["bytes"]["rows and their cache"] == pytest.approx(cache, rel=0.02)
    # Reading 128 tokens of each row against writing one.
    ratio = prompts["model_flops"]["teacher"] / token["model_flops"]["teacher"]
    assert 64 < ratio < 128
    assert token["endless_loops"] == 1  # whose body is a token


def test_a_cache_of_signals_is_planned(root, planned):
    assert planned["cache"]["status"] == 0, planned["cache"]["err"]
    reading, probabilities = plans(root, "cache")
    for plan in (reading, probabilities):
        assert plan["fits"]
        assert plan["bytes"]["teacher parameters"] == pytest.approx(teacher_bytes(), rel=0.02)
    assert reading["bytes"]["batch"] == 2 * 8 * 128 * 4
    # Hidden states of 8 rows a chip, f32, and where its 8 answers of 16 tokens stand.
    assert probabilities["bytes"]["batch"] == 8 * 128 * TEACHER.width * 4 + 128 * 4
    head = 2 * TEACHER.width * TEACHER.vocab_size
    assert probabilities["model_flops"]["teacher"] == 2 * 128 * head / 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shape", "v5e:3x3"),
        ("mesh", "mesh: expected"),
        ("hosts", "give the slice of one host, such as v5e:2x2"),
        ("slices", "mesh.slices: expected 2, the slices that the 8 devices belong to"),
    ],
)
def test_a_bad_slice_or_mesh_is_one_clear_error(planned, name, expected):
    result = planned[name]
    assert result["status"] == 2
    errors = [line for line in result["err"].splitlines() if "error" in line]
    assert errors[0].startswith("error: "), result["err"]
    assert expected in result["err"]
    assert "Traceback" not in result["err"]


@pytest.mark.slow
def test_two_slices_exchange_gradients_alone(root, planned):
    """With whole and cut rows: nothing but sums goes over the network between the slices."""
    report = root / "two.json"
    axes = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1, "slices": 2}
    flags = [f"--config.mesh.{name}={size}" for name, size in axes.items()]
    flags += [f"--config.{model}.max_length=256" for model in ("student", "teacher")]
    command = ["plan", f"--config={root / 'config.py'}", "--topology=2xv5e:2x2", *flags]
    result = run_commands({"two": [*command, f"--json={report}"]})["two"]
    assert result["status"] == 0, result["err"]
    [plan] = plans(root, "two")
    assert plan["topology"] == "2xv5e:2x2"
    assert plan["chips"] == 8
    assert plan["mesh"] == {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}
    between = {kind: found for kind, found in plan["collectives"].items() if "slices" in kind}
    assert list(between) == ["all-reduce between slices"]
    [traffic] = between.values()
    # f32 gradients, of which a chip has half, or after a further cut a quarter.
    gradients = 4 * (STUDENT.vocab_size * STUDENT.width + 3 * layer_parameters(STUDENT))
    assert gradients / 8 < traffic["bytes"] < gradients / 2 * 1.1
    assert "all-reduce between slices" in result["out"]
    assert "the estimate leaves out what goes between slices" in result["out"]
    within = sum(t["sent"] for kind, t in plan["collectives"].items() if kind not in between)
    assert plan["estimate"]["network"] == pytest.approx(within / CHIPS["v5e"].network_bandwidth)


@pytest.fixture
def uld(root, capsys):
    """Runs `uld-jax plan` here, where no libtpu is loaded."""

    def run(*arguments):
        status = main(["plan", f"--config={root / 'config.py'}", *arguments])
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return run


def test_an_unknown_generation_is_one_line(uld):
    result = uld("--topology=v9:2x2")
    assert result.status == 2
    assert result.err.startswith("error: --topology=v9:2x2: expected GENERATION:SHAPE")
    assert result.err.count("\n") == 1


def test_a_missing_libtpu_is_one_line(uld, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # what Python keeps of an absent module
    result = uld("--topology=v5e:2x2")
    assert result.status == 2
    assert result.err == (
        "error: --topology=v5e:2x2: to compile for TPUs needs libtpu, which is not installed: "
        "pip install 'uld-jax[plan]'\n"
    )


def test_a_missing_config_json_is_one_line(uld, tmp_path):
    result = uld("--topology=4", "--platform=cuda", f"--config.teacher.source={tmp_path}")
    assert result.status == 2
    assert result.err.startswith(f"error: {tmp_path / 'config.json'}: no such file")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--topology=v5e:2x2", "--largest", "--sweep"], "expected one of them"),
        (["--topology=4", "--platform=cuda", "--sweep"], "expected --platform=tpu"),
        (["--topology=v5e:2x2", "--platform=cuda"], "expected a number of GPUs"),
        (["--topology=v5e:2x2", "--program=cache", "--sweep"], "are for the train step"),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(uld, arguments, expected):
    result = uld(*arguments)
    assert result.status == 2
    assert expected in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["--config.student.lora_rank=4", "--config.teacher.quantize=int8"],
        ["--config.teacher.mode=cache", "--config.teacher.cache=nowhere"],
    ],
)
def test_the_step_lowers_for_cuda(uld, tmp_path, changes):
    report = tmp_path / "cuda.json"
    result = uld("--topology=4", "--platform=cuda", f"--json={report}", *changes)
    assert result.status == 0, result.err
    assert "NOT compiled" in " ".join(result.out.split())
    found = json.loads(report.read_text())
    matrices = STUDENT.vocab_size * STUDENT.width + 3 * layer_parameters(STUDENT)
    assert found["program_lines"] > 500
    assert found["mesh"] == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 2}
    trains_all = "--config.student.lora_rank=4" not in changes
    assert (found["bytes"]["optimizer state"] > matrices) == trains_all
    has_teacher = "--config.teacher.mode=cache" not in changes
    assert (found["bytes"]["teacher parameters"] > 0) == has_teacher
    assert (found["model_flops"]["teacher"] > 0) == has_teacher


def test_projections_of_hidden_states_are_part_of_a_planned_step():
    config = RunConfig(loss=LossConfig(hidden_weight=1.0, attention_weight=1.0))
    made_of = {"student": tiny_config(), "teacher": tiny_gemma(width=48)}
    step = abstract_step(config, made_of, abstract_mesh(config, 1))
    assert step.state.params["projections"]["0"].shape == (1, 32, 48)
    with jax.sharding.use_abstract_mesh(abstract_mesh(config, 1)):
        state, _ = jax.eval_shape(step.program.step, *step.arguments)
    assert state.params["projections"]["0"].shape == (1, 32, 48)
