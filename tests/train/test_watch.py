"""What a run leaves for those who watch it."""

import json
import time

import jax.numpy as jnp
import pytest

from uld_jax.train.watch import Reporter, Tracer


def test_the_heartbeat_is_of_the_last_step(tmp_path):
    shown = []
    before = time.time()
    with Reporter(
        tmp_path, first=2, steps=9, progress=lambda *given: shown.append(given)
    ) as reporter:
        rows = [{"step": step, "seconds": step / 10} for step in (3, 4)]
        reporter.report(rows)
        reporter.report([])
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert before <= beat.pop("time") + 1e-3 <= time.time() + 1
    assert beat == {"step": 4, "steps": 9, "seconds": 0.4}
    assert shown == [(3, 9, rows[0]), (4, 9, rows[1])]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize(("first", "steps", "ends"), [(2, 2, 5), (3, 9, 4)])
def test_a_trace_of_chosen_steps(tmp_path, first, steps, ends):
    tracer = Tracer(tmp_path / "profile", first, steps)
    for step in range(1, ends + 1):
        tracer.before(step)
        result = jnp.ones(8) + step
        tracer.after(step, result, last=step == ends)
        there = [path for path in tmp_path.rglob("*.xplane.pb") if path.stat().st_size]
        assert bool(there) == (step >= min(first + steps - 1, ends))


def test_no_trace(tmp_path):
    tracer = Tracer(tmp_path / "profile", 0, 3)
    tracer.before(1)
    tracer.after(1, None, last=True)
    assert not (tmp_path / "profile").exists()
