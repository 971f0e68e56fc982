"""The rows of `uld-jax report` for teachers and for students before training, and BERTScore."""

import dataclasses
import importlib.util
import json
import shutil

import matplotlib.image
import numpy as np
import pytest
import scipy.stats

from tests.cli.test_report import QUESTIONS, RUN, answers, f1, rows_of, workdir
from uld_jax.config import DataConfig, ModelConfig, TeacherConfig
from uld_jax.evaluation import bert_scores, score

installed = importlib.util.find_spec("bert_score") is not None
needs_bert_score = pytest.mark.skipif(not installed, reason="bert-score is not installed")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generated(right, *, first=0):
    """The same answers as `uld-jax generate` writes them: without references."""
    return [
        {"id": row["id"], "context": "", "question": row["question"], "answer": row["prediction"]}
        for row in answers(right, first=first)
    ]


@pytest.fixture
def pair(tmp_path):
    """A run without ULD and one with it."""
    return [workdir(tmp_path, f"w{w}", right=20, weight=w) for w in (0.0, 1.5)]


def row_of(output, kind, metric="f1"):
    (row,) = (row for row in rows_of(output, kind) if row["metric"] == metric)
    return row


def test_the_student_before_training_is_there_once(uld, tmp_path):
    shots = dataclasses.replace(RUN, student=dataclasses.replace(RUN.student, shots=3))
    runs = [
        workdir(tmp_path, f"{weight}-{seed}", right=20, weight=weight, seed=seed, config=config)
        for weight in (0.0, 1.5)
        for seed in (0, 1)
        # Shots are drawn by a seed of the data.
        for config in (dataclasses.replace(shots, data=DataConfig("tfds:squad", seed=seed)),)
    ]
    for run in runs[1::2]:
        found = {"scores": {}, "answers": answers(9), "too_long": 0}
        (run / "before.json").write_text(json.dumps(found))
    output = tmp_path / "report"
    result = uld("report", *runs, f"--output={output}", "--resamples=4000")
    assert (result.status, result.err) == (0, "")
    assert len(rows_of(output, "undistilled")) == 8
    row, values = row_of(output, "undistilled"), (f1(5) + f1(9)) / 2
    assert float(row["score"]) == pytest.approx(values.mean())
    interval = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    ends = [float(row[name]) for name in ("score_low", "score_high")]
    assert ends == pytest.approx([*interval], rel=0.06)
    assert (row["student"], row["teacher"], row["shots"]) == ("pythia-410m-deduped", "", "3")
    assert (row["examples"], row["uld"], row["published_score"]) == (str(QUESTIONS), "", "")
    cell = f"{values.mean():.2f} ({ends[0]:.2f} to {ends[1]:.2f})"
    markdown = (output / "report.md").read_text()
    assert markdown.count(f"|  | pythia-410m-deduped | undistilled, 3 shots | {cell} |") == 1
    assert f"squad, undistilled, 3 shots: f1 {cell}" in result.out


def test_students_that_were_asked_otherwise_have_rows_of_their_own(uld, tmp_path):
    longer = dataclasses.replace(RUN, student=dataclasses.replace(RUN.student, max_length=2048))
    qed = dataclasses.replace(RUN, data=DataConfig(source="qed"))
    runs = [
        workdir(tmp_path, f"{name}{weight}", right=20, weight=weight, config=config, before=before)
        for name, config, before in (("a", RUN, 5), ("b", longer, 6), ("c", qed, 7))
        for weight in (0.0, 1.5)
    ]
    # Nothing is compared with this one, so its data set has no column.
    other = dataclasses.replace(RUN, data=DataConfig(source="dialogsum"))
    runs.append(workdir(tmp_path, "alone", right=20, weight=0.0, config=other))
    output = tmp_path / "report"
    assert uld("report", *runs, f"--output={output}").status == 0
    rows = [row for row in rows_of(output, "undistilled") if row["metric"] == "f1"]
    found = {(row["data"], round(float(row["score"]), 6)) for row in rows}
    means = {n: round(f1(n).mean(), 6) for n in (5, 6, 7)}
    assert found == {("squad", means[5]), ("squad", means[6]), ("qed", means[7])}
    table = (output / "report.md").read_text().partition("## Every metric")[0]
    assert table.count("undistilled") == 2  # two of squad, and beside the one of them that of qed
    for mean in means.values():
        assert f"| {mean:.2f} (" in table


