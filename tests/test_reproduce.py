"""Tables reproduced through the tool: rows trained on digits, interrupted, failed, resumed."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import breadth
from processes import Forked

from kw.config import ConfigError, load_config
from kw.evaluation import paper_tables
from kw.models.build import build_network, check_network
from kw.study.launch import command_for, run_all
from kw.study.published import CONFIGS, Reproduction
from kw.study.runs import Run, RunError, find_state, locked, reason, record
from kw.study.scale import FULL, epochs_scaled, read_scale
from kw.study.settings import resolved_text

ROOT = Path(__file__).parents[1]
TABLES = paper_tables()
TINY = read_scale("tiny", CONFIGS / "scales")
SEEN: list[Any] = []  # networks of several tables
trained_tables = pytest.mark.parametrize(
    "name",
    breadth(
        [name for name, table in TABLES.items() if table.kind == "classification"],
        ["imagenet_deit_300ep", "imagenet_resnet18_100ep"],
    ),
)


def terminate_when(condition: Callable[[], object]) -> threading.Thread:
    """Send this process SIGTERM, as a scheduler would, once something is so."""

    def wait() -> None:
        while not condition():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def call(
    tool: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Run the tool in this process, the trainings in theirs; gives what was said."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            tool("tools/reproduce.py", *arguments)
        output = "".join(capsys.readouterr())
        assert end.value.code == status, output
        return output

    return run


@pytest.fixture
def full(tmp_path: Path) -> Callable[..., Reproduction]:
    return lambda table, **settings: Reproduction(TABLES[table], FULL, tmp_path, **settings)


@pytest.mark.long
@pytest.mark.parametrize("both", breadth([False, True], [False]))
def test_the_whole_path(
    both: bool, tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row fails and does not stop the next, which is interrupted; they are finished later."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(subprocess, "Popen", Forked)
    options = ["imagenet_300ep", "--scale", "tiny", "--work-dir", tmp_path]
    options += ["--rows", "resnet18", "kw_resnet18_1x"]
    settings = ["epochs=1", "total_batch_size=48", "batch_size=48", "checkpoint.updates=2"]
    settings += ["data.workers=0", "data.input_size=16", "model.timm_args.channels=[8,8,16,16]"]
    settings += ["model.timm_args.layers=[1,1,1,1]"]
    run = [*options, "--run", "--cfg-options", *settings]
    folder = tmp_path / "tiny/imagenet_300ep"
    broken = folder / "resnet18/epoch_1.pth"
    broken.parent.mkdir(parents=True)
    broken.touch()

    other = folder / "kw_resnet18_1x"
    seen: list[str] = []
    task = Reproduction(TABLES["imagenet_300ep"], TINY, tmp_path)
    (second,) = task.runs(task.table.row("kw_resnet18_1x"))

    def has_saved() -> object:
        seen[:] = [str(find_state(second))]
        return list(other.glob("epoch_*.pth"))

    thread = terminate_when(has_saved)
    output = call(*run, status=1)  # a row failed
    thread.join()
    assert seen == ["running at epoch 0 of 1"]
    assert "resnet18: failed (status 2): no checkpoint of" in output
    assert "kw_resnet18_1x: interrupted" in output
    output = call(*options)
    assert "resnet18               failed: no checkpoint of" in output
    assert "kw_resnet18_1x         interrupted at epoch 0 of 1;" in output

    broken.unlink()
    rows = [] if both else ["--rows", "kw_resnet18_1x"]
    output = call(*options, *rows, "--collect", *run[len(options) :])
    assert ("[1/2] resnet18: begins" in output) == both
    assert "kw_resnet18_1x: goes on" in output
    assert "resumed" in (folder / "kw_resnet18_1x/output.txt").read_text()
    results = json.loads((other / "results.json").read_text())
    table = (folder / "table.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| kw_resnet18_1x"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["11.93M", f"{results['params'] / 1e6:.2f}M"]
    assert cells[5:8] == ["74.77", f"{results['top1']:.2f}", f"{results['top1'] - 74.77:+.2f}"]
    assert cells[-1] == "done"
    for note in (
        "epochs 300 -> 1",
        "temperature_epochs 20 -> 0.0666667",
        "evaluated on 359 images",
    ):
        assert note in table

    assert "done already" in call(*run, "--rows", "kw_resnet18_1x")
    wrong = call(*run, "seed=3", "--rows", "kw_resnet18_1x", status=1)
    assert "was begun with other settings (seed 0 -> 3)" in wrong


@trained_tables
def test_every_row_can_be_scaled(name: str, tmp_path: Path) -> None:
    """Its network takes images of the scale's size, and its epochs keep their shares."""
    for name_of_class in (*"0123456", ".ipynb_checkpoints", "@eaDir"):  # which are none
        (tmp_path / "train" / name_of_class).mkdir(parents=True)
    task = Reproduction(TABLES[name], TINY, tmp_path)
    for row in TABLES[name].rows:
        for run in task.runs(row):
            run = task.resolve(run, tmp_path)
            config = load_config(run.config, run.options, check_model_name=False)
            shipped = load_config(CONFIGS / str(row.config), check_model_name=False)
            assert config.epochs == 6
            share = 6 / shipped.epochs
            assert config.temperature_epochs == pytest.approx(shipped.temperature_epochs * share)
            own, before = config.schedule, shipped.schedule
            assert own.warmup_epochs == pytest.approx(before.warmup_epochs * share)
            assert own.milestones == pytest.approx([m * share for m in before.milestones])
            assert (config.data.root, config.model.num_classes) == (str(tmp_path), 7)
            if config.model not in SEEN:
                SEEN.append(config.model)
                with torch.device("meta"):
                    network = build_network(config.model)
                check_network(network, config.model, 32)
                assert sum(p.numel() for p in network.parameters()) < 12e6


