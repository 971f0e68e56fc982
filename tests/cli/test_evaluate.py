"""`uld-jax evaluate` on models and on files of answers, and what it refuses."""

import importlib.util
import json
import math

import matplotlib.image
import pytest

from uld_jax.evaluation import METRICS, per_example, score


def read(path):
    return json.loads(path.read_text())


def rows_of(output):
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def published(number, text):
    answers = [f"answer {number}", {"text": ["red", f"fox {number}"]}, [f"a {number}"]][number % 3]
    return {"answers": answers, "prediction_text": text}


def references(row):
    answers = row["answers"]
    return answers["text"] if isinstance(answers, dict) else answers


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two sets of answers to 60 questions, of which the second has fewer words right."""
    root = tmp_path_factory.mktemp("files")
    good = [published(i, f"answer {i}" if i % 2 else f"answer fox {i}") for i in range(60)]
    bad = [published(i, f"answer {i}" if i % 4 == 1 else "none") for i in range(60)]
    return write_lines(root / "good.jsonl", good), write_lines(root / "bad.jsonl", bad)


def test_a_predictions_file_has_its_scores(uld, files, tmp_path):
    output = tmp_path / "out" / "scores.json"
    result = uld("evaluate", f"--predictions={files[0]}", f"--output={output}", "--seed=3")
    assert (result.status, result.err) == (0, "")
    given = [json.loads(line) for line in files[0].read_text().splitlines()]
    texts = [row["prediction_text"] for row in given]
    expected = score(texts, [references(row) for row in given])
    found = read(output)
    assert found["scores"] == pytest.approx(expected, abs=1e-12)
    assert found["examples"] == 60
    assert found["resampling"]["seed"] == 3
    for name in METRICS:
        low, high = found["intervals"][name]
        assert low < expected[name] < high
        assert f"{expected[name]:.2f}" in result.out
    assert rows_of(output)[4]["scores"] == per_example(texts[4], references(given[4]))
    assert not list(output.parent.glob("*.journal"))
    # What was written is read again, and has no difference to itself.
    again = uld(
        "evaluate",
        f"--predictions={output.with_suffix('.jsonl')}",
        f"--against={files[0]}",
        f"--output={tmp_path / 'again.json'}",
    )
    assert again.status == 0
    same = read(tmp_path / "again.json")
    assert same["scores"] == found["scores"]
    assert {x["p"] for x in same["against"]["metrics"].values()} == {1.0}
    assert "no difference shown" in again.out


def test_two_files_are_compared_example_by_example(uld, files, tmp_path):
    good, bad = files
    found, said = {}, {}
    for name, first, other in (("a", good, bad), ("b", bad, good)):
        output = tmp_path / f"{name}.json"
        flags = [f"--predictions={first}", f"--against={other}", "--permutations=999"]
        result = uld("evaluate", *flags, f"--output={output}")
        assert result.status == 0, result.err
        found[name], said[name] = read(output), result.out
    a, b = (found[name]["against"]["metrics"]["f1"] for name in "ab")
    assert a["difference"] == pytest.approx(
        found["a"]["scores"]["f1"] - found["b"]["scores"]["f1"], abs=1e-9
    )
    assert (a["this"], a["other"]) == (b["other"], b["this"])
    assert (a["low"], a["high"]) == pytest.approx((-b["high"], -b["low"]))
    assert a["low"] > 0
    assert a["p"] == b["p"] == 0.001
    assert "this one is better (two-sided sign-flip permutation test" in said["a"]
    assert "the other one is better" in said["b"]


def test_a_directory_is_what_the_workdir_trained(uld, tiny, trained, tmp_path):
    """The exported student, under the config's data and prompts, against the run's answers."""
    output = tmp_path / "scores.json"
    flags = [f"--model={trained / 'student'}", f"--against={trained}", f"--output={output}"]
    result = uld("evaluate", tiny.config, *flags, "--teacher")
    assert (result.status, result.err) == (0, "")
    found, after = read(output), read(trained / "after.json")
    assert found["scores"] == pytest.approx(after["scores"], abs=1e-12)
    assert {x["difference"] for x in found["against"]["metrics"].values()} == {0.0}
    for which in ("student", "teacher"):
        rows = [row[which] for row in rows_of(output)]
        size = sum(len(row["references"][0].encode()) for row in rows_of(output))
        nats = math.fsum(x for row in rows for x in row["nats"])
        tokens = sum(len(row["nats"]) for row in rows)
        part = found[which]
        assert (part["answers"], part["tokens"], part["bytes"]) == (4, tokens, size)
        assert part["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-12)
        low, high = part["bits_per_byte_interval"]
        assert low <= part["bits_per_byte"] <= high
        assert sum(part["bins"]["count"]) == tokens
        assert f"{part['bits_per_byte']:.3f} bits per byte" in result.out
        assert f"calibration error {part['expected_calibration_error']:.2f} %" in result.out
    assert found["student"]["bits_per_byte"] != found["teacher"]["bits_per_byte"]
    image = matplotlib.image.imread(output.with_suffix(".png"))
    assert image.shape[1] > 1.5 * image.shape[0]  # two panels
    assert {path.name for path in tmp_path.iterdir()} == {
        f"scores.{suffix}" for suffix in ("json", "jsonl", "png")
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", ":2: not JSON, expected one prediction a line"),
        ("[1]", ":2: expected a JSON object, got list"),
        ('{"prediction_text": "x"}', ":2: field 'answers' is missing, found ['prediction_text']"),
        ('{"references": ["x"]}', ":2: field 'prediction' is missing"),
        ('{"answers": [], "prediction_text": "x"}', ":2: field 'answers' must be a string, a"),
        ('{"answers": {"a": 1}, "prediction_text": "x"}', ":2: field 'answers' must be a string"),
        ('{"answers": [1], "prediction_text": "x"}', ":2: field 'answers' must be a string, a"),
        ('{"answers": "x", "prediction_text": 3}', ":2: field 'prediction_text' must be a string"),
    ],
)
def test_a_line_that_is_no_prediction(uld, tmp_path, line, expected):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(published(0, "x")) + "\n" + line + "\n")
    result = uld("evaluate", f"--predictions={path}", f"--output={tmp_path / 'o.json'}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: {path}{expected}")
    assert not (tmp_path / "o.json").exists()


def own(number, **changes):
    return {"id": f"q{number}", "references": ["x"], "prediction": "y", **changes}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([own(1)], "b.jsonl: expected the same examples as {a}, which has 1 more, the first 'q2'"),
        (
            [own(1), own(2), own(9)],
            "a.jsonl: expected the same examples as {b}, which has 1 more, the first 'q9'",
        ),
        (
            [own(1), own(2, references=["z"])],
            "b.jsonl: example 'q2' has other references than in {a}, 'z' and 'x'",
        ),
        ([own(1), own(1)], "b.jsonl: id 'q1' is there twice"),
        ([published(1, "x")], "b.jsonl: expected the 2 examples of {a}, got 1"),
        ([published(1, "x")] * 2, "b.jsonl: example number 1 has other references"),
        ([], "b.jsonl: expected at least one prediction, found none"),
    ],
)
def test_sets_of_other_examples_are_not_compared(uld, tmp_path, others, expected):
    a = write_lines(tmp_path / "a.jsonl", [own(1), own(2)])
    b = write_lines(tmp_path / "b.jsonl", others)
    result = uld("evaluate", f"--predictions={a}", f"--against={b}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert expected.format(a=a, b=b) in result.err


def test_bertscore_without_its_package_is_refused_at_once(uld, tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = uld("evaluate", tiny.config, "--bertscore")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "pip install 'uld-jax[bertscore]'" in result.err
    assert "student:" not in result.out


def test_bad_flags_are_one_line_before_a_model_is_loaded(uld, tiny, files, tmp_path):
    good = f"--predictions={files[0]}"
    absent = tmp_path / "absent"
    for flags, expected in (
        ([f"--predictions={absent}"], "absent: no such file, expected predictions as JSON lines"),
        ([good, f"--against={absent}"], "absent: no such file, expected predictions"),
        ([good, f"--against={tmp_path}"], "after.json: no such file, expected the answers after"),
        ([good, "--model=x", "--teacher"], "leave out --model, --teacher"),
        ([good, "--output=x.jsonl"], "--output=x.jsonl: expected a name that ends in .json"),
        ([good, "--resamples=0"], "--resamples=0: expected at least 1"),
        ([good, "--permutations=-1"], "--permutations=-1: expected at least 1"),
        ([good, "--seed=-1"], "--seed=-1: expected at least 0"),
        ([good, "--confidence=95"], "--confidence=95.0: expected between 0 and 1"),
        ([tiny.config, f"--model={absent}"], "absent"),
        ([tiny.config, f"--against={files[0]}"], "expected the 4 examples of the held-out"),
        ([f"--model={tiny.student}"], "give --config=FILE.py"),
    ):
        result = uld("evaluate", *flags)
        assert (result.status, result.err.count("\n")) == (2, 1), flags
        assert expected in result.err
        assert "student:" not in result.out