@pytest.mark.parametrize("form", ["generated", "predictions"])
def test_the_teacher_s_answers_are_scored_by_the_runs_references(uld, tmp_path, pair, form):
    rows = generated(44) if form == "generated" else answers(44)
    path = lines(tmp_path / "teacher.jsonl", rows[::-1])
    output = tmp_path / "report"
    result = uld("report", *pair, f"--output={output}", f"--teacher={path}")
    assert (result.status, result.err) == (0, "")
    row = row_of(output, "teacher")
    assert float(row["score"]) == pytest.approx(f1(44).mean())
    assert (row["teacher"], row["student"], row["shots"]) == ("Llama-2-7b-chat-hf", "", "")
    table = (output / "report.md").read_text().splitlines()
    place = next(i for i, line in enumerate(table) if "| Llama-2-7b-chat-hf |  | teacher |" in line)
    assert f" {f1(44).mean():.2f} (" in table[place]
    assert table[place + 1].startswith("| Llama-2-7b-chat-hf | pythia-410m-deduped | λ 1.5 |")
    image = matplotlib.image.imread(output / "report.png")[..., :3]

    def seen(colour):
        wanted = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        return (np.abs(image - wanted).max(axis=-1) < 0.02).sum() > 20

    assert seen("777777")
    assert seen("009e73")