def test_rows_name_configurations_and_runs_that_exist(full: Callable[..., Reproduction]) -> None:
    for table in TABLES.values():
        for row in table.rows:
            assert row.config is None or (CONFIGS / row.config).is_file()
    shared = full("ablations_resnet18_1x_300ep")
    (run,) = shared.runs(shared.table.row("kw_resnet18_1x"))
    assert run.work_dir == shared.root / "imagenet_300ep/kw_resnet18_1x"
    runs = full("imagenet_300ep", seeds=2).runs(TABLES["imagenet_300ep"].row("resnet18"))
    assert [run.name for run in runs] == ["resnet18", "resnet18-seed1"]
    assert full("latency_batch128").runs(TABLES["latency_batch128"].row("resnet50")) == []


def text_of(task: Reproduction, model: str, seed: int = 0, data: Path | None = None) -> str:
    """The resolved configuration of a run."""
    run = task.resolve(task.runs(task.table.row(model))[seed], data)
    return resolved_text(run.config, run.options)


def test_settings_come_in_order(full: Callable[..., Reproduction], tmp_path: Path) -> None:
    """File, epochs in proportion, --cfg-options; a seed is added to the file's."""
    task = full("imagenet_300ep", seeds=2, options=("epochs=30", "schedule.warmup_epochs=3"))
    file = tmp_path / "run.yaml"
    file.write_text(text_of(task, "kw_resnet18_1x", 1))
    config = load_config(file, check_model_name=False)
    assert (config.epochs, config.schedule.warmup_epochs, config.temperature_epochs) == (30, 3, 2)
    assert (config.seed, config.total_batch_size) == (1, 4096)
    other = full("imagenet_300ep", seeds=2, options=("seed=5",))
    assert "\nseed: 6\n" in text_of(other, "resnet18", 1)
    assert Path(config.data.root).is_absolute()
    # An option may set a group; the data that a scale generates do not replace its root.
    (tmp_path / "mine/train/a").mkdir(parents=True)
    options = (f"data={{root: {tmp_path / 'mine'}}}",)
    grouped = Reproduction(TABLES["imagenet_300ep"], TINY, tmp_path, options=options)
    assert grouped.prepare_data() is None
    assert f"\n  root: {tmp_path / 'mine'}\n" in text_of(grouped, "resnet18")
    assert epochs_scaled({"epochs": 100, "schedule.milestones": [30, 60]}, 50) == {
        "schedule.milestones": [15, 30]
    }


def run_in(folder: Path) -> Run:
    return Run("resnet18", 0, folder, "resnet18", CONFIGS / "imagenet/resnet18/resnet18.yaml")


