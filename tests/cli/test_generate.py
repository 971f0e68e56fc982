"""`uld-jax generate`: what it writes, what reads it, and what stops it half-way."""

import hashlib
import json
import shutil

import pytest
import tensorflow_datasets as tfds

from uld_jax.data import AnswerWriter, load_examples
from uld_jax.testing import toy_tokenizer

REASONS = ("empty_prompt", "long_prompt", "empty_answer", "long_answer", "cut_answer")
SMALL = "--config.generate.shard_size=5"
HOT = [
    SMALL,
    "--config.generate.temperature=1.5",
    "--config.generate.samples=2",
    "--config.generate.stop=none",
]


def read(path):
    return json.loads(path.read_text())


def contents(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def answers_in(directory, split="train"):
    return {e.id: e.answers[0] for e in load_examples(f"generated:{directory}", split)}


def one_line(result, *parts):
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    for part in parts:
        assert part in result.err


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Greedy answers to 16 questions in 4 shards; copy the directory before changing it."""
    from uld_jax.cli.main import main

    directory = tmp_path_factory.mktemp("made") / "answers"
    assert main(["generate", tiny.config, f"--output={directory}", SMALL]) == 0
    return directory


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def interrupted(monkeypatch):
    """Has the process interrupted where it would write one shard more than so many."""

    def after(shards):
        written = []

        def write_shard(self, shard, answers):
            if len(written) == shards:
                raise KeyboardInterrupt
            written.append(shard)
            return original(self, shard, answers)

        original = AnswerWriter.write_shard
        monkeypatch.setattr(AnswerWriter, "write_shard", write_shard)
        return written

    return after


def test_tfds_reads_the_answers(tiny, trained, made):
    builder = tfds.builder_from_directory(made)
    assert builder.info.splits["train"].num_examples == 16
    assert builder.info.splits["train"].shard_lengths == [5, 5, 5, 1]
    records = builder.as_data_source(split="train")
    source = f"jsonl:{tiny.root / 'qa.jsonl'}"
    asked = load_examples(source, "train", data_dir=tiny.root / "tfds")
    expected = read(trained / "teacher_answers.json")
    assert len(records) == len(asked) == 16
    for i, example in enumerate(asked):
        assert records[i] == {
            "id": example.id.encode(),
            "kind": b"qa",
            "context": example.context.encode(),
            "question": example.question.encode(),
            "answers": [expected[example.id].encode()],
            "title": b"",
        }


def test_the_manifest_says_what_was_done(tiny, made):
    manifest = read(made / "manifest.json")
    shards = manifest.pop("shards")
    provenance = manifest.pop("provenance")
    for name in ("weights", "tokenizer", "prompts", "data"):
        assert len(provenance.pop(name)) == 64
    assert provenance == {
        "model": str(tiny.root / "teacher"),
        "revision": None,
        "dtype": "float32",
        "quantize": "",
        "shots": 0,
        "shots_seed": None,
        "shots_pool": None,
        "max_length": 256,
        "source": f"jsonl:{tiny.root / 'qa.jsonl'}",
        "task": "qa",
        "max_new_tokens": 4,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "stop": "first_line",
        "stop_strings": "[]",
        "cut_answers": "keep",
    }
    assert manifest == {
        "format": 1,
        "split": "train",
        "samples": 1,
        "total": 16,
        "shard_size": 5,
        "answers": 16,
        "tokens": 64,
        "cut": 16,
        "dropped": dict.fromkeys(REASONS, 0),
    }
    assert [shard["records"] for shard in shards] == [5, 5, 5, 1]
    assert {path.name for path in made.iterdir()} == {
        "manifest.json",
        "dataset_info.json",
        "features.json",
        *(shard["name"] for shard in shards),
    }


def test_training_reads_the_answers(uld, tiny, made, tmp_path):
    flags = [f"--config.data.source=generated:{made}", "--config.data.answers=gold"]
    flags += [f"--config.data.eval_source=jsonl:{tiny.root / 'qa.jsonl'}"]
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'run'}", *flags)
    assert result.status == 0, result.err
    assert "16 training and 4 held-out questions" in result.out
    # Without a set to evaluate on it says so.
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'other'}", *flags[:2])
    one_line(result, "split 'eval' is not there, expected the answers' own, 'train'")
    assert "--config.data.eval_source=" in result.err


def test_a_finished_data_set_is_not_written_again(uld, tiny, copy):
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    result = uld("generate", tiny.config, f"--output={copy}", SMALL)
    assert (result.status, result.err) == (0, "")
    assert "16 answers of 64 tokens, 16 of them cut" in result.out
    assert "tokens/s" not in result.out
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_several_samples_whatever_the_shards_and_batches(uld, tiny, tmp_path):
    result = uld("generate", tiny.config, f"--output={tmp_path / 'a'}", *HOT)
    assert (result.status, result.err) == (0, "")
    assert "tokens/s" in result.out
    records = tfds.builder_from_directory(tmp_path / "a").as_data_source(split="train")
    ids = [f"{record['id'].decode()}#{record['sample']}" for record in records]
    found = answers_in(tmp_path / "a")
    assert list(found) == ids
    shards = read(tmp_path / "a" / "manifest.json")["shards"]
    left_out = [id_ for shard in shards for ids in shard["dropped"].values() for id_ in ids]
    asked = [f"q{n}#{sample}" for n in range(20) if n % 5 for sample in (0, 1)]
    assert sorted([*found, *left_out]) == sorted(asked)
    both = [(found.get(f"q{n}#0"), found.get(f"q{n}#1")) for n in range(20)]
    assert sum(a != b for a, b in both) > 12
    others = ["--config.generate.shard_size=7", "--config.teacher.batch_size=3"]
    flags = [*HOT, *others, "--config.data.train_examples=9"]
    assert uld("generate", tiny.config, f"--output={tmp_path / 'b'}", *flags).status == 0
    fewer = answers_in(tmp_path / "b")
    assert 12 < len(fewer) <= 18
    assert fewer.items() <= found.items()


def test_the_eval_split_with_shots_of_the_training_split(uld, tiny, tmp_path):
    flags = ["--config.generate.split=eval", "--config.teacher.shots=1"]
    result = uld("generate", tiny.config, f"--output={tmp_path / 'a'}", *flags)
    assert result.status == 0, result.err
    assert answers_in(tmp_path / "a", "eval").keys() == {"q0", "q5", "q10", "q15"}
    manifest = read(tmp_path / "a" / "manifest.json")
    assert (manifest["split"], manifest["provenance"]["shots_seed"]) == ("eval", 0)
    assert len(manifest["provenance"]["shots_pool"]) == 64


def test_what_is_left_out_is_counted_and_named(uld, tiny, tmp_path):
    records = [tiny.record(n) for n in range(1, 5)]
    records.insert(2, tiny.record(6, context="The river " * 300))
    records.insert(3, tiny.record(7, context="The river " * 300))
    source = tiny.write(tmp_path / "qa.jsonl", records)
    flags = [source, "--config.generate.shard_size=2"]
    result = uld("generate", tiny.config, f"--output={tmp_path / 'a'}", *flags)
    assert result.status == 0, result.err
    assert "left out: 2 with a prompt over teacher.max_length=256, or over" in result.out
    manifest = read(tmp_path / "a" / "manifest.json")
    assert manifest["dropped"]["long_prompt"] == 2
    # A shard may be empty.
    assert [shard["records"] for shard in manifest["shards"]] == [2, 0, 2]
    assert manifest["shards"][1]["dropped"] == {"long_prompt": ["q6", "q7"]}
    assert answers_in(tmp_path / "a").keys() == {"q1", "q2", "q3", "q4"}
    flags = ["--config.generate.cut_answers=drop"]
    result = uld("generate", tiny.config, f"--output={tmp_path / 'b'}", *flags)
    one_line(result, "none of 16 questions has an answer; left out: 16 cut at teacher.max_new_t")


def another_tokenizer(tiny, tmp_path):
    directory = tiny.copy("teacher", tmp_path / "teacher")
    tokenizer = toy_tokenizer(kind="metaspace")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ("--config.generate.temperature=0.5", "provenance.temperature is 0.0, expected 0.5"),
        ("--config.teacher.shots=1", "provenance.shots is 0, expected 1"),
        ("--config.data.task=qa_medical", "provenance.task is 'qa', expected 'qa_medical'"),
        ("tokenizer", "provenance.tokenizer is '"),
        ("weights", "provenance.weights is '"),
        ("data", "provenance.data is '"),
        ("--config.generate.shard_size=4", "shard_size is 5, expected 4"),
    ],
)
def test_answers_of_something_else_are_not_continued(
    uld, tiny, copy, tmp_path, finished, change, differing
):
    if not finished:
        (copy / "manifest.json").rename(copy / "unfinished.json")
    flags = [SMALL, change]
    if change == "tokenizer":
        flags[1] = f"--config.teacher.source={another_tokenizer(tiny, tmp_path)}"
    elif change == "weights":
        directory = tiny.copy("teacher", tmp_path / "teacher")
        tiny.change_weights(directory, lambda tensors: tensors["model.norm.weight"].fill(0.5))
        flags[1] = f"--config.teacher.source={directory}"
    elif change == "data":
        records = [tiny.record(n, question="What now?" if n == 3 else "?") for n in range(20)]
        flags[1] = tiny.write(tmp_path / "other.jsonl", records)
        # Prepared beforehand, so that the command prints no notice of a first use.
        source = f"jsonl:{tmp_path / 'other.jsonl'}"
        load_examples(source, "train", data_dir=tiny.root / "tfds")
    before = contents(copy)
    result = uld("generate", tiny.config, f"--output={copy}", *flags)
    one_line(result, "holds a data set of answers of something else: ", differing)
    assert "choose another directory, or remove this one" in result.err
    if change == "tokenizer":
        assert "provenance.prompts is '" in result.err  # it has a chat template now
        assert "provenance.weights" not in result.err
    assert contents(copy) == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "has sha256 "),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "has 131071 bytes, expected 131072",
        ),
        (lambda path: path.unlink(), "no such file, expected a shard of the data set of answers"),
    ],
)
def test_a_damaged_shard_is_refused_before_anything_starts(
    uld, tiny, copy, tmp_path, damage, message
):
    shard = copy / "answers-train.array_record-00001-of-00004"
    damage(shard)
    flags = [f"--config.data.source=generated:{copy}", "--config.data.answers=gold"]
    for command in (
        ["train", f"--workdir={tmp_path / 'run'}", *flags],
        ["generate", f"--output={copy}", SMALL],
    ):
        result = uld(command[0], tiny.config, *command[1:])
        one_line(result, f"{shard}: {message}")
        assert "remove the directory and run `uld-jax generate` again" in result.err
    assert not (tmp_path / "run").exists()


def test_unfinished_answers_are_not_trained_on(uld, tiny, copy, tmp_path):
    (copy / "manifest.json").unlink()
    flags = [f"--config.data.source=generated:{copy}", "--config.data.answers=gold"]
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'run'}", *flags)
    one_line(result, "expected a finished data set of answers, found 4 shards of an unfinished")


def test_a_damaged_shard_of_an_unfinished_set_is_answered_again(
    uld, tiny, made, tmp_path, interrupted, monkeypatch
):
    directory = tmp_path / "answers"
    command = ["generate", tiny.config, f"--output={directory}", SMALL]
    interrupted(3)
    with pytest.raises(KeyboardInterrupt):
        uld(*command)
    monkeypatch.undo()
    flip(directory / "answers-train.array_record-00001-of-00004")
    written = interrupted(9)
    assert uld(*command).status == 0
    assert written == [1, 3]
    assert contents(directory) == contents(made)


def test_lines_are_resumed_too(uld, tiny, tmp_path, interrupted, monkeypatch):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert uld("generate", tiny.config, f"--output={whole}").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["whole.jsonl"]
    command = ["generate", tiny.config, f"--output={output}", SMALL]
    interrupted(3)
    with pytest.raises(KeyboardInterrupt):
        uld(*command)
    assert not output.exists()
    monkeypatch.undo()
    written = interrupted(9)
    assert uld(*command).status == 0
    assert written == [3]
    assert output.read_bytes() == whole.read_bytes()
    # Killed after its last step but one: the lines are whole, the shards beside them are not gone.
    (tmp_path / "answers.jsonl.shards").mkdir()
    assert uld(*command).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "whole.jsonl"]
    one_line(uld(*command), f"--output={output}: exists; choose another file")


def test_the_answers_of_a_run_are_resumed(uld, tiny, trained, tmp_path, interrupted, monkeypatch):
    workdir = tmp_path / "run"
    interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        uld("train", tiny.config, f"--workdir={workdir}", SMALL)
    assert not (workdir / "teacher_answers.json").exists()
    monkeypatch.undo()
    written = interrupted(9)
    assert uld("train", f"--workdir={workdir}").status == 0
    assert written == [2, 3]
    for name in ("teacher_answers.json", "after.json"):
        assert (workdir / name).read_bytes() == (trained / name).read_bytes()
    assert not (workdir / "teacher_answers").exists()


def test_a_run_has_one_answer_to_a_question(uld, tiny, tmp_path):
    result = uld("train", tiny.config, f"--workdir={tmp_path / 'run'}", *HOT)
    one_line(result, "generate.samples=2: expected 1, an answer to each question; let `uld-jax gen")
    assert not (tmp_path / "run").exists()