def test_what_generate_writes_is_read_and_belongs_to_its_teacher(uld, tiny, trained, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(trained, text)
    config = json.loads((text / "config.json").read_text())
    config["loss"]["uld_weight"] = 0.0
    (text / "config.json").write_text(json.dumps(config))
    directory, output = tmp_path / "answers", tmp_path / "report"
    flags = ["--config.generate.split=eval", "--config.teacher.shots=1"]
    assert uld("generate", tiny.config, f"--output={directory}", *flags).status == 0
    as_lines = tmp_path / "answers.jsonl"
    assert uld("generate", tiny.config, f"--output={as_lines}", *flags).status == 0
    for path, shots in ((directory, "1"), (as_lines, "")):
        result = uld("report", text, trained, f"--output={output}", f"--teacher={path}")
        assert (result.status, result.err) == (0, "")
        asked = json.loads((trained / "after.json").read_text())["answers"]
        written = {r["id"]: r["answer"] for r in map(json.loads, as_lines.read_text().splitlines())}
        expected = score([written[a["id"]] for a in asked], [a["references"] for a in asked])
        for metric, value in expected.items():
            row = row_of(output, "teacher", metric)
            assert float(row["score"]) == pytest.approx(value, abs=1e-9)
            assert (row["teacher"], row["shots"]) == ("teacher", shots)
        before = json.loads((trained / "before.json").read_text())["scores"]
        for metric, value in before.items():
            found = float(row_of(output, "undistilled", metric)["score"])
            assert found == pytest.approx(value, abs=1e-9)
    other = workdir(tmp_path, "other", right=20, weight=1.5)
    config["teacher"]["source"], config["loss"]["uld_weight"] = "owner/another", 1.5
    for name, weight in (("a", 0.0), ("b", 1.5)):
        shutil.copytree(text, tmp_path / name)
        config["loss"]["uld_weight"] = weight
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    theirs = [tmp_path / name for name in "ab"]
    for runs, path, expected in (
        (theirs, directory, "expected answers of the teacher of the runs, owner/another, got"),
        ([text, trained, *theirs], as_lines, "have several teachers, "),
        ([text, trained], f"{directory},{as_lines}", f"{directory} and {as_lines} both have"),
        ([text, trained], other, "manifest.json"),
    ):
        result = uld("report", *runs, f"--output={output}", f"--teacher={path}")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert expected in result.err
    result = uld("report", text, trained, *theirs, f"--output={output}", f"--teacher={directory}")
    assert result.status == 0  # it says whose answers it has
    assert {row["teacher"] for row in rows_of(output, "teacher")} == {"teacher"}


def test_teachers_and_students_before_training_as_published(uld, shared, tmp_path):
    config = dataclasses.replace(
        RUN,
        # As the paper's data sets are named, without a scheme.
        data=DataConfig(source="squad"),
        student=ModelConfig(source="facebook/opt-350m"),
        teacher=TeacherConfig(source="mistralai/Mistral-7B-Instruct-v0.2"),
    )
    runs = [
        workdir(tmp_path, f"{name}{weight}", right=20, weight=weight, config=of)
        for name, of in (("llama", RUN), ("mistral", config))
        for weight in (0.0, 1.5)
    ]
    for run in runs[2:]:  # other questions
        for name in ("before", "after"):
            found = {"scores": {}, "answers": answers(20, first=100), "too_long": 0}
            (run / f"{name}.json").write_text(json.dumps(found))
    paths = [
        lines(tmp_path / "llama.jsonl", generated(40)),
        lines(tmp_path / "mistral.jsonl", generated(40, first=100)),
    ]
    output = tmp_path / "report"
    flags = [f"--published={shared / 'published_scores.csv'}", f"--output={output}"]
    result = uld("report", *runs, *flags, f"--teacher={paths[0]},{paths[1]}")
    assert (result.status, result.err) == (0, "")
    found = {
        (row["teacher"] or row["student"]): (row["published_score"], row["published_shots"])
        for kind in ("teacher", "undistilled")
        for row in rows_of(output, kind)
        if row["metric"] == "f1"
    }
    # PUBLISHED.md to two decimals, and the shots of its last paragraph.
    assert found == {
        "Llama-2-7b-chat-hf": ("81.3047", "1"),
        "Mistral-7B-Instruct-v0.2": ("76.3185", "3"),
        "pythia-410m-deduped": ("37.4", "3"),
        "opt-350m": ("30.01", "3"),
    }
    markdown = (output / "report.md").read_text()
    for cell in ("81.30, 1 shot |", "76.32, 3 shots |", "37.40, 3 shots |", "30.01, 3 shots |"):
        assert f"|  |  | published | {cell}" in markdown
    pairs = {
        row["teacher"]: row["published_uld"] for row in rows_of(output) if row["metric"] == "f1"
    }
    assert pairs == {"Llama-2-7b-chat-hf": "74.14", "Mistral-7B-Instruct-v0.2": "73.35"}


def test_answers_that_are_no_teacher_s_are_one_line(uld, tmp_path, pair):
    rows = generated(40)
    bare = shutil.copytree(pair[0], tmp_path / "bare")
    (bare / "before.json").unlink()
    other = [{**row, "question": "??"} for row in rows]
    refs = [{**row, "references": ["z"]} for row in answers(40)]
    for number, (given, expected) in enumerate(
        (
            (
                rows[1:],
                f"nearest, {pair[0]}: 1 of 50 questions are not in it, the first 'q0';",
            ),
            ([*rows, {**rows[0], "id": "new"}], "it has 1 more questions, the first 'new'"),
            (other, "in it question 'q0' is '??', not '?'"),
            (refs, "in it question 'q0' has other references, such as 'z'"),
            ([*rows, rows[0]], ":51: id 'q0' is there twice, expected each id once"),
            ([{"answer": "x"}], ":1: field 'id' is missing, expected that of the question"),
            ([{"id": "1", "answer": 3}], ":1: expected the answer as a string in 'answer'"),
            ([{"id": "1", "text": "x"}], ":1: field 'prediction' is missing"),
            ([], ": expected at least one answer, found none"),
        )
    ):
        path = lines(tmp_path / f"{number}.jsonl", given)
        result = uld("report", *pair, f"--output={tmp_path / 'out'}", f"--teacher={path}")
        assert (result.status, result.err.count("\n")) == (2, 1), result.err
        assert f"{path}" in result.err
        assert expected in result.err
    for flags, expected in (
        ([*pair, "--teacher=absent.jsonl"], "absent.jsonl: no such file"),
        ([pair[1], bare], "bare/before.json: no such file, expected the answers before training"),
        ([*pair, "--metric=bertscore"], "--metric=bertscore: expected --bertscore too"),
        (["--bertscore", *pair], f"--bertscore={pair[0]}: expected a model, got the workdir"),
    ):
        result = uld("report", *flags, f"--output={tmp_path / 'out'}")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert expected in result.err
    assert not (tmp_path / "out").exists()


def test_bertscore_without_its_package_is_refused_at_once(uld, tmp_path, pair, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = uld("report", *pair, "--bertscore", f"--output={tmp_path / 'out'}")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "pip install 'uld-jax[bertscore]'" in result.err


@needs_bert_score
def test_bertscore_is_one_more_metric(uld, bert, tmp_path):
    runs = [
        workdir(tmp_path, "text", right=20, weight=0.0),
        workdir(tmp_path, "uld", right=30, weight=1.5),
    ]
    path = lines(tmp_path / "teacher.jsonl", generated(44))
    output = tmp_path / "report"
    flags = [f"--output={output}", f"--bertscore={bert}", "--metric=bertscore"]
    result = uld("report", *runs, *flags, f"--teacher={path}")
    assert result.status == 0, result.err

    def mean(right):
        rows = answers(right)
        texts, references = [r["prediction"] for r in rows], [r["references"] for r in rows]
        return np.mean(bert_scores(texts, references, model=str(bert)))

    row = row_of(output, "distilled", "bertscore")
    found = [float(row[name]) for name in ("text_distillation", "uld")]
    rows = (row_of(output, kind, "bertscore") for kind in ("undistilled", "teacher"))
    found += [float(row["score"]) for row in rows]
    assert found == pytest.approx([mean(n) for n in (20, 30, 5, 44)], abs=1e-3)
    assert len({round(value, 3) for value in found}) == 4
    assert len(rows_of(output)) == 9
    assert "# Text distillation → ULD: bertscore" in (output / "report.md").read_text()