def write_run(run: Run, epochs: int, evaluated: int, more: Mapping[str, Any] | None = None) -> None:
    """A work directory as the engine leaves it after some epochs."""
    run.work_dir.mkdir(parents=True, exist_ok=True)
    (run.work_dir / "config.yaml").write_text(f"schedule:\n  warmup_epochs: 9\nepochs: {epochs}\n")
    lines = [{"mode": "val", "epoch": e + 1, "iter": e, "top1": 50.0} for e in range(evaluated)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.work_dir / "log.jsonl").write_text(text + '{"mode": "val", "epo')
    (run.work_dir / "results.json").write_text(json.dumps({"top1": 50.0, **(more or {})}))


@pytest.mark.parametrize(
    ("evaluated", "outcome", "last", "expected"),
    [
        (None, None, False, "not run"),
        (1, None, False, "interrupted at epoch 1 of 3"),
        (1, (75, ""), False, "interrupted at epoch 1 of 3"),
        (1, (2, "no images"), False, "failed at epoch 1 of 3: no images"),
        (None, (1, "no images"), False, "failed: no images"),
        (3, None, False, "interrupted at epoch 3 of 3"),  # killed before its last checkpoint
        (3, None, None, "interrupted at epoch 3 of 3"),  # which is that before the evaluation
        (3, (2, "bad images"), None, "failed at epoch 3 of 3: bad images"),
        (3, None, True, "done"),
        (3, (0, ""), False, "done"),  # its checkpoints were deleted
    ],
)
def test_states(
    evaluated: int | None,
    outcome: tuple[int, str] | None,
    last: bool | None,
    expected: str,
    tmp_path: Path,
) -> None:
    run = run_in(tmp_path)
    if evaluated is not None:
        write_run(run, 3, evaluated)
    if outcome is not None:
        record(run, *outcome)
    if last is not False:
        metrics = {"top1": 50.0} if last else None
        torch.save({"meta": {"metrics": metrics}}, run.work_dir / "epoch_3.pth")
    assert str(find_state(run)) == expected
    # What it needs matters until it has begun.
    needy = replace(run, needs=tmp_path / "none")
    waits = f"waits: for {needy.needs}"
    assert str(find_state(needy)) == (waits if evaluated is None else expected)


