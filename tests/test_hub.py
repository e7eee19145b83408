"""kw push, kw pull and hf-hub: names, by huggingface_hub's own client against a local stand-in."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import numpy as np
import pytest
import timm
import torch
from breadth import breadth
from deployment import CLASSES, SETTINGS, write_checkpoint
from hub_server import Hub
from huggingface_hub import ModelCard, constants, snapshot_download
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from timm.data import create_transform, resolve_model_data_config
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kw
from kw.config import config_from_mapping
from kw.deploy import read_source
from kw.deploy.publish import Plan, publish, write_folder
from kw.deploy.source import without_places
from kw.deploy.weights import write_weights
from kw.errors import UserError
from kw.hub import is_hub_name, split_name
from kw.models.build import start_network
from kw.models.paper_models import PAPER_MODELS
from kw.training.checkpoint import load_checkpoint

FILES = ["README.md", "config.json", "config.yaml", "model.safetensors", "results.json"]
Tool = Callable[..., None]
Files = dict[str, bytes]


def settings_with(**groups: Any) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    for name, values in groups.items():
        is_group = isinstance(values, dict)
        settings[name] = {**settings.get(name, {}), **values} if is_group else values
    return settings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at temperature 0.5, with an average, results and places of the machine."""
    folder = tmp_path_factory.mktemp("home") / "tiny"
    folder.mkdir()
    write_checkpoint(folder / "best.pth", settings_with(data={"root": "/home/me/secret/birds"}))
    shutil.copy(folder / "best.pth", folder / "last.pth")
    (folder / "config.yaml").write_text(load_checkpoint(folder / "best.pth")["meta"]["config"])
    results = {"top1": 20.0, "weights": "ema", "checkpoint": "/home/me/runs/tiny/best.pth"}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of the run's repository."""
    folder = tmp_path_factory.mktemp("published")
    write_folder(run, folder, Plan("me/tiny"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def noise(classifier: Any, batch: int = 2) -> Tensor:
    inputs = classifier.description.input
    return torch.randn(batch, inputs.channels, *inputs.sides)


def test_push_load_and_pull(
    hub: Hub, run: Path, tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("kw push", run, "me/tiny", "--private", "--license", "mit", "--message", "First")
    said = capsys.readouterr()
    assert f"published {hub.url}/me/tiny/commit/" in said.out
    assert "best.pth was written at temperature 0.5" in said.err
    repository = hub.repositories["me/tiny"]
    assert repository.private
    assert repository.messages == ["initial commit", "First"]
    files = repository.files("main")
    assert sorted(files) == FILES
    for name, data in files.items():
        assert b"/home/me" not in data, name
    assert json.loads(files["results.json"])["checkpoint"] == "best.pth"

    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "image-classification"
    assert 'kw.load("hf-hub:me/tiny")' in card.text
    assert "temperature 0.5, before annealing had ended" in card.text
    assert "| data | birds, 4 classes |" in card.text
    assert "| top-1, %, in the run's evaluation | 20 |" in card.text
    assert "multiply-adds of assembling kernels" in card.text

    ours, theirs = kw.load(run), kw.load("hf-hub:me/tiny")
    images = noise(ours)
    assert torch.equal(theirs(images), ours(images))
    assert theirs.classes == CLASSES
    tool("kw pull", "hf-hub:me/tiny", tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(files)
    assert torch.equal(kw.load(tmp_path / "copy")(images), ours(images))


def test_what_is_replaced_is_said_and_nothing_deleted(
    hub: Hub, run: Path, published: Files, tmp_path: Path
) -> None:
    card = published["README.md"].replace(b"---", b"---\nlicense: wrong", 1)
    with pytest.raises(UserError, match=r"me/tiny: Invalid metadata in README.md. - no such lic"):
        publish_files({**published, "README.md": card}, tmp_path / "wrong", Plan("me/tiny"))
    repository = hub.put("me/tiny", {"README.md": b"mine", "notes.txt": b"kept"})
    before = repository.branches["main"]
    said = publish_files(published, tmp_path / "one", Plan("me/tiny"))
    assert f"replaced README.md; as they were: me/tiny@{before}" in said
    assert "left as they are: notes.txt" in said
    assert repository.files("main")["notes.txt"] == b"kept"
    assert repository.files("main")["README.md"] == published["README.md"]
    # A branch of its own, over an earlier folder: main stays.
    main, own = repository.branches["main"], Plan("me/tiny@own", "model", "fp16", "mit")
    notes = write_folder(run / "last.pth", tmp_path / "one", own)
    assert len(notes) == 2  # of the temperature, and of results.json, which is left out
    # Of this checkpoint, but of its average.
    other = write_folder(run, tmp_path / "model", Plan("me/tiny", "model", licence="mit"))
    assert "results.json of the run is of its 'ema' weights, not 'model': left out" in other
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == FILES[:4]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == FILES[:4]
    publish(tmp_path / "one", own)
    assert repository.branches["main"] == main
    half, full = kw.load("hf-hub:me/tiny@own"), kw.load(run, weights="model")
    state = full.network.state_dict()
    for key, value in half.network.state_dict().items():
        expected = state[key].half().float() if value.is_floating_point() else state[key]
        assert torch.equal(value, expected), key
    files = repository.files("own")
    assert len(files["model.safetensors"]) < 0.7 * len(published["model.safetensors"])
    content = json.loads(files["config.json"])["kernelwarehouse"]
    assert (content["weights"], content["precision"]) == ("model", "fp16")
    images = noise(full)
    assert torch.equal(kw.load(f"hf-hub:me/tiny@{main}")(images), kw.load(run)(images))
    with pytest.raises(UserError, match=r"has other files \(best.pth\)"):
        write_folder(run, run, own)
    with pytest.raises(UserError, match="me/tiny is there and public"):
        publish(tmp_path / "one", Plan("me/tiny"), private=True)


def test_other_libraries_take_the_header(published: Files, tmp_path: Path) -> None:
    """transformers and accelerate refuse a header that does not say whose tensors these are."""
    (tmp_path / "model.safetensors").write_bytes(published["model.safetensors"])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_who_may_see_a_new_repository_is_up_to_its_owner(
    hub: Hub, published: Files, tmp_path: Path
) -> None:
    """An organisation's may be private without being asked."""
    publish_files(published, tmp_path / "one", Plan("me/open"))
    hub.private_by_default = True
    publish_files(published, tmp_path / "two", Plan("firm/tiny"))
    assert (hub.repositories["me/open"].private, hub.repositories["firm/tiny"].private) == (0, 1)


def publish_files(files: Files, folder: Path, plan: Plan) -> str:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return publish(folder, plan)


QUARTER = PAPER_MODELS["kw_resnet18_1d4x"]
# Settings of the run, and the architecture that config.json has.
NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "of the papers": (
        {
            "model": {
                "timm_args": {"channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1]},
                "kernel_warehouse": {"plan": "resnet18", "start": "paper", **QUARTER.settings},
            }
        },
        "kw_resnet18_1d4x",
    ),
    "static": ({"model": {"kernel_warehouse": None}}, "resnet18"),
    "grey, oblong, several classes": (
        {
            "data": {"channels": 1, "mean": [0.4], "std": [0.3], "input_size": [40, 56]},
            "metrics": {"multilabel": {}},
            "loss": {"name": "bce"},
        },
        "kw_resnet18_1x",
    ),
    "a ratio of its own": (
        {"model": {"kernel_warehouse": {"plan": "resnet18", "cell_num_ratio": 3}}},
        "kernelwarehouse",
    ),
    "a stem, a peer": (
        {
            "model": {
                "kernel_warehouse": None,
                "peer": {"method": "dyconv", "kernels": 2},
                "stem": {"stride": 2},
            },
            "custom_imports": ["hub_server"],
        },
        "kernelwarehouse",
    ),
}

# timm's own network, one of ours, and one that has no name.
QUICK = ["static", "grey, oblong, several classes", "a stem, a peer"]


@pytest.mark.parametrize("kind", breadth(list(NETWORKS), QUICK))
def test_timm_loads_every_classifier(hub: Hub, kind: str, tmp_path: Path) -> None:
    changes, architecture = NETWORKS[kind]
    settings = settings_with(**changes)
    config = config_from_mapping(settings)
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(run / "best.pth", settings)
    notes = write_folder(run, tmp_path / "out", Plan("me/net"))
    needs = "import hub_server first, which its configuration names"
    assert (needs in notes) == ("custom_imports" in changes)
    assert (needs in (tmp_path / "out/README.md").read_text()) == (needs in notes)
    content = json.loads((tmp_path / "out/config.json").read_text())
    assert content["architecture"] == architecture
    assert content["label_names"] == CLASSES
    publish(tmp_path / "out", Plan("me/net"))

    ours, theirs = kw.load(run), timm.create_model("hf-hub:me/net", pretrained=True).eval()
    images = noise(ours)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-6)
    assert torch.equal(kw.load("hf-hub:me/net")(images), ours(images))
    local = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(local(images), ours(images), rtol=1e-5, atol=1e-6)
    # The rest of it under another classifier, and as features.
    other = timm.create_model("hf-hub:me/net", pretrained=True, num_classes=7).state_dict()
    state = theirs.state_dict()
    assert other["fc.weight"].shape[0] == 7
    assert all(torch.equal(other[k], state[k]) for k in state if not k.startswith("fc."))
    features = timm.create_model("hf-hub:me/net", pretrained=True, features_only=True).eval()
    full = theirs.forward_features(images)
    torch.testing.assert_close(features(images)[-1], full, rtol=1e-5, atol=1e-6)
    # timm prepares a picture as evaluation here does.
    prepare = create_transform(**resolve_model_data_config(theirs), is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 93, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert("L" if config.data.channels == 1 else "RGB")
    expected = ours.normalise(ours.read(picture)[None])[0]
    assert prepare(picture).shape == expected.shape
    assert (prepare(picture) - expected).abs().max() < 0.02


def test_a_run_is_not_written_over_itself(published: Files, tmp_path: Path) -> None:
    """A folder of kw pull is a run, and was written here before."""
    run, empty = tmp_path / "run", tmp_path / "empty"
    run.mkdir(), empty.mkdir()
    for name, data in published.items():
        (run / name).write_bytes(data)
    with pytest.raises(UserError, match="has the run itself: expected another folder"):
        write_folder(run, empty / "../run", Plan("me/tiny"))
    with pytest.raises(UserError, match=r"no \*.pth there"):
        write_folder(empty, run, Plan("me/tiny"))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == published


@register_model
def bare_network(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    num_classes: int = 1,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A user's, with none of the attributes of timm's networks, and few of their arguments."""
    convolutions = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(
        *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )


def test_a_users_network_is_published(tmp_path: Path) -> None:
    dynamic = {"plan": {"rules": [{"match": "[12]", "warehouse": "all"}]}, "start": "paper"}
    model = {"name": "bare_network", "timm_args": {}, "kernel_warehouse": dynamic}
    write_checkpoint(tmp_path / "best.pth", settings_with(model=model))
    write_folder(tmp_path / "best.pth", tmp_path / "out", Plan("me/bare"))
    content = json.loads((tmp_path / "out/config.json").read_text())
    assert content["architecture"] == "kernelwarehouse"
    ours = kw.load(tmp_path / "best.pth")
    images = noise(ours)
    local = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for theirs in (kw.load(tmp_path / "out"), local):
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-6)


def test_without_network(
    hub: Hub, published: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.put("me/tiny", published)
    images = noise(online := kw.load("hf-hub:me/tiny"))
    asked = len(hub.asked)

    def set_offline(value: bool) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
        # Earlier versions read it when a session begins.
        getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()

    set_offline(True)
    assert torch.equal(kw.load("hf-hub:me/tiny")(images), online(images))
    with pytest.raises(UserError, match=r"me/other: the hub cannot be reached.*HF_HUB_OFFLINE"):
        kw.load("hf-hub:me/other")
    assert len(hub.asked) == asked
    set_offline(False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    assert torch.equal(kw.load("hf-hub:me/tiny")(images), online(images))
    with pytest.raises(UserError, match=r"cannot be reached.*check the network"):
        kw.load("hf-hub:me/other")
    with pytest.raises(UserError, match=r"cannot be reached.*check the network"):
        publish_files(published, tmp_path / "files", Plan("me/tiny"))


def test_other_repositories_are_answered(
    hub: Hub, published: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.put("me/tiny", published)
    hub.put("me/pickles", {"pytorch_model.bin": b"any"})
    weights = save(timm.create_model("test_resnet").state_dict())
    hub.put("me/timms", {"model.safetensors": weights, "config.json": b'{"architecture": "x"}'})
    hub.put("me/mixed", {**published, "model.safetensors": weights})
    hub.put("me/broken", {**published, "config.json": b"[1"})
    for name, words in {
        "me/none": "no such repository.*hf auth login",
        "me/tiny@none": "no such revision",
        "tiny": "expected user/model",
        "../../etc": "expected user/model",
        "me/pickles": "has no model.safetensors; other formats, pickles among them",
        "me/timms": "holds no description of a classifier",
        "me/mixed": "not the file that config.json was written for",
        "me/broken": "its config.json is damaged",
    }.items():
        with pytest.raises(UserError, match=words):
            kw.load(f"hf-hub:{name}")
    hub.repositories["me/tiny"].private = True
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(UserError, match=r"no such repository for this user.*if it is private"):
        kw.load("hf-hub:me/tiny@main")
    with pytest.raises(UserError, match=r"the hub refuses.*token that may write"):
        publish_files(published, tmp_path / "files", Plan("me/new"))
    # A network of timm's cannot be built by a name that is none.
    model = {**SETTINGS["model"], "name": "hf-hub:me/tiny"}
    with pytest.raises(UserError, match=r"model\.name.*expected a name of timm.list_models"):
        timm.create_model("kernelwarehouse", model=model)


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_no_program_and_no_pickle_of_a_repository_runs(
    hub: Hub, published: Files, images: Path, tool: Tool, tmp_path: Path, capsys: Any
) -> None:
    """Not even where another program has brought them into the cache."""
    sprung = tmp_path / "sprung"
    program = f"open({str(sprung)!r}, 'w')\n".encode()
    pickled = pickle.dumps(Trap(sprung))
    files = {"config.py": program, "best.pth": pickled, "pytorch_model.bin": pickled}
    hub.put("me/trap", {**published, **files})
    assert (Path(snapshot_download("me/trap")) / "config.py").is_file()
    picture = next((images / "val").rglob("*.png"))
    kw.load("hf-hub:me/trap")
    timm.create_model("hf-hub:me/trap", pretrained=True)
    tool("kw predict", "hf-hub:me/trap", picture)
    tool("kw test", "hf-hub:me/trap", "--cfg-options", f"data.root={images}", "data.workers=0")
    tool("kw pull", "me/trap", tmp_path / "copy")
    tool("kw predict", tmp_path / "copy", picture)
    assert not sprung.exists()
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == FILES
    # A detector is nothing without its program.
    content = json.loads(published["config.json"])
    content["kernelwarehouse"]["task"] = "detection"
    hub.put("me/detector", {**published, **files, "config.json": json.dumps(content).encode()})
    with pytest.raises(UserError, match=r"a detector.*kw pull me/detector FOLDER --allow-code"):
        kw.load("hf-hub:me/detector")
    tool("kw pull", "me/detector", tmp_path / "detector")
    assert "is a program: --allow-code brings it" in capsys.readouterr().out
    assert not (tmp_path / "detector/config.py").exists()
    tool("kw pull", "me/detector", tmp_path / "allowed", "--allow-code")
    assert (tmp_path / "allowed/config.py").read_bytes() == program
    assert not (tmp_path / "allowed/best.pth").exists()
    assert not sprung.exists()


def test_a_name_stands_for_a_run(
    hub: Hub, run: Path, published: Files, images: Path, tool: Tool, tmp_path: Path
) -> None:
    """kw test, predict and export give what they give for the run; training starts from it."""
    hub.put("me/tiny", published)
    where = f"data.root={images}", "data.workers=0"
    tool("kw test", "hf-hub:me/tiny", "--cfg-options", *where, "--json", tmp_path / "hub.json")
    tool("kw predict", "hf-hub:me/tiny", images / "val", "--json", tmp_path / "found.json")
    tool("kw export", "hf-hub:me/tiny", tmp_path / "again.safetensors")
    found, ready = json.loads((tmp_path / "hub.json").read_text()), kw.load(run)
    files = sorted((images / "val").rglob("*.png"))
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    logits = ready.logits(torch.stack([ready.read(file) for file in files]))
    assert found["images"] == len(files)
    assert found["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    predicted = json.loads((tmp_path / "found.json").read_text())["images"]
    best = [row[0].name for row in ready.predict(files)]
    assert [image["predictions"][0]["name"] for image in predicted] == best
    (exported,) = tmp_path.glob("again-*.safetensors")
    card = exported.with_name(exported.name + ".md").read_text()
    assert "| weights | moving average |" in card
    assert "| top-1, %, in the run's evaluation | 20 |" in card
    with pytest.raises(UserError, match=r"holds the 'ema' weights only; expected auto or ema"):
        read_source(exported, weights="model")
    given = noise(ready)
    assert torch.equal(kw.load(exported)(given), ready(given))
    model = settings_with(model={"weights": "hf-hub:me/tiny", "num_classes": 9})
    start = start_network(config_from_mapping(model).model).state_dict()
    state = ready.network.state_dict()
    assert start["fc.weight"].shape[0] == 9
    assert all(torch.equal(start[k], state[k]) for k in state if not k.startswith("fc."))


def test_places_of_first_weights_are_not_looked_for(run: Path, tmp_path: Path) -> None:
    source = read_source(run)
    about, model = source.description, source.description.config.model
    wrong = {"checkpoint_path": "/none", "pretrained": True}
    model = replace(model, weights="/none.pth", timm_args={**model.timm_args, **wrong})
    about = replace(about, config=replace(about.config, model=model))
    file = write_weights(source.network.state_dict(), about, tmp_path / "x.safetensors")
    images = noise(kw.load(run))
    assert torch.equal(kw.load(file)(images), kw.load(run)(images))
    content = {**SETTINGS["model"], "timm_args": {**SETTINGS["model"]["timm_args"], **wrong}}
    network = timm.create_model("kernelwarehouse", model=content)
    assert network.state_dict().keys() == source.network.state_dict().keys()


def test_paths_in_arguments_are_left_out() -> None:
    """Of parts that take any arguments; what leads out of a folder alone."""
    args = {"table": "/home/me/{split}.csv", "file": "image"}
    data = {"root": "birds", "dataset": "csv", "dataset_args": args}
    config = config_from_mapping(settings_with(data=data))
    hooks = {"mine": {"folders": ["../me/pictures", "~/me"], "every": 3}}
    without = without_places(replace(config, hooks=hooks))
    assert without.data.dataset_args == {"table": "{split}.csv", "file": "image"}
    assert without.hooks == {"mine": {"folders": ["pictures", "me"], "every": 3}}


def test_names() -> None:
    assert split_name("hf-hub:me/a.b-c_d@v1/x") == ("me/a.b-c_d", "v1/x")
    assert split_name("me/a") == ("me/a", None)
    assert is_hub_name("hf-hub:me/a")
    assert not is_hub_name("me/a")
