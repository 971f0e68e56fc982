"""Checkpoints in a store that orbax does not know: whole there, or not there."""

import jax
import pytest

from tests.stores import SERVERS
from tests.train.test_checkpoint import assert_equal_states, make_state, restore, save
from uld_jax.cli.compose import claim_workdir
from uld_jax.config import RunConfig
from uld_jax.errors import UserError
from uld_jax.files import files_below, locate, write_text
from uld_jax.train import Checkpoints
from uld_jax.train.staging import Stage

STORE = SERVERS["s3"]
pytestmark = pytest.mark.skipif(
    bool(STORE.absent()), reason=f"{', '.join(STORE.absent())}: absent: pip install -e '.[test]'"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with STORE.served(tmp_path_factory.mktemp("server") / "log"):
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where copies are put."""
    monkeypatch.setenv("ULD_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def written(stage, step):
    """What orbax would have written."""
    path = stage.local / str(step)
    (path / "params").mkdir(parents=True)
    (path / "params" / "a").write_text(str(step))
    (path / "seal").write_text("whole")
    return path


def test_the_newest_stay_and_what_was_cut_off_goes(server, cache):
    place = locate(f"{STORE.bucket}/cut")
    write_text(place / "1" / "params" / "a", "cut off")
    write_text(place / "3" / "params" / "b", "cut off")
    stage = Stage(place, keep=2, seal="seal")
    assert stage.steps() == []
    for step in (2, 3):
        stage.push(written(stage, step), step)
    assert stage.steps() == [3, 2]
    assert names(place) == ["2", "3"]
    assert [path.name for path in files_below(place / "3")] == ["a", "seal"]
    stage.push(written(stage, 4), 4)
    assert stage.steps() == [4, 3]
    stage.close()
    assert names(cache / "staged") == []
    reader = Stage(place, keep=None, seal="seal")
    assert (reader.fetch(3) / "params" / "a").read_text() == "3"
    reader.close()
    assert not reader.local.exists()


def test_a_checkpoint_comes_back_bit_for_bit(server, cache):
    place = locate(f"{STORE.bucket}/whole")
    save(place, 2, 4, 6)
    assert names(place) == ["4", "6"]
    assert names(cache / "staged") == []
    state, iterator_state = restore(place)
    assert_equal_states(state, make_state(step=6)[0])
    assert iterator_state == {"position": 6}


def test_a_damaged_one_is_removed_and_its_step_written_again(server, cache, caplog):
    place = locate(f"{STORE.bucket}/damaged")
    save(place, 2, 4)
    largest = max(files_below(place / "4"), key=lambda path: path.stat().length)
    largest.write_bytes(largest.read_bytes()[:-1])
    expected, shardings = make_state(step=2)
    with Checkpoints(place, keep=2) as checkpoints:
        state, _ = checkpoints.restore(expected, shardings)
        assert f"checkpoint {place / '4'} is damaged or not complete: trying" in caplog.text
        assert_equal_states(state, expected)
        assert names(place) == ["2"]
        checkpoints.save(make_state(step=4)[0], {"position": 4})
    assert names(place) == ["2", "4"]
    assert_equal_states(restore(place)[0], make_state(step=4)[0])


def test_one_that_cannot_be_uploaded_is_an_error_on_one_line(cache):
    place = locate(f"{STORE.bucket}/refused")
    with STORE.refusing(readable=True), pytest.raises(UserError) as raised:
        save(place, 2)
    assert str(raised.value).startswith(f"{place}: a checkpoint could not be written (")
    assert "caller has no right to objects" in str(raised.value)
    assert names(cache / "staged") == []


def test_several_processes_are_refused_before_anything_is_written(server, monkeypatch):
    workdir = f"{STORE.bucket}/several"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"^--workdir=s3://bucket/several: 2 processes write the"):
        claim_workdir(workdir, RunConfig())
    assert not locate(workdir).exists()
