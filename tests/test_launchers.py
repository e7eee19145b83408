"""The launchers, as far as one machine can: elastic workers that die, a queue that takes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from kills import compare, free_port, run_with_kills
from kills import settings as killed_settings
from torch.distributed.launcher.api import LaunchConfig

from kw.config import ConfigError
from kw.training.distributed import Process, find_process

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**killed_settings(images), "epochs": 3}))
    return path


def workers_of(launcher: int) -> list[int]:
    """The training processes that torchrun has started."""
    return [
        pid
        for pid in children(launcher)
        if any(part.endswith(b"tools/train.py") for part in command_of(pid))
    ]


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for thread in threads for word in thread.read_text().split()]


def command_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_dead_worker_does_not_end_the_job(config: Path, images: Path, tmp_path: Path) -> None:
    """Two elastic workers, one killed: the job ends as one that nothing happened to."""
    settings = yaml.safe_load(config.read_text())
    work_dir = tmp_path / "job"
    rendezvous = {"NODES": "1:1", "RENDEZVOUS": f"127.0.0.1:{free_port()}", "PROCESSES": "2"}
    job = subprocess.Popen(
        ["scripts/train.sh", str(config), "--work-dir", str(work_dir)],
        cwd=ROOT,
        env={**ENVIRONMENT, **rendezvous, "RESTARTS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(work_dir.glob("epoch_*.pth")):
        assert job.poll() is None
        time.sleep(0.05)
    workers = workers_of(job.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors[-3000:]
    run_with_kills(settings, tmp_path / "whole", 0, 2, 0, 0.0)
    assert compare(tmp_path / "whole", work_dir) == []


def test_relative_paths_are_the_callers(tmp_path: Path) -> None:
    """Called from another folder: torchrun starts there, with the paths as they were given."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$PWD" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "train.sh", "mine/c.yaml", "--work-dir", "out"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHON": str(python), "PROCESSES": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{tmp_path} -m torch.distributed.run ")
    ending = f" {ROOT}/tools/train.py mine/c.yaml --launcher pytorch --resume --work-dir out\n"
    assert done.stdout.endswith(ending)


@pytest.mark.skipif(
    not hasattr(LaunchConfig, "shutdown_timeout"), reason="torchrun of earlier versions has neither"
)
@pytest.mark.parametrize("nohup", [False, True])
def test_what_torchrun_does_on_signals(nohup: bool, tmp_path: Path) -> None:
    """It leaves time to save, and under nohup its processes alone when the terminal is closed."""
    found = tmp_path / "python"
    code = (
        "import sys; from torch.distributed import run; args = run.parse_args(sys.argv[3:]); "
        "made, *_ = run.config_from_args(args); "
        "print(made.signals_to_handle, made.shutdown_timeout)"
    )
    found.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -c "{code}" "$@"\n')
    found.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "train.sh", "c.yaml"],
        env={**ENVIRONMENT, "PYTHON": str(found), "PROCESSES": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, (signal.SIG_DFL, signal.SIG_IGN)[nohup]),
        capture_output=True,
        text=True,
        check=True,
    )
    signals, seconds = done.stdout.split()
    handled = {"SIGTERM", "SIGINT", "SIGQUIT"} | ({"SIGHUP"} if not nohup else set())
    assert (set(signals.split(",")), seconds) == (handled, "600")


