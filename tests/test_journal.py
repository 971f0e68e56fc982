import json

import pytest

from uld_jax.errors import UserError
from uld_jax.journal import Journal, read_journal

ABOUT = {"model": "m", "data": [1, 2]}


def open_journal(path, about=ABOUT):
    return Journal(path, about, what="answers")


def test_records_come_back_and_failures_do_not(tmp_path):
    path = tmp_path / "j.jsonl"
    with open_journal(path) as journal:
        journal.add({"a": {"text": "é", "n": 1}, "b": {"failed": "no"}}, {"a": "1", "b": "2"})
        journal.add({"c": {"n": 0.1}}, {"c": "3"})
        assert [journal.has(key, digest) for key, digest in zip("abcd", "1234", strict=True)] == [
            True,
            False,
            True,
            False,
        ]
    with open_journal(path) as journal:
        assert (journal.read("a"), journal.read("c")) == ({"text": "é", "n": 1}, {"n": 0.1})
        with pytest.raises(UserError, match="its answers for 'a' are of another text"):
            journal.has("a", "9")
    assert read_journal(path, ABOUT, what="answers") == {
        "a": {"text": "é", "n": 1},
        "c": {"n": 0.1},
    }


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_what_a_kill_leaves_of_a_line_is_dropped_and_written_over(tmp_path, left):
    path = tmp_path / "j.jsonl"
    with open_journal(path) as journal:
        journal.add({"a": {"n": 1}}, {"a": "1"})
        before = path.read_bytes()
        journal.add({"b": {"n": 2, "long": "x" * 50}}, {"b": "2"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(before) + left])
    assert read_journal(path, ABOUT, what="answers") == {"a": {"n": 1}}
    with open_journal(path) as journal:
        assert path.read_bytes() == before
        journal.add({"b": {"n": 2, "long": "x" * 50}}, {"b": "2"})
    assert path.read_bytes() == whole


@pytest.mark.parametrize("left", [0, 5])
def test_a_first_line_that_is_not_whole_is_written_anew(tmp_path, left):
    path = tmp_path / "j.jsonl"
    open_journal(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    assert read_journal(path, ABOUT, what="answers") == {}
    open_journal(path).close()
    assert path.read_bytes() == whole


def test_other_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    open_journal(path).close()
    with pytest.raises(UserError, match=r"holds answers of .*'m'.*expected .*'other'"):
        open_journal(path, {"model": "other"})
    for line in ("{}", "[1]", "no", json.dumps({"id": "a"})):
        path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n")
        for read in (open_journal, lambda path: read_journal(path, ABOUT, what="answers")):
            with pytest.raises(UserError, match=r"j.jsonl:2: not a line of a journal of answers"):
                read(path)
    with pytest.raises(UserError, match="cannot write"):
        open_journal(tmp_path)