def test_a_lock_outlives_its_holder_with_its_child(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with locked(run) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
        assert find_state(run, ours=True).kind == "not run"
    assert find_state(run).kind == "running"
    with pytest.raises(RunError, match="another process is running it"), locked(run):
        pass
    child.kill()
    child.wait()
    assert find_state(run).kind == "not run"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(tmp_path)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("kw.study.runs.fcntl.flock", refuse)
    with locked(run):
        assert find_state(run).kind == "not run"


def test_the_state_of_runs_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another user, or on a disk that is mounted to be read."""
    run = run_in(tmp_path)
    write_run(run, 3, 3)
    with locked(run):
        pass
    record(run, 0)
    put = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return put(path, flags, *rest, **more)

    with locked(run):
        monkeypatch.setattr("kw.study.runs.os.open", refuse)
        assert find_state(run).kind == "running"
    assert find_state(run).kind == "done"


def test_the_last_error_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: of an earlier attempt\n")
    start = log.stat().st_size
    log.write_text(log.read_text() + "epoch 1\nValueError: this one\nE1 torch: summary\n\n")
    assert reason(log, start) == "ValueError: this one"
    summary = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n exitcode: 2\n"
    log.write_text(f"error: data.root nowhere\nRuntimeError: of another process\n{summary}")
    assert reason(log) == "data.root nowhere"
    log.write_text(f"RuntimeError: the one\n{summary}")
    assert reason(log) == "RuntimeError: the one"
    log.write_text("Killed\n")
    assert reason(log) == "Killed"
    assert reason(tmp_path / "none") == ""


def test_slurm(
    tmp_path: Path, images: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array of what is not done; while the queue has a job, it is not submitted again."""
    commands = tmp_path / "bin"
    commands.mkdir()
    scripts = {
        "sbatch": f'echo "$OPTIONS" "$@" >> {tmp_path}/submitted\nenv > {tmp_path}/environment\n'
        'echo "77;cluster"\n',
        "squeue": f"cd {tmp_path}; cat queue; [ ! -e fault ] || ! cat fault >&2\n",
    }
    for name, body in scripts.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")  # as in an interactive job
    monkeypatch.setenv("SLURM_CLUSTERS", "mine")  # a user's own, which squeue follows as well
    queue, fault = tmp_path / "queue", tmp_path / "fault"
    queue.write_text("77_0 RUNNING\n77_1 PENDING\n")
    options = ["imagenet_300ep", "--work-dir", tmp_path / "w"]
    options += ["--rows", "resnet18", "resnet50", "resnet50_dyconv4x"]
    slurm = ["--run", "--launcher", "slurm", "--cfg-options", f"data.root={images}"]
    folder = tmp_path / "w/imagenet_300ep"
    write_run(run_in(folder), 300, 300)
    record(run_in(folder), 0)
    # What is done was begun with the same settings.
    task = Reproduction(TABLES["imagenet_300ep"], FULL, tmp_path / "w")
    done = folder / "resnet18/config.yaml"
    done.write_text(text_of(task, "resnet18"))

    assert "job 77: resnet50, resnet50_dyconv4x" in call(*options, *slurm)
    words = (tmp_path / "submitted").read_text().split()
    expected = f"--work-dir {folder}/{{name}} --parsable --export ALL --array 0-1"
    assert words[:7] == expected.split()
    environment = (tmp_path / "environment").read_text()
    assert re.findall(r"^(SLURM_\w+)=", environment, re.MULTILINE) == ["SLURM_CLUSTERS"]
    configs = [Path(word) for word in words if word.endswith(".yaml")]
    assert [path.stem for path in configs] == ["resnet50", "resnet50_dyconv4x"]
    assert load_config(configs[0], check_model_name=False).data.root == str(images)
    listed = call(*options)
    assert "resnet50                  running;" in listed
    assert "resnet50_dyconv4x         queued;" in listed
    assert "nothing to submit" in call(*options, *slurm)
    # A job that cannot be asked about may be there: it is not submitted a second time.
    queue.write_text("")
    fault.write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    assert "resnet50: squeue does not say whether job 77_0 runs" in call(*options, *slurm, status=2)
    fault.write_text("slurm_load_jobs error: Invalid job id specified\n")
    (folder / "launch/slurm-77_0.out").write_text("error: no such node\n")
    assert "resnet50                  failed: no such node;" in call(*options)

    # Begun with another seed: that is no matter until there is something to go on from.
    begun = folder / "resnet50/config.yaml"
    begun.parent.mkdir()
    text = text_of(task, "resnet50")
    begun.write_text(text.replace("\nseed: 0\n", "\nseed: 9\n"))
    assert "job 77: resnet50, resnet50_dyconv4x" in call(*options, *slurm)
    (begun.parent / "epoch_1.pth").touch()
    said = call(*options, *slurm, status=1)
    assert f"resnet50: {begun.parent} was begun with other settings (seed 9 -> 0)" in said
    assert "job 77: resnet50_dyconv4x" in said


# sbatch at once and in sequence, and what the job's script calls.
QUEUE = {
    "sbatch": """while [[ $1 == --* ]]; do
    case $1 in --array) last=${2#0-} ;; --output) output=${2//%A/77} ;; esac
    [[ $1 == --parsable ]] && shift || shift 2
done
for index in $(seq 0 "$last"); do
    SLURM_JOB_ID=$$ SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$index \\
        "$@" > "${output//%a/$index}" 2>&1
done
echo 77
""",
    "squeue": "",
    "srun": """while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0
export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost
exec "$@"
""",
}


@pytest.mark.parametrize(
    ("launcher", "processes"),
    breadth([("torchrun", 1), ("torchrun", 2), ("slurm", 2)], [("torchrun", 1)]),
)
def test_launchers_train_to_the_end(
    launcher: str,
    processes: int,
    tmp_path: Path,
    images: Path,
    call: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, body in QUEUE.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    rows = ["resnet18"] if launcher == "torchrun" else ["resnet18", "resnet18_eca"]
    options = [
        "imagenet_resnet18_100ep",
        "--scale",
        "tiny",
        "--work-dir",
        tmp_path,
        "--rows",
        *rows,
    ]
    settings = [f"data.root={images}", "epochs=1", "data.workers=0"]
    settings += ["total_batch_size=8", "batch_size=4"]
    call(*options, "--run", "--launcher", launcher, "--gpus", processes, "--cfg-options", *settings)
    folder = tmp_path / "tiny/imagenet_resnet18_100ep"
    table = call(*options)
    for index, row in enumerate(rows):
        slurm = folder / f"launch/slurm-77_{index}.out"
        output = slurm if launcher == "slurm" else folder / row / "output.txt"
        assert re.search(rf"{row} +done", table), output.read_text()
        assert json.loads((folder / row / "results.json").read_text())["images"] > 0


def test_commands(
    full: Callable[..., Reproduction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = full("imagenet_300ep")
    (run,) = task.runs(task.table.row("resnet50"))
    line = shlex.join(command_for([run], "torchrun", 4))
    assert line.startswith(f"env PYTHON={sys.executable} PROCESSES=4 {ROOT}/scripts/train.sh ")
    assert line.endswith(f"resnet50.yaml --work-dir {tmp_path}/imagenet_300ep/resnet50")
    assert shlex.join(command_for([run], "none", None)).endswith(
        f"{tmp_path}/imagenet_300ep/resnet50 --resume"
    )
    spaced = Reproduction(task.table, FULL, tmp_path / "a b")
    with pytest.raises(RunError, match="no path with spaces"):
        command_for(spaced.runs(task.table.row("resnet50")), "slurm", None)
    monkeypatch.setattr("kw.config.imports.GIVEN", ["mine"])
    for launcher in ("none", "torchrun", "slurm"):
        assert "--import mine --work-dir " in shlex.join(command_for([run], launcher))


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_an_installed_package_has_no_scripts(
    launcher: str,
    full: Callable[..., Reproduction],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = full("imagenet_300ep")
    runs = task.runs(task.table.row("resnet50"))
    monkeypatch.setattr("kw.study.launch.ROOT", tmp_path)
    with pytest.raises(RunError, match=r"no such file: .*scripts/train\..*--launcher none"):
        run_all(runs, launcher) if launcher == "torchrun" else command_for(runs, launcher)


def test_a_detector_starts_from_its_classifier(full: Callable[..., Reproduction]) -> None:
    pytest.importorskip("mmdet", exc_type=ImportError)
    from kw.detection import load_detector_config

    task = full("coco_mask_rcnn_1x")
    (run,) = task.runs(task.table.row("mask_rcnn_resnet50"))
    weights = task.root / "imagenet_300ep/resnet50/best.pth"
    assert run.needs == weights
    assert str(find_state(run)) == f"waits: for {weights}"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert str(find_state(run)) == "not run"
    run = task.resolve(run)
    config = load_detector_config(run.config, run.options)
    assert config.model["backbone"]["weights"] == str(weights)
    assert config.model["backbone"]["network"]["name"] == "resnet50"

    tiny = Reproduction(task.table, TINY, task.root)
    (run,) = tiny.runs(task.table.row("mask_rcnn_resnet50"))
    assert run.needs is None
    run = tiny.resolve(run, task.root)
    config = load_detector_config(run.config, run.options)
    assert config.model["backbone"]["weights"] is None
    assert (config.run.epochs, config.run.schedule.milestones) == (
        1,
        pytest.approx([8 / 12, 11 / 12]),
    )
    assert len(config.train_pipeline) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["imagenet_300"], "did you mean 'imagenet_300ep'?"),
        (["imagenet_300ep", "--rows", "vgg*"], "--rows vgg*: table imagenet_300ep has no such row"),
        (["imagenet_300ep", "--scale", "tini"], "did you mean 'tiny'?"),
        (["imagenet_300ep", "--gpus", "2"], "--gpus has an effect with --run"),
        (["imagenet_300ep", "--run", "--gpus", "2"], "--gpus has an effect with --launcher"),
        (["imagenet_300ep", "--out", "x"], "--out has an effect with --collect only"),
        (["imagenet_300ep", "--seeds", "0"], "expected an integer >= 1"),
        (["imagenet_300ep", "--run", "--cfg-options", "epoch=3"], "did you mean epochs?"),
        (["imagenet_300ep", "--run", "--launcher", "slurm"], "there is no sbatch here"),
        (["latency_batch128", "--run"], "kw benchmark networks measures latency"),
        (["imagenet_resnet18_100ep", "--rows", "*_dcd", "--run"], "nothing to train"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    tool: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        tool("tools/reproduce.py", *arguments, "--work-dir", tmp_path)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert expected in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rules: []", "expected title and rules"),
        ("title: t\nrules: [{if: 1}]", "rule 1: expected a mapping with data, set, when"),
        ("title: t\nrules: [{set: 3}]", "rule 1: expected mappings"),
        ("title: t\nrules: !!python/object/apply:os.system [x]", "tags that construct objects"),
    ],
)
def test_wrong_scales_are_named(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as error:
        read_scale(str(path), tmp_path)
    assert str(path) in str(error.value)
