"""What pip installs: built, put into an environment of its own, and used from another folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kw.config.names import config_file, config_names
from kw.study.files import load_study

ROOT = Path(__file__).parents[1]
MODEL = "demo_kw_resnet18_1x"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", reason="the dev extra is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    # Of what git knows: a checkout has more, which a release has not.
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    source = folder / "source"
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("deleted.py", "configs/demo/deleted.yaml"):  # as an earlier build has left them
        (source / "build/lib/kw" / name).parent.mkdir(parents=True, exist_ok=True)
        (source / "build/lib/kw" / name).touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs the installed command in a folder beside nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install.append("--ignore-installed")  # or pip removes the checkout's from this environment
    python = folder / "venv/bin/python"
    subprocess.run([*install, "--prefix", str(folder / "venv"), str(wheel)], check=True)
    script = folder / "venv/bin/kw"
    lines = script.read_text().splitlines(keepends=True)
    script.write_text("".join([f"#!{python}\n", *lines[1:]]))
    # The packages that it needs, without what an editable installation has added to them.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def start(*words: object, program: Path = script) -> str:
        done = subprocess.run(
            [str(program), *map(str, words)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    start.folder = folder  # type: ignore[attr-defined]
    start.python = python  # type: ignore[attr-defined]
    return start


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "kw = kw.cli:main" in archive.read(entry).decode()
    for file in ("configs/imagenet/resnet18/kw_resnet18_1x.yaml", "evaluation/paper_tables.yaml",
                 "configs/coco/mask_rcnn_kw_resnet50_1x.py", "py.typed"):  # fmt: skip
        assert f"kw/{file}" in names
    assert any(name.startswith("kw/warehouse/ops/cpp/") for name in names)
    assert not [name for name in names if "deleted" in name]
    assert not any(name.startswith(("tests/", "tools/")) for name in names)


@pytest.mark.long
def test_train_test_predict(run: Any, images: Path) -> None:
    listed = run("config", "--list", "*demo*resnet18*")
    assert str(run.folder / "venv") in listed  # not the checkout's
    settings = [f"data.root={images}", "model.num_classes=4", "data.workers=0", "epochs=1"]
    settings += ["temperature_epochs=0.5", "schedule.warmup_epochs=0"]
    settings.append("model.timm_args={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}")
    # One process for three commands: most of a command's time goes into its imports.
    train = ["train", MODEL, "--set", *settings, "total_batch_size=16", "batch_size=16"]
    test, predict = ["test", f"work_dirs/{MODEL}"], ["predict", f"work_dirs/{MODEL}"]
    predict.append(str(images / "val/cat/0.png"))
    each = "\nprint('then')\n".join(f"main({words})" for words in (train, test, predict))
    code = f"from kw.cli import main\n{each}\n"
    _, tested, found = run("-c", code, program=run.python).split("then\n")
    results = json.loads((run.folder / "work_dirs" / MODEL / "results.json").read_text())
    assert results["images"] == 19
    assert f"top1         {results['top1']:.4f}" in tested
    assert any(name in found for name in ("bird", "cat", "dog", "fish"))


@pytest.mark.slow  # what kw.train does is tested without a wheel, and the wheel by commands
def test_python(run: Any, images: Path) -> None:
    code = (
        "import kw\n"
        "keys = {'model': {'num_classes': 4}, 'epochs': 1, 'temperature_epochs': 0.5}\n"
        f"keys['data'] = {{'root': {str(images)!r}, 'workers': 0}}\n"
        "keys |= {'total_batch_size': 16, 'batch_size': 16, 'schedule.warmup_epochs': 0}\n"
        f"figures = kw.train({MODEL!r}, 'by_python', **keys)\n"
        "assert figures['images'] == 19, figures\n"
        "try:\n"
        f"    kw.train({MODEL!r}, 'by_python', epoch=3)\n"
        "except kw.config.ConfigError as error:\n"
        "    assert 'did you mean epochs' in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    done = subprocess.run(
        [str(run.python), "-c", code], cwd=run.folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_help_imports_nothing_heavy() -> None:
    """It comes at once; tested by what is imported, not by time."""
    heavy = "{'torch', 'numpy', 'timm', 'PIL', 'matplotlib', 'mmengine', 'yaml'}"
    code = f"import sys, kw.cli\nkw.cli.main(['--help'])\nassert not {heavy} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    code = f"import sys, kw\nassert not {heavy} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_settings_as_options_are_answered(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["--epochs", "3"], "--set epochs=3"),
        (["--lr=0.1"], "--set optimizer.lr=0.1"),
        (["--batch-size", "8"], "--set batch_size=8"),
    ):
        with pytest.raises(SystemExit) as end:
            tool("kw train", "configs/demo/resnet18.yaml", *words)
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
    for words, expected in (
        (["trian"], "did you mean train?"),
        (["study", "runs"], "did you mean run?"),
        (["train", "kw_resnet18"], "did you mean"),
    ):
        with pytest.raises(SystemExit) as end:
            tool(f"kw {words[0]}", *words[1:])
        assert end.value.code == 2
        assert expected in capsys.readouterr().err


def test_every_configuration_has_a_name() -> None:
    """And no two have the same; studies and bases are none."""
    names = config_names()
    files = [
        *ROOT.glob("configs/imagenet/*/*.yaml"),
        *ROOT.glob("configs/coco/*.py"),
        *ROOT.glob("configs/finetune/*.yaml"),
    ]
    assert {file for file in files if "_base_" not in file.parts} <= set(names.values())
    assert len(set(names.values())) == len(names)
    assert config_file("kw_resnet18_1x") == ROOT / "configs/imagenet/resnet18/kw_resnet18_1x.yaml"
    assert config_file("finetune_kw_resnet18_1x").parent.name == "finetune"
    assert not {"demo_demo", "demo_demo_seeds"} & set(names)


def test_messages_name_what_an_installed_package_has() -> None:
    for path in ROOT.glob("kw/**/*.py"):
        if path.name not in ("page.py", "summary.py"):  # marks of files that were written before
            found = re.search(r"\btools/\w+\.py|pip install -e", path.read_text("utf-8"))
            assert found is None, f"{path}: {found}"


def test_paths_of_shipped_files_hold_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = "configs/demo/resnet18.yaml"
    assert config_file(shipped) == ROOT / shipped
    assert (
        load_study("configs/demo/demo.yaml").runs[1].config
        == ROOT / "configs/demo/kw_two_inks.yaml"
    )
    Path("mine.yaml").write_text(f"rows: [{shipped}]")
    assert load_study("mine.yaml").runs[0].config == ROOT / shipped
    Path("configs/demo").mkdir(parents=True)
    Path(shipped).touch()
    assert config_file(shipped) == Path(shipped)  # one's own comes first


def test_a_name_is_taken_wherever_a_configuration_is(
    tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for config in ("demo_resnet18", "configs/demo/resnet18.yaml"):
        tool("kw config", config)
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != ""
    with pytest.raises(SystemExit):
        tool("kw inspect backends", "demo_resnet19")
    assert "did you mean demo_resnet18" in capsys.readouterr().err
