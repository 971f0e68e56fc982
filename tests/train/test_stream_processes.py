"""Two processes, each with devices of teacher and student, train as one process online."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

STUDENT = (4, 1, 1)
CHILD = """
import json, sys
from pathlib import Path
import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
process, address, folder, workdir, *shapes = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
sys.path.insert(0, folder)
from test_stream import Setting

setting = Setting()
for number, shape in enumerate(shapes):
    rows = []
    setting.fit(
        Path(workdir) / str(number),
        student=(4, 1, 1),
        teacher=tuple(json.loads(shape)),
        depth=2,
        progress=lambda step, steps, row: rows.append(row),
    )
    print(json.dumps(rows))
"""


def free_address():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_online(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from test_stream import Setting, assert_close

    shapes = [(4, 1, 1), (1, 2, 2)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "NPROC": "32",
    }
    address, folder = free_address(), str(Path(__file__).parent)
    arguments = [address, folder, str(tmp_path / "two"), *map(json.dumps, shapes)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(number), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    expected = Setting().fit(tmp_path / "online", student=STUDENT)
    ends = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err[-3000:]
    for out, _ in ends:
        runs = [json.loads(line) for line in out.splitlines() if line.startswith("[{")]
        assert len(runs) == len(shapes)
        for rows in runs:
            assert_close(rows, expected)