def test_a_process_for_each_gpu_that_may_be_used(tmp_path: Path) -> None:
    """Two that PyTorch sees, of eight that the driver lists."""
    scripts = {
        "python": 'if [[ $1 == -c ]]; then echo 2; else echo "$@"; fi',
        "nvidia-smi": "for i in 0 1 2 3 4 5 6 7; do echo GPU $i; done",
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PROCESSES"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    done = subprocess.run(
        [ROOT / "scripts" / "train.sh", "c.yaml"],
        env={**environment, **path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert " --nproc-per-node 2 " in done.stdout


def slurm(tmp_path: Path, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """The job's script with stand-ins for slurm's commands, which note how they were called."""
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    scripts = {
        "srun": "while [[ $1 == --* ]]; do shift; done\n"
        "export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0\n"
        'export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost\nexec "$@"\n',
        "scontrol": f'echo "$@" >> {tmp_path}/requeued\n',
    }
    for name, body in scripts.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (commands / name).chmod(0o755)
    return subprocess.Popen(
        [str(ROOT / "scripts" / "train.slurm"), *map(str, arguments)],
        env={
            **ENVIRONMENT,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(free_port()),
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({"SLURM_CPUS_PER_TASK": "8"}, "--wait=300 --cpus-per-task=8 py"), ({}, "--wait=300 py")],
)
def test_srun_is_told_how_many_processors_were_asked_for(
    asked: dict[str, str], expected: str, tmp_path: Path
) -> None:
    """It does not inherit them from sbatch: the loader's processes would share one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / "bin/srun").chmod(0o755)
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        [ROOT / "scripts" / "train.slurm", "c.yaml"],
        env={
            **environment,
            **asked,
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "PYTHON": "py",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{expected} tools/train.py c.yaml --launcher slurm --resume" in done.stdout


@pytest.mark.slow
def test_slurm_puts_a_job_back_that_ran_out_of_time(config: Path, tmp_path: Path) -> None:
    """And the second time it goes on where it stopped; an array's job takes its configuration."""
    settings = yaml.safe_load(config.read_text())
    settings["epochs"] = 100
    config.write_text(yaml.safe_dump(settings))
    work_dir = tmp_path / config.stem
    options = f"--work-dir {tmp_path}/{{name}} --cfg-options epochs="
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1"}
    job = slurm(tmp_path, "none.yaml", config, OPTIONS=f"{options}100", **array)
    while not (work_dir / "log.jsonl").exists():
        assert job.poll() is None, job.communicate()[0][-3000:]
        time.sleep(0.05)
    for pid in children(job.pid):
        os.kill(pid, signal.SIGTERM)  # as slurm does: to the processes, not to the script
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 77_1\n"
    assert "SIGTERM: saved" in output
    done = json.loads((work_dir / "log.jsonl").read_text().splitlines()[-1])["epoch"]
    job = slurm(tmp_path, "none.yaml", config, OPTIONS=f"{options}{done + 2}", **array)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output[-3000:]
    assert "resumed" in output


@pytest.mark.parametrize(("refuses", "status"), [(0, 0), (1, 75)])
def test_a_job_that_slurm_does_not_put_back_has_failed(
    refuses: int, status: int, tmp_path: Path
) -> None:
    """Where requeuing is disabled; else it, and what waits for it, would pass for trained."""
    for name, ends in (("srun", 75), ("scontrol", refuses)):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nexit {ends}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = [ROOT / "scripts" / "train.slurm", "c.yaml"]
    assert subprocess.run(command, env=environment, check=False).returncode == status


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        (["scripts/train.sh"], {}, "usage:"),
        (["scripts/train.sh", "c.yaml"], {"NODES": "2"}, "needs RENDEZVOUS"),
        (["scripts/train.sh", "c.yaml"], {"PYTHON": "none"}, "PYTHON=none: no such interpreter"),
        (["scripts/check_versions.sh", "tested"], {"PATH": "{tools}"}, "name an interpreter"),
        (["scripts/train.slurm"], {}, "sbatch --array"),
        (["scripts/train.slurm", "c.yaml"], {"SLURM_ARRAY_TASK_ID": "3"}, "array job 3, but 1"),
    ],
)
def test_usage(command: list[str], variables: dict[str, str], message: str, tmp_path: Path) -> None:
    for name in ("bash", "basename", "dirname"):  # where there is no Python
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    variables = {key: value.format(tools=tmp_path) for key, value in variables.items()}
    done = subprocess.run(
        command, cwd=ROOT, env={**ENVIRONMENT, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("here", "here"),
        ("127.0.0.1", "127.0.0.1"),
        ("gpu-3,gpu-a[1-2]", "gpu-3"),
        ("n[003-004,007],m", "n003"),
        ("r[2,4]n[1-8]-ib,m[1-2]", "r2n1-ib"),
    ],
)
def test_slurm_processes_meet_at_the_first_node_of_their_step(
    nodes: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where scontrol is missing, as in containers (open-mmlab/mmcv#700)."""
    monkeypatch.setenv("PATH", "")
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "")  # and as before afterwards
    for key in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    ports = set()
    for job, step in [(12000, 0), (12000, 1), (12001, 0), (19999, 0), (39998, 2)]:
        monkeypatch.delenv("MASTER_ADDR")
        monkeypatch.delenv("MASTER_PORT")
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        find_process("slurm")
        assert os.environ["MASTER_ADDR"] == first
        ports.add(int(os.environ["MASTER_PORT"]))
    # Connections get theirs from 32768 on: https://github.com/NVIDIA/enroot/issues/243
    assert len(ports) == 5
    assert min(ports) >= 20000
    assert max(ports) < 32768


@pytest.mark.parametrize(
    ("place", "seen", "device"),
    [(5, 8, 5), (5, 1, 0), (2, 2, 0)],  # all of the machine's; its own alone; those of a socket
)
def test_gpus_that_slurm_shows_a_process(
    place: int, seen: int, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --gpus-per-task 1 each process sees one GPU, its number 0 (mila-docs, 245)."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "")  # and as before afterwards
    given = {"SLURM_PROCID": "13", "SLURM_NTASKS": "20", "SLURM_LOCALID": str(place)}
    given |= {"SLURM_STEP_TASKS_PER_NODE": "4,8(x2)", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    given |= {"SLURM_STEP_NODELIST": "here", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    expected = torch.device("cuda", device)
    assert find_process("slurm") == Process(13, 20, expected)
    assert chosen == [expected]
    assert os.environ["LOCAL_WORLD_SIZE"] == "8"  # who share the machine's memory
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(place + 1))
    assert find_process("slurm").device == expected
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(place))
    with pytest.raises(ConfigError, match=rf"no GPU: it has {place}; lower --ntasks-per-node"):
        find_process("slurm")
    if seen == 1:
        with pytest.raises(ConfigError, match="process 5 of this machine has no GPU: it has 1;"):
            find_process("pytorch")
