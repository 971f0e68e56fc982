"""The launchers called as a user calls them, with the programs they start recorded.

The stand-ins for gcloud, xpk and srun are programs on PATH: what reaches them went through real
shells. `gcloud ... ssh` runs its command, as the worker's login shell would, in a directory that
stands for the worker's home.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

RECORD = f"""#!{sys.executable} -I
import json, os, pathlib, shutil, signal, subprocess, sys, time
root, argv = pathlib.Path({{root!r}}), sys.argv[1:]
name = pathlib.Path(sys.argv[0]).name
with (root / "calls").open("a") as calls:
    calls.write(json.dumps([name, *argv]) + "\\n")

def next_line(path):
    lines = path.read_text().splitlines() if path.exists() else []
    if lines:
        path.write_text("".join(line + "\\n" for line in lines[1:]))
    return lines[0] if lines else None
"""

GCLOUD = """
verb = argv[3:4]
if verb == ["create"]:
    shutil.rmtree(root / "workers", ignore_errors=True)
elif verb == ["describe"]:
    print(next_line(root / "states") or "ACTIVE")
elif verb == ["ssh"]:
    home = root / "workers" / argv[4]
    home.mkdir(parents=True, exist_ok=True)
    command = next(a for a in argv if a.startswith("--command=")).removeprefix("--command=")
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("HF_TOKEN")  # of the machine that launches
    shell = subprocess.run(["bash", "-c", command], cwd=home, env=environment)
    sys.exit(shell.returncode)
elif verb == ["scp"]:
    node, place = argv[5].split(":")
    shutil.copy(argv[4], root / "workers" / node / place)
"""

# Exits as its worker's file `statuses` says line by line: a number, or `wait` for SIGTERM, then 75.
ULD_JAX = """
home = pathlib.Path(os.environ["HOME"])
(home / "token").write_text(str(os.environ.get("HF_TOKEN")))
print("process", os.getpid(), "trains", flush=True)
status = next_line(home / "statuses") or "0"
if status == "wait":
    signal.signal(signal.SIGTERM, lambda *_: print("saved", flush=True) or sys.exit(75))
    (home / "waits").touch()
    for _ in range(3000):  # a minute: a test that failed leaves nobody behind
        if (home / "go").exists():
            break
        time.sleep(0.02)
    status = "0"
for argument in argv:
    if argument.startswith("--workdir=runs/"):
        workdir = pathlib.Path(argument.removeprefix("--workdir="))
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "after.json").write_text("{}")
sys.exit(int(status))
"""

SRUN = """
words = argv[next(i for i, a in enumerate(argv) if not a.startswith("-")) :]
sys.exit(subprocess.run(words).returncode)
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A directory with the stand-ins in bin/, calls in calls, workers' homes in workers/."""

    root: Path
    token: str = "hf-very-secret"  # in the environment of whoever launches

    def environment(self, **more):
        return {
            **os.environ,
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.root),
            "HF_TOKEN": self.token,
            "ULD_JAX_ACTIVE_ENV": "1",
            "ULD_JAX_CACHE": str(self.root / "a cache"),
            **{name: str(value) for name, value in more.items()},
        }

    def launch(self, script, *arguments, **environment):
        """Runs a launcher to its end."""
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment(**environment),
            cwd=self.root,
        )

    def start(self, script, *arguments):
        """Starts a launcher in a process group of its own."""
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
            cwd=self.root,
            start_new_session=True,
        )

    def program(self, name, body=""):
        path = self.root / "bin" / name
        path.write_text(RECORD.format(root=str(self.root)) + body)
        path.chmod(0o755)

    def calls(self, name=None):
        """All that was started so far, or what was started of one program, without its name."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [json.loads(line) for line in lines]
        return calls if name is None else [call[1:] for call in calls if call[0] == name]

    def worker(self, node="pod"):
        """A worker's home."""
        home = self.root / "workers" / node
        home.mkdir(parents=True, exist_ok=True)
        return home

    def statuses(self, *statuses, home=None):
        """What the next calls of uld-jax end with."""
        path = (home or self.worker()) / "statuses"
        path.write_text("".join(f"{status}\n" for status in statuses))


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "bin").mkdir()
    made = Machine(tmp_path)
    for name, body in [
        ("gcloud", GCLOUD),
        ("uld-jax", ULD_JAX),
        ("srun", SRUN),
        *((name, "") for name in ("python3", "pip", "xpk", "kubectl", "scontrol")),
    ]:
        made.program(name, body)
    return made
