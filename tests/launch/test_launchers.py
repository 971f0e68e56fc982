"""launch/: what is printed, what is run, what is started again, and that no secret is shown."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
WORKDIR = "/mnt/bucket/my 'first' run"
BUCKET = "gs://bucket/my 'first' run"
TRAIN = [
    "train",
    "--config=configs/quickstart.py",
    f"--workdir={WORKDIR}",
    "--config.train.epochs=2",
]
ZONE = ["--zone=us-east5-a", "--project=mine"]
CLUSTER = ["--cluster=tpus", "--zone=us-east5-a", "--tpu-type=v5litepod-16"]


def words(line):
    """A printed line's words, those of a --command inside it in a list of their own."""
    found = []
    for word in shlex.split(line):
        if word.startswith("--command="):
            found.append(shlex.split(word.removeprefix("--command=")))
        else:
            found.append(word)
    return found


def dry(machine, script, *arguments):
    done = machine.launch(script, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.calls() == []
    assert not (machine.root / "a cache").exists()
    assert machine.token not in done.stdout
    return [words(line) for line in done.stdout.splitlines()]


def secrets_file(machine):
    path = machine.root / "my secrets"
    path.write_text(f"# a comment\nHF_TOKEN={machine.token}\n")
    return path


def tpu(verb, kind="tpu-vm", name="pod"):
    return ["gcloud", "compute", "tpus", kind, verb, name]


def test_tpu_pod_prints_how_slices_are_rented(machine):
    create, describe = dry(
        machine,
        "tpu_pod.sh",
        "create",
        "pod",
        *ZONE,
        "--accelerator-type=v5litepod-16",
        "--num-slices=2",
        "--spot",
        "--create-flag=--labels=of=my group",
        "--dry-run",
    )
    assert create[:6] == tpu("create", "queued-resources")
    assert set(create[6:]) == {
        *ZONE,
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-count=2",
        "--node-prefix=pod",
        "--spot",
        "--labels=of=my group",
    }
    assert describe == [*tpu("describe", "queued-resources"), "--format=value(state.state)", *ZONE]

    (create,) = dry(
        machine,
        "tpu_pod.sh",
        "create",
        "pod",
        "--dry-run",
        "--tpu-vm",
        *ZONE,
        "--accelerator-type=v6e-8",
    )
    flags = ["--version=v2-alpha-tpuv6e", "--accelerator-type=v6e-8"]
    assert create == [*tpu("create"), *flags, *ZONE]


def test_tpu_pod_prints_how_a_command_reaches_all_workers(machine):
    lines = dry(
        machine, "tpu_pod.sh", "run", "pod", "--num-slices=2", *ZONE, "--dry-run", "--", *TRAIN
    )
    command = ["bash", "uld_jax/launch/worker.sh", "run", "uld-jax", *TRAIN]
    assert lines == [
        [*tpu("ssh", name=f"pod-{number}"), "--worker=all", command, *ZONE] for number in range(2)
    ]


def test_tpu_pod_prints_the_rest(machine):
    secrets = secrets_file(machine)
    lines = dry(
        machine,
        "tpu_pod.sh",
        "setup",
        "pod",
        *ZONE,
        f"--secrets={secrets}",
        "--ship=tests",
        "--dry-run",
    )
    archive = f"{machine.root}/a cache/launch/pod/uld_jax.tar.gz"
    assert lines[0] == ["mkdir", "-p", os.path.dirname(archive)]
    assert lines[1][1:5] == ["COPYFILE_DISABLE=1", "tar", "-czf", archive]
    assert {"uld_jax", "configs", "launch", "tests"} <= set(lines[1])
    assert [line[3:6] for line in lines[2:]] == [
        ["tpu-vm", verb, subject]
        for verb, subject in [
            ("ssh", "pod"),
            ("scp", archive),
            ("scp", str(secrets)),
            ("ssh", "pod"),
        ]
    ]
    assert lines[4][6] == "pod:.config/uld_jax/secrets.env"

    for action, workers in [("logs", 0), ("stop", "all")]:
        (line,) = dry(machine, "tpu_pod.sh", action, "pod", *ZONE, "--internal-ip", "--dry-run")
        there = ["bash", "uld_jax/launch/worker.sh", action]
        assert line == [*tpu("ssh"), f"--worker={workers}", "--internal-ip", there, *ZONE]
    (delete,) = dry(machine, "tpu_pod.sh", "delete", "pod", *ZONE, "--dry-run")
    assert delete == [*tpu("delete", "queued-resources"), "--force", "--quiet", *ZONE]
    made, copied = dry(
        machine,
        "tpu_pod.sh",
        "fetch",
        "pod",
        *ZONE,
        f"--workdir={BUCKET}",
        "--to=my dir",
        "--dry-run",
    )
    assert made == ["mkdir", "-p", "my dir"]
    assert copied == ["gcloud", "storage", "rsync", "--recursive", BUCKET, "my dir"]


def test_gke_xpk_prints_its_commands(machine):
    secrets = secrets_file(machine)
    lines = dry(
        machine,
        "gke_xpk.sh",
        "run",
        "job",
        *CLUSTER,
        f"--secrets={secrets}",
        "--dry-run",
        "--",
        *TRAIN,
    )
    assert [line[0] for line in lines] == ["mkdir", "env", "rm", "mkdir", "tar", "xpk"]
    workload = lines[-1]
    assert workload[:3] == ["xpk", "workload", "create"]
    pip = ["pip", "install", "--quiet", "--root-user-action=ignore", ".[tpu]"]
    assert [*pip, "&&", "exec", "uld-jax", *TRAIN] in workload
    assert {
        *CLUSTER,
        "--workload=job",
        f"--env-file={secrets}",
        "--max-restarts=100",
        "--restart-on-exit-codes=75",
        f"--script-dir={machine.root}/a cache/launch/job/image",
    } <= {word for word in workload if isinstance(word, str)}

    ready = [*CLUSTER, "--docker-image=made", "--dry-run", "--", *TRAIN]
    (workload,) = dry(machine, "gke_xpk.sh", "run", "job", *ready)
    assert "--docker-image=made" in workload
    assert ["exec", "uld-jax", *TRAIN] in workload
    (delete,) = dry(machine, "gke_xpk.sh", "delete", "job", *CLUSTER, "--dry-run")
    assert delete[:4] == ["xpk", "workload", "delete", "--workload=job"]
    (create,) = dry(machine, "gke_xpk.sh", "create-cluster", *CLUSTER, "--spot", "--dry-run")
    assert create[:3] == ["xpk", "cluster", "create"]
    assert {*CLUSTER, "--spot", "--num-slices=1"} == set(create[3:])
    credentials, logs = dry(machine, "gke_xpk.sh", "logs", "job", *CLUSTER, "--dry-run")
    assert "--region=us-east5" in credentials
    assert logs[:3] == ["kubectl", "logs", "--follow"]


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_slurm_prints_its_command(machine, way):
    flags, environment = (["--dry-run"], {}) if way == "argument" else ([], {"ULD_JAX_DRY_RUN": 1})
    done = machine.launch("slurm_gpu.sbatch", *flags, *TRAIN, **environment)
    assert machine.calls() == []
    assert (done.returncode, machine.token in done.stdout) == (0, False)
    step = shlex.split(done.stdout)
    assert step[0] == "srun"
    assert step[-len(TRAIN) - 1 :] == ["uld-jax", *TRAIN]


def test_a_pod_from_renting_to_giving_back(machine):
    def pod(action, *more):
        done = machine.launch("tpu_pod.sh", action, "pod", *ZONE, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (machine.root / "states").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    pod("create", "--accelerator-type=v5litepod-16", "--poll=0")
    assert [call[3] for call in machine.calls("gcloud")] == ["create", *["describe"] * 3]

    pod("setup", f"--secrets={secrets_file(machine)}")
    worker = machine.worker()
    assert (worker / "uld_jax" / "uld_jax" / "cli" / "main.py").is_file()
    assert (worker / ".config" / "uld_jax").stat().st_mode & 0o077 == 0
    install = machine.calls("python3")[-1]
    assert install[:3] == ["-m", "pip", "install"]
    assert install[-2:] == ["-e", ".[tpu]"]

    # A workdir on the worker's own disk, with what shells trip over in its name.
    workdir = "runs/my 'first' run $HOME"
    train = ["train", f"--workdir={workdir}", '--config.generate.stop_strings=["\\n\\n", "Q: "]']
    machine.statuses(75, 75, 0)
    output = pod("run", "--", *train)
    assert output.count("trains") == 3
    assert machine.calls("uld-jax") == [train] * 3
    assert (worker / "token").read_text() == machine.token
    assert machine.token not in (machine.root / "calls").read_text()

    pod("fetch", f"--workdir={workdir}", f"--to={machine.root}/fetched here")
    assert (machine.root / "fetched here" / "after.json").is_file()
    pod("delete")
    assert machine.calls("gcloud")[-1][2:5] == ["queued-resources", "delete", "pod"]


def test_a_request_that_failed_is_not_waited_for(machine):
    (machine.root / "states").write_text("WAITING_FOR_RESOURCES\nFAILED\n")
    done = machine.launch(
        "tpu_pod.sh", "create", "pod", *ZONE, "--accelerator-type=v4-8", "--poll=0"
    )
    assert done.returncode == 1
    assert "error: pod is FAILED" in done.stderr


def set_up(machine, *nodes):
    """Workers as `tpu_pod.sh setup` leaves them."""
    for node in nodes:
        shutil.copytree(LAUNCH, machine.worker(node) / "uld_jax" / "launch")


@pytest.mark.parametrize(
    ("statuses", "flags", "status", "runs"),
    [((1, 0), [], 1, 1), ((2, 0), [], 2, 1), ((75, 75, 0), ["--max-restarts=1"], 75, 2)],
)
def test_only_what_saved_is_started_again(machine, statuses, flags, status, runs):
    set_up(machine, "pod")
    machine.statuses(*statuses)
    done = machine.launch("tpu_pod.sh", "run", "pod", *ZONE, *flags, "--", *TRAIN)
    assert done.returncode == status
    assert len(machine.calls("uld-jax")) == runs


@pytest.mark.parametrize(
    ("statuses", "status"), [((75, 1), 1), ((0, 75), 0), ((75, 0), 0), ((3, 75), 3)]
)
def test_slices_run_at_once_and_the_worst_status_counts(machine, statuses, status):
    nodes = ["pod-0", "pod-1"]
    set_up(machine, *nodes)
    for node, ended in zip(nodes, statuses, strict=True):
        machine.statuses(ended, home=machine.worker(node))
    done = machine.launch("tpu_pod.sh", "run", "pod", "--num-slices=2", *ZONE, "--", *TRAIN)
    assert done.returncode == status
    assert len(machine.calls("uld-jax")) == (4 if status == 0 else 2)


def wait_for(path):
    for _ in range(500):
        if path.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


RUN = ["tpu_pod.sh", "run", "pod", *ZONE, "--"]


def test_a_broken_connection_is_followed_again(machine):
    set_up(machine, "pod")
    machine.statuses("wait")
    launcher = machine.start(*RUN, *TRAIN)
    wait_for(machine.worker() / "waits")
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.communicate()

    other = machine.launch(*RUN, "evaluate", "--workdir=elsewhere")
    assert other.returncode == 2
    assert "runs another command: uld-jax train" in other.stderr
    again = machine.start(*RUN, *TRAIN)
    assert "trains" in again.stdout.readline()  # what was said before it followed
    (machine.worker() / "go").touch()
    again.communicate(timeout=30)
    assert again.returncode == 0
    assert machine.calls("uld-jax") == [TRAIN]


def test_a_worker_that_shuts_down_signals_everything(machine):
    set_up(machine, "pod")
    machine.statuses("wait", 0)
    launcher = machine.start(*RUN, *TRAIN)
    wait_for(machine.worker() / "waits")
    state = machine.worker() / "uld_jax" / ".worker"
    for name in ("supervisor", "pid"):
        os.kill(int((state / name).read_text()), signal.SIGTERM)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 0
    assert machine.calls("uld-jax") == [TRAIN] * 2


def test_stop_saves_and_is_not_started_again(machine):
    set_up(machine, "pod")
    machine.statuses("wait")
    launcher = machine.start(*RUN, *TRAIN)
    wait_for(machine.worker() / "waits")
    stopped = machine.launch("tpu_pod.sh", "stop", "pod", *ZONE)
    assert "ended with status 75" in stopped.stdout
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 143
    assert "saved" in output
    assert machine.calls("uld-jax") == [TRAIN]


def test_a_slice_that_was_taken_away_is_replaced(machine):
    set_up(machine, "pod")
    machine.statuses(255)
    (machine.root / "states").write_text("SUSPENDED\nWAITING_FOR_RESOURCES\nACTIVE\n")
    flags = ["--recreate", "--accelerator-type=v5litepod-16", "--spot", "--poll=0"]
    done = machine.launch("tpu_pod.sh", "run", "pod", *ZONE, *flags, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    verbs = [call[3] for call in machine.calls("gcloud")]
    assert verbs == [
        *["ssh", "describe", "delete", "create", "describe", "describe"],
        *["ssh", "scp", "ssh", "ssh"],
    ]
    assert machine.calls("uld-jax") == [TRAIN] * 2


def test_gke_builds_from_what_is_needed_and_its_command_hears_signals(machine):
    done = machine.launch("gke_xpk.sh", "run", "job", *CLUSTER, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    image = machine.root / "a cache" / "launch" / "job" / "image"
    assert sorted(path.name for path in image.iterdir()) == [
        *["LICENSE", "README.md", "configs", "launch", "pyproject.toml", "uld_jax"]
    ]
    (workload,) = machine.calls("xpk")
    assert machine.token not in " ".join(workload)
    command = next(a for a in workload if a.startswith("--command=")).removeprefix("--command=")
    # As xpk runs it in the container, and passes SIGTERM on.
    script = (
        f"({command}) & PID=$!; while [ ! -e waits ]; do sleep 0.02; done; kill $PID; wait $PID"
    )
    machine.statuses("wait", home=machine.root)
    container = subprocess.run(["bash", "-c", script], cwd=machine.root, env=machine.environment())
    assert container.returncode == 75
    assert machine.calls("uld-jax") == [TRAIN]


def submitted_from(machine):
    """A repository without .venv, so that the stand-in for uld-jax is found in PATH."""
    shutil.copytree(LAUNCH, machine.root / "repository" / "launch", dirs_exist_ok=True)
    return machine.root / "repository"


def slurm(machine, *arguments, **environment):
    place = submitted_from(machine)
    job = {"SLURM_JOB_ID": 7, "SLURM_SUBMIT_DIR": place, "SLURM_CPUS_PER_TASK": 3}
    return machine.launch("slurm_gpu.sbatch", *arguments, **{**job, **environment})


def test_slurm_queues_again_what_saved(machine):
    machine.statuses(75, 75, 0, home=machine.root)
    for restarts in range(3):  # Slurm starts the script again and counts
        done = slurm(machine, *TRAIN, SLURM_RESTART_COUNT=restarts)
        assert done.returncode == (75 if restarts < 2 else 0)
    assert machine.calls("scontrol") == [["requeue", "7"]] * 2
    assert machine.calls("uld-jax") == [TRAIN] * 3
    assert (machine.root / "token").read_text() == machine.token
    assert machine.token not in (machine.root / "calls").read_text()
    assert "--cpus-per-task=3" in machine.calls("srun")[0]


@pytest.mark.parametrize(
    ("status", "environment"),
    [(1, {}), (137, {}), (75, {"SLURM_RESTART_COUNT": 2, "ULD_JAX_MAX_RESTARTS": 2})],
)
def test_slurm_leaves_the_rest(machine, status, environment):
    machine.statuses(status, home=machine.root)
    assert slurm(machine, *TRAIN, **environment).returncode == status
    assert machine.calls("scontrol") == []


def test_slurm_waits_for_the_save_when_its_own_shell_is_signalled(machine):
    machine.statuses("wait", home=machine.root)
    place = submitted_from(machine)
    environment = machine.environment(SLURM_JOB_ID=7, SLURM_SUBMIT_DIR=place)
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm_gpu.sbatch"), *TRAIN],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    wait_for(machine.root / "waits")
    job.send_signal(signal.SIGTERM)
    trainer = int(job.stdout.readline().split()[1])
    time.sleep(0.2)
    assert job.poll() is None
    os.kill(trainer, signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert machine.calls("scontrol") == [["requeue", "7"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tpu_pod.sh", "expected create, setup"),
        ("tpu_pod.sh start pod --zone=z", "not 'start'"),
        ("tpu_pod.sh run pod -- train", "--zone"),
        ("tpu_pod.sh run pod --zone=z", "command after --"),
        ("tpu_pod.sh run pod --zone z -- train", "unknown flag --zone "),
        ("tpu_pod.sh run pod --zone=z train", "unexpected argument train"),
        ("tpu_pod.sh run pod --zone=z -- train --dry-run", "before --"),
        ("tpu_pod.sh run pod --zone=z --max-restarts=many -- train", "--max-restarts=many"),
        ("tpu_pod.sh create pod --zone=z", "--accelerator-type"),
        ("tpu_pod.sh create pod --zone=z --accelerator-type=v9-8", "--version"),
        ("tpu_pod.sh setup pod --zone=z --secrets=gone", "no such file"),
        ("tpu_pod.sh setup pod --zone=z --ship=gone", "not in the repository"),
        (
            "tpu_pod.sh run pod --zone=z --recreate --accelerator-type=v4-8 -- train --workdir=x",
            "--workdir=/... on a mount",
        ),
        ("tpu_pod.sh create pod --zone=z --accelerator-type=v4-8 --tpu-vm --num-slices=2", "slice"),
        ("tpu_pod.sh fetch pod --zone=z --workdir=x", "--to"),
        ("gke_xpk.sh run job --cluster=c --zone=z -- train", "--tpu-type"),
        ("gke_xpk.sh run job --cluster=c --zone=z --tpu-type=v4-8", "command after --"),
        ("gke_xpk.sh logs --cluster=c --zone=z", "NAME"),
        ("gke_xpk.sh run job --grace=long", "--grace=long"),
        ("slurm_gpu.sbatch", "command"),
        ("slurm_gpu.sbatch train", "no Slurm job"),
        ("worker.sh", "expected setup"),
    ],
)
def test_a_bad_argument_is_one_line_and_nothing_is_run(machine, line, message):
    done = machine.launch(*line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert machine.calls() == []


def test_slurm_wants_a_process_for_each_gpu_and_the_repository(machine):
    done = slurm(machine, "train", SLURM_GPUS_ON_NODE=8, SLURM_NTASKS_PER_NODE=1)
    assert (done.returncode, "8 GPUs need --ntasks-per-node=8" in done.stderr) == (2, True)
    done = slurm(machine, "train", SLURM_SUBMIT_DIR=machine.root)
    assert (done.returncode, "is not the repository" in done.stderr) == (2, True)
    assert machine.calls() == []


def test_a_line_break_is_refused_before_anything_is_run(machine):
    done = machine.launch(*RUN, "train", "--config.x=a\nb")
    assert done.returncode == 2
    assert "line break" in done.stderr
    assert machine.calls() == []


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke_xpk.sh", "slurm_gpu.sbatch"])
def test_help_is_the_header(machine, script):
    done = machine.launch(script, "--help")
    header = (LAUNCH / script).read_text().split("\n\n")[0].split("set -euo")[0].splitlines()[1:]
    assert done.returncode == 0
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in header]


def test_shellcheck_finds_nothing():
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is absent: install the extra test")
    scripts = sorted(str(path) for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
    assert len(scripts) >= 8
    # Sourced files are followed, from the directory of the file that sources them.
    found = subprocess.run(
        [checker, "--external-sources", "--source-path=SCRIPTDIR", *scripts],
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout) == (0, "")
