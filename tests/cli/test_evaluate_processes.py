"""`uld-jax evaluate` as real processes: killed while it answers, and two of them together."""

import json
import signal
import socket
import time

import pytest

from tests.cli.test_generate_processes import finish, start

QUESTIONS = 48
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """The flag of a data set with many held-out questions."""
    records = [
        tiny.record(i, split="eval" if i < QUESTIONS else "train") for i in range(QUESTIONS + 4)
    ]
    return tiny.write(tmp_path_factory.mktemp("data") / "qa.jsonl", records)


def evaluate(output, *flags, log=None):
    # Two at a time: a kill finds some answered and some not.
    flags = ["--config.eval.batch_size=2", *flags] if "--config=" in flags[0] else flags
    command = ["-m", "uld_jax.cli.main", "evaluate", *flags, f"--output={output}"]
    return start(command, log or output.with_suffix(".log"))


@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory):
    """What a command that nothing disturbs leaves."""
    output = tmp_path_factory.mktemp("whole") / "scores.json"
    finish(evaluate(output, tiny.config, data), output.with_suffix(".log"))
    return output


def results(output):
    return [output.with_suffix(f".{kind}").read_bytes() for kind in ("json", "jsonl", "png")]


def rows_of(output):
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


def whole_lines(path):
    return path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""


def test_killed_while_answering_and_while_reading_nothing_is_done_twice(
    tiny, data, whole, uld, tmp_path
):
    output, log = tmp_path / "scores.json", tmp_path / "scores.log"
    journals = output.with_suffix(".journal")
    kept = {}
    for name, enough in (("answers", 9), ("student", 5)):
        journal = journals / f"{name}-00000.jsonl"
        process = evaluate(output, tiny.config, data)
        while process.poll() is None and whole_lines(journal).count(b"\n") < enough:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()
        assert not output.exists()
        kept[name] = whole_lines(journal)
        assert enough <= kept[name].count(b"\n") < QUESTIONS, name
    assert whole_lines(journals / "answers-00000.jsonl").startswith(kept["answers"])
    other = ["--config.eval.batch_size=2", data, f"--model={tiny.root / 'teacher'}"]
    refused = uld("evaluate", tiny.config, *other, f"--output={output}")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert f"{journals / 'answers-00000.jsonl'}: holds answers of" in refused.err
    assert "use another directory, or delete the file" in refused.err
    done = kept["student"].count(b"\n")
    log.unlink()
    finish(evaluate(output, tiny.config, data), log)
    left = QUESTIONS - done
    assert f" {left}/{left} " in log.read_text()
    assert "held-out questions" in log.read_text()
    assert f" {QUESTIONS}/{QUESTIONS} " not in log.read_text().split("scoring")[0]
    assert rows_of(output) == rows_of(whole)
    assert results(output) == results(whole)
    assert not journals.exists()


def together(output, *flags):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    shared = [f"--coordinator={address}", "--processes=2"]
    logs = [output.with_name(f"{number}.log") for number in range(2)]
    processes = [
        evaluate(output, *flags, *shared, f"--process={number}", log=log)
        for number, log in enumerate(logs)
    ]
    for process, log in zip(processes, logs, strict=True):
        finish(process, log)
    return [log.read_text() for log in logs]


def test_two_processes_share_the_questions(tiny, data, whole, tmp_path):
    output = tmp_path / "scores.json"
    said = together(output, tiny.config, data)
    assert f" {QUESTIONS // 2}/{QUESTIONS // 2} " in said[0]
    assert [" f1 " in text for text in said] == [True, False]
    for row, expected in zip(rows_of(output), rows_of(whole), strict=True):
        assert row["prediction"] == expected["prediction"]
        assert row["student"]["nats"] == pytest.approx(expected["student"]["nats"], abs=1e-4)
    ours, one = (json.loads(path.read_text()) for path in (output, whole))
    assert ours["scores"] == one["scores"]
    assert ours["student"]["bits_per_byte"] == pytest.approx(one["student"]["bits_per_byte"])


def test_two_processes_restore_the_checkpoint_of_one(trained, tmp_path):
    output = tmp_path / "scores.json"
    together(output, f"--workdir={trained}")
    after = json.loads((trained / "after.json").read_text())
    assert json.loads(output.read_text())["scores"] == pytest.approx(after["scores"])
    assert [row["prediction"] for row in rows_of(output)] == [
        answer["prediction"] for answer in after["answers"]
    ]
