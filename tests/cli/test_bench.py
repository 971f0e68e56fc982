"""`uld-jax bench`: both measurements through the command line, and every mistake in one line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from uld_jax.benchmark import pytorch
from uld_jax.benchmark.losses import TORCH
from uld_jax.losses.uld import METHODS


def read(path):
    return json.loads(path.read_text())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_losses_leaves_everything(uld, tmp_path):
    output = tmp_path / "new" / "results"
    flags = ["--vocab", "24,40", "--positions=2", "--repeats=2", "--seed=5", "--logits=peaked"]
    result = uld("bench", "losses", *flags, f"--output={output}")
    assert (result.status, result.err) == (0, "")
    assert names(output) == ["losses.json", "losses.md", "losses.png"]
    content = read(output / "losses.json")
    assert content["machine"]["command"].startswith("uld-jax bench losses --vocab 24,40")
    assert content["machine"]["torch"]["device"] == "cpu"
    assert content["settings"] == {"kind": "peaked", "seed": 5, "repeats": 2}
    sizes = [tuple(case.values())[:3] for case in content["cases"]]
    assert sizes == [(24, 40, 2)]
    for case in content["cases"]:
        assert set(case["candidates"]) == {*METHODS, "jnp.sort", "softmax", *TORCH}
        for candidate in case["candidates"].values():
            assert candidate["forward_backward"]["status"] == "ok"
        assert case["candidates"]["jnp.sort"]["speedup"]["forward"]["jnp.sort"] == 1.0
    markdown = (output / "losses.md").read_text()
    assert "**V = 24, U = 40 (ms / position)**" in markdown
    assert markdown.count("| pytorch |") == 1
    assert "V = 24, U = 40" in result.out
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_methods_limit_the_candidates(uld, tmp_path):
    flags = ["--vocab", "8,8", "--vocab", "9,9", "--positions=1,2", "--repeats=1"]
    result = uld("bench", "losses", *flags, "--methods=softmax", f"--output={tmp_path}")
    assert result.status == 0
    cases = read(tmp_path / "losses.json")["cases"]
    sizes = [(case["student_vocab"], case["positions"]) for case in cases]
    assert sizes == [(8, 1), (8, 2), (9, 1), (9, 2)]
    assert [list(case["candidates"]) for case in cases] == [["softmax"]] * 4


def test_without_torch_there_is_a_line_about_it(uld, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    flags = ["--vocab", "8,8", "--positions=1", "--repeats=1", f"--output={tmp_path}"]
    result = uld("bench", "losses", *flags)
    assert (result.status, result.err) == (0, "")
    content = read(tmp_path / "losses.json")
    assert content["machine"]["torch"] is None
    assert not set(TORCH) & set(content["cases"][0]["candidates"])
    assert "torch is not installed" in (tmp_path / "losses.md").read_text()


def test_level_set_of_random_logits(uld, tmp_path):
    flags = ["--vocab", "30,50", "--positions=2", "--bits=3,7", "--repeats=1"]
    result = uld("bench", "level-set", *flags, f"--output={tmp_path}")
    assert (result.status, result.err) == (0, "")
    assert names(tmp_path) == ["level_set.json", "level_set.md", "level_set.png"]
    (case,) = read(tmp_path / "level_set.json")["cases"]
    assert (case["student_vocab"], case["teacher_vocab"], case["positions"]) == (30, 50, 2)
    assert [point["bucket_bits"] for point in case["curve"]] == [3, 7]


@pytest.fixture
def logits(tmp_path):
    """Files of logits; returns a function that writes one and gives its path."""

    def write(name, array):
        np.save(tmp_path / name, array)
        return tmp_path / name

    return write


def test_level_set_of_files(uld, logits, tmp_path):
    noise = np.random.default_rng(0)
    student = noise.normal(0, 2, (3, 20)).astype(np.float16)
    student[0, 4] = -np.inf
    files = [
        f"--student-logits={logits('s.npy', student)}",
        f"--teacher-logits={logits('t.npy', noise.normal(0, 2, (3, 30)))}",
    ]
    output = tmp_path / "results"
    result = uld("bench", "level-set", *files, "--bits=7", "--repeats=1", f"--output={output}")
    assert (result.status, result.err) == (0, "")
    (case,) = read(output / "level_set.json")["cases"]
    assert (case["student_vocab"], case["teacher_vocab"], case["positions"]) == (20, 30, 3)
    assert case["curve"][0]["max_error"] < 1e-3


@pytest.fixture
def refused(uld, tmp_path):
    """Runs a benchmark with a bad flag; returns the one error line."""

    def run(target, *flags):
        output = tmp_path / "results"
        result = uld("bench", target, *flags, f"--output={output}")
        assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
        assert result.err.startswith("error: ")
        assert not output.exists()
        return result.err

    return run


WHOLE = "expected a whole number of at least"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--methods=quick", "--methods: unknown 'quick'; expected one of auto, sort"),
        ("--vocab=32", "--vocab=32: expected two sizes"),
        ("--vocab=3,4,5", "--vocab=3,4,5: expected two sizes"),
        ("--vocab=3,x", f"--vocab: {WHOLE} 1, found 'x'"),
        ("--vocab=0,4", f"--vocab: {WHOLE} 1, found '0'"),
        ("--positions=8,0", f"--positions: {WHOLE} 1, found '0'"),
        ("--positions=", f"--positions: {WHOLE} 1, found ''"),
        ("--repeats=0", f"--repeats: {WHOLE} 1, found '0'"),
        ("--seed=-1", f"--seed: {WHOLE} 0, found '-1'"),
        ("--logits=flat", "--logits: unknown 'flat'; expected one of normal, peaked"),
        ("--config.data.seed=3", "bench losses has no config"),
    ],
)
def test_bad_flags_of_losses(refused, flag, message):
    assert message in refused("losses", flag)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--bits=3,15", "--bits: bucket_bits: expected 1 to 14, got 15"),
        ("--bits=a", f"--bits: {WHOLE} 1, found 'a'"),
        ("--positions=2,3", f"--positions: {WHOLE} 1, found '2,3'"),
        ("--student-logits=s.npy", "give both --student-logits and --teacher-logits"),
    ],
)
def test_bad_flags_of_level_set(refused, flag, message):
    assert message in refused("level-set", flag)


def test_torch_asked_for_and_absent(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--methods: torch is not installed" in refused("losses", "--methods=sort,pytorch")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), "expected logits [positions, vocabulary], found (4,)"),
        (np.zeros((0, 4)), "expected logits [positions, vocabulary], found (0, 4)"),
        (np.zeros((2, 4), int), "expected float16, float32 or float64, found int64"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), "row 1 has a NaN"),
        (np.array([[0.0, np.inf], [1.0, 0.0]]), "row 0 has a NaN, an infinite logit"),
        (np.full((1, 3), -np.inf), "row 0 has a NaN, an infinite logit, or no finite one"),
        (np.array([["a"]], object), "not a whole .npy file of numbers"),
        (np.zeros((3, 4)), "3 positions, but"),
    ],
)
def test_bad_logits(refused, logits, array, message):
    good, bad = logits("good.npy", np.zeros((2, 3))), logits("bad.npy", array)
    error = refused("level-set", f"--student-logits={good}", f"--teacher-logits={bad}")
    assert f"{bad}: " in error
    assert message in error


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_truncated_logits(refused, logits, share):
    path = logits("bad.npy", np.zeros((20, 30)))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    error = refused("level-set", f"--student-logits={path}", f"--teacher-logits={path}")
    assert f"{path}: not a whole .npy file of numbers" in error


def test_logits_absent(refused, tmp_path):
    path = tmp_path / "absent.npy"
    error = refused("level-set", f"--student-logits={path}", f"--teacher-logits={path}")
    assert f"{path}: No such file" in error


def test_files_have_their_own_sizes(refused, logits):
    path = logits("good.npy", np.zeros((2, 3)))
    flags = [f"--{side}-logits={path}" for side in ("student", "teacher")]
    assert "files have their own sizes" in refused("level-set", *flags, "--positions=3")


def test_output_that_cannot_be_written(uld, tmp_path):
    output = tmp_path / "file"
    output.write_text("mine")
    result = uld("bench", "losses", f"--output={output / 'below'}")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"--output={output / 'below'}: cannot write there (Not a directory)" in result.err
    assert output.read_text() == "mine"


def test_help_waits_for_nothing_heavy():
    code = (
        "import sys; from uld_jax.cli.main import build_parser; build_parser()\n"
        "print({'jax', 'numpy', 'torch', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True
    )
    assert run.stdout.strip() == "set()", run.stderr


def test_step_beside_pytorch(uld, tiny, tmp_path):
    flags = ["--batch=2", "--length=24", "--chunk-size=16", "--repeats=2", "--seed=3"]
    result = uld("bench", "step", f"--model={tiny.student}", *flags, f"--output={tmp_path}")
    assert (result.status, result.err) == (0, "")
    assert names(tmp_path) == ["step.json", "step.md"]
    content = read(tmp_path / "step.json")
    assert content["settings"] == {
        "seed": 3,
        "repeats": 2,
        "batch": 2,
        "length": 24,
        "chunk_size": 16,
    }
    (case,) = content["cases"]
    ours, theirs = (case["candidates"][name] for name in ("uld_jax", "pytorch"))
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert case["optimizer"] in ("fused", "foreach")
    ratios = [a / b for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert case["ratio"] == pytest.approx(np.median(ratios))
    markdown = (tmp_path / "step.md").read_text()
    assert "**train step of a llama of" in markdown
    assert "2 × 24 tokens" in markdown
    assert "| uld_jax |" in markdown
    assert f"{ours['loss']:.4f}" in result.out


def test_generate_beside_pytorch(uld, tiny, tmp_path):
    flags = ["--batch=3", "--prompt-length=6", "--new-tokens=9", "--repeats=2"]
    result = uld("bench", "generate", f"--model={tiny.student}", *flags, f"--output={tmp_path}")
    assert (result.status, result.err) == (0, "")
    assert names(tmp_path) == ["generate.json", "generate.md"]
    (case,) = read(tmp_path / "generate.json")["cases"]
    assert (case["batch"], case["prompt_length"], case["new_tokens"]) == (3, 6, 9)
    assert case["agreement"] == 1.0
    ours, theirs = (case["candidates"][name] for name in ("uld_jax", "pytorch"))
    assert ours["tokens_per_second"] == pytest.approx(27 / np.median(ours["seconds"]))
    ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert case["speedup"] == pytest.approx(np.median(ratios))
    assert "100.0%" in (tmp_path / "generate.md").read_text()


@pytest.mark.parametrize("target", ["step", "generate"])
def test_models_without_torch(uld, tiny, tmp_path, monkeypatch, target):
    # Not hidden from the imports: transformers, which has seen it, would miss it.
    monkeypatch.setattr(pytorch, "find_torch", lambda: None)
    flags = [f"--model={tiny.student}", "--batch=2", "--repeats=1", f"--output={tmp_path}"]
    result = uld("bench", target, *flags)
    assert (result.status, result.err) == (0, "")
    (case,) = read(tmp_path / f"{target}.json")["cases"]
    assert list(case["candidates"]) == ["uld_jax"]
    assert case["ratio" if target == "step" else "speedup"] is None
    assert "torch is not installed" in (tmp_path / f"{target}.md").read_text()


@pytest.mark.parametrize(
    ("target", "flag", "message"),
    [
        ("step", "--batch=0", f"--batch: {WHOLE} 1, found '0'"),
        ("step", "--length=x", f"--length: {WHOLE} 1, found 'x'"),
        ("step", "--length=9999", "--length: 9999 positions, but"),
        ("generate", "--new-tokens=0", f"--new-tokens: {WHOLE} 1, found '0'"),
        ("generate", "--new-tokens=2040", "--prompt-length and --new-tokens: 2072 positions, but"),
        ("generate", "--repeats=0", f"--repeats: {WHOLE} 1, found '0'"),
        ("generate", "--config.data.seed=3", "bench generate has no config"),
    ],
)
def test_bad_flags_of_models(refused, tiny, target, flag, message):
    assert message in refused(target, f"--model={tiny.student}", flag)


def test_model_absent(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("ULD_JAX_CACHE", str(tmp_path))
    error = refused("step")
    assert f"{tmp_path}/models/SmolLM2-135M-Instruct.Q4_1.gguf: no such file" in error
    assert "launch/fetch_models.sh" in error


def test_align_leaves_everything(uld, tiny, published, tmp_path):
    flags = [f"--tokenizer={tiny.root / side}" for side in ("student", "teacher")]
    flags += [f"--data=jsonl:{tiny.root / 'qa.jsonl'}", "--data=builtin", "--data=qed"]
    flags += [f"--manual-dir={published}", "--answers=5"]
    result = uld("bench", "align", *flags, "--repeats=1", f"--output={tmp_path}")
    assert result.status == 0  # a first use of the file is noticed on stderr
    assert names(tmp_path) == ["align.json", "align.md"]
    content = read(tmp_path / "align.json")
    assert content["settings"] == {"answers": 5, "seed": 0, "repeats": 1}
    (case,) = content["cases"]
    assert case["texts"] == 15
    assert [*case["tokenizers"]] == ["student", "teacher"]
    assert [(p["covered"], p["violations"]) for p in case["pairs"]] == [(1.0, 0)] * 2
    assert "**aligned by bytes**" in (tmp_path / "align.md").read_text()
    assert "15 answers" in result.out


def test_bad_flags_of_align(refused, tiny, tmp_path):
    student, teacher = (f"--tokenizer={tiny.root / side}" for side in ("student", "teacher"))
    assert f"--answers: {WHOLE} 1, found '0'" in refused("align", "--answers=0")
    assert "--tokenizer: expected two or more" in refused("align", student)
    assert "another one is called 'student'" in refused("align", student, student)
    error = refused("align", student, f"--tokenizer={tmp_path}")
    assert f"--tokenizer={tmp_path}: expected a .gguf file or a directory" in error
    assert "launch/fetch_tokenizers.sh" in error
    files = ["--data=qed", f"--manual-dir={tmp_path}"]
    assert "expected the files of qed in it" in refused("align", student, teacher, *files)
