"""The Lightning callback, with the real package: ``make test-integrations``."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")
import pytorch_lightning  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy  # noqa: E402

import kw  # noqa: E402
from kw.integrations.core import Recipe, plans_of  # noqa: E402
from kw.integrations.lightning import ConvertedModule, KernelWarehouse  # noqa: E402

BATCHES, BATCH = 5, 4
PLAN = {"rules": [{"match": "[24]", "warehouse": "all"}], "reduction": 0.5}


def network():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 16), (16, 16))]
    first, second, third = convolutions
    layers = (first, nn.BatchNorm2d(8), second, nn.ReLU(), third)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def data(batches=BATCHES):
    """The same batch again and again: Lightning does not skip batches when it resumes."""
    torch.manual_seed(1)
    images, labels = torch.rand(BATCH, 3, 12, 12), torch.arange(BATCH)
    pairs = list(zip(images, labels, strict=True)) * batches
    return torch.utils.data.DataLoader(pairs, BATCH)


class Steps:
    """What a module of either package does here."""

    def __init__(self, parts=("model",)):
        super().__init__()
        self.save_hyperparameters()
        for part in parts:
            setattr(self, part, network())
        self.seen, self.losses = [], []

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, index):
        self.seen.append(kw.get_temperature(self))
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss

    def test_step(self, batch, index):
        raise AssertionError

    def validation_step(self, batch, index):
        self.validated = kw.get_temperature(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class Plain(Steps, lightning.LightningModule):
    pass


class Net(ConvertedModule, Steps, lightning.LightningModule):
    pass


class Iterable(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data().dataset)


def trainer(tmp_path, *callbacks, host=lightning, **settings):
    quiet = ("enable_progress_bar", "enable_model_summary", "logger")
    common = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "devices": 1, "max_epochs": 3}
    common["default_root_dir"] = tmp_path
    return host.Trainer(callbacks=list(callbacks), **(common | settings))


def formula(anneal, epochs=3, every=1):
    steps = [(e, b) for e in range(epochs) for b in range(BATCHES)]
    return [max(0, 1 - (e + b // every * every / BATCHES) / anneal) for e, b in steps]


@pytest.mark.parametrize("host", [lightning, pytorch_lightning], ids=lambda host: host.__name__)
def test_the_function_is_kept_and_converted_parameters_are_trained(tmp_path, host):
    class Module(Steps, host.LightningModule):
        def on_train_start(self):
            self.start = self(images)
            optimized = {id(p) for g in self.optimizers().param_groups for p in g["params"]}
            assert optimized == {id(p) for p in self.parameters()}

    images = torch.rand(2, 3, 12, 12)
    module = Module()
    module.example_input_array = images[:1]
    expected = network()(images)
    trainer(tmp_path, KernelWarehouse(), host=host).fit(module, data())
    torch.testing.assert_close(module.start, expected, rtol=1e-5, atol=1e-6)
    assert plans_of(module.model)
    assert not torch.allclose(module(images), expected, atol=1e-2)
    assert module.seen == [0] * 3 * BATCHES


@pytest.mark.parametrize("every", [1, 2])
def test_temperature_and_averages_follow_the_formula(tmp_path, every):
    class Watch(lightning.Callback):
        def on_validation_epoch_end(self, trainer, module):  # averages are swapped in here
            done = len(module.seen)  # none: the check of validation before training
            tau = formula(2, every=every)[done - 1] if done else 1
            assert kw.get_temperature(average._average_model) == pytest.approx(tau)
            assert module.validated == pytest.approx(tau)

    average = EMAWeightAveraging(decay=0.5)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    first = KernelWarehouse(Recipe(PLAN, anneal=2))
    module = Net()
    run = trainer(tmp_path, first, Watch(), average, saved, accumulate_grad_batches=every)
    run.fit(module, data(), data())
    assert module.seen == pytest.approx(formula(2, every=every))
    assert kw.get_temperature(module) == 0
    steps = sorted(tmp_path.glob("step=*.ckpt"), key=lambda file: int(file.stem[5:]))
    assert len(steps) == run.global_step
    taus = [t for i, t in enumerate(formula(2, every=every)) if (i % BATCHES + 1) % every == 0]
    if every == 1:  # the averaged weights' temperature in every file
        loaded = [kw.get_temperature(Net.load_from_checkpoint(file)) for file in steps]
        assert loaded == pytest.approx(taus)


def test_a_run_that_is_stopped_while_it_anneals_says_so(tmp_path, capsys):
    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    trainer(tmp_path, KernelWarehouse(Recipe(PLAN, anneal=2)), Stop()).fit(Plain(), data())
    assert "ended at temperature" in capsys.readouterr().err


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Also in the middle of an epoch, with an average; the second run converts by itself."""

    def callbacks():
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        return KernelWarehouse(Recipe(PLAN, anneal=2)), EMAWeightAveraging(decay=0.5), saved

    torch.manual_seed(2)
    whole = Net()
    trainer(tmp_path, *callbacks()).fit(whole, data())
    for step in (BATCHES, BATCHES + 2):
        torch.manual_seed(3)  # the paper's start is random: the file's weights must win
        resumed = Net()
        trainer(tmp_path, *callbacks()).fit(
            resumed, data(), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
        assert resumed.seen == whole.seen[step:]
        state = resumed.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_new_process_loads_a_checkpoint_without_trainer(tmp_path, weights_only):
    saved = ModelCheckpoint(tmp_path, "last", save_weights_only=weights_only)
    module = Net()
    trainer(tmp_path, KernelWarehouse(Recipe(PLAN)), saved, max_epochs=1).fit(module, data())
    images = torch.rand(2, 3, 12, 12)
    torch.save((images, module.eval()(images)), tmp_path / "outputs.pt")
    code = (
        "import sys, torch; from test_with_lightning import Net;"
        "images, outputs = torch.load(sys.argv[2]);"
        "module = Net.load_from_checkpoint(sys.argv[1]).eval();"
        "assert torch.equal(module(images), outputs)"
    )
    command = [sys.executable, "-c", code, tmp_path / "last.ckpt", tmp_path / "outputs.pt"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
    other = Net()
    kw.convert(other.model, PLAN, cell_num_ratio=2)
    with pytest.raises(ValueError, match="was converted by another plan"):
        trainer(tmp_path).test(other, data(), ckpt_path=tmp_path / "last.ckpt")


_PROCESSES = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from test_with_lightning import *
module = Net()
torch.manual_seed(int(__import__("os").environ.get("LOCAL_RANK", 0)))  # starts that differ
run = trainer(sys.argv[1], KernelWarehouse(Recipe(PLAN, anneal=2)), strategy="ddp", devices=2,
              max_epochs=2, use_distributed_sampler=False)
run.fit(module, data())
total = [p.double().sum().item() for p in module.parameters()]
open(f"{sys.argv[1]}/{run.global_rank}.json", "w").write(json.dumps([module.seen, total]))
"""


def test_two_processes_share_temperature_and_weights(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(_PROCESSES)
    subprocess.run([sys.executable, script, tmp_path, Path(__file__).parent], check=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[0] == pytest.approx(formula(2, epochs=2))


def test_processes_that_train_copies_need_a_converted_module(tmp_path):
    """Lightning loads what fits of their weights into the module, and says nothing of the rest."""

    class Keep(lightning.Callback):
        def on_train_end(self, trainer, module):
            torch.save(module.state_dict(), tmp_path / "trained.pt")

    def fit(module):
        run = trainer(tmp_path, KernelWarehouse(recipe), Keep(), strategy="ddp_fork")
        run.fit(module, data())

    recipe, module = Recipe(PLAN, anneal=2), Plain()
    with pytest.raises(Exception, match=r"copies in processes.*recipe\.convert"):
        fit(module)
    recipe.convert(module.model)
    fit(module)
    trained = torch.load(tmp_path / "trained.pt")
    assert kw.get_temperature(module) == 0
    assert all(torch.equal(value, trained[name]) for name, value in module.state_dict().items())


def test_precision_and_compilation_change_nothing_else(tmp_path):
    losses = {}
    for how in ("", "bf16", "compiled network", "compiled module", "SWA"):
        module = Net()
        if how == "compiled network":
            module.model = torch.compile(module.model, backend="eager")
        compiled = torch.compile(module, backend="eager") if how == "compiled module" else module
        precision = "bf16-mixed" if how == "bf16" else "32-true"
        torch.manual_seed(2)
        callbacks = [KernelWarehouse(Recipe(PLAN, anneal=2))]
        if how == "SWA":  # adds an epoch of its own
            callbacks.append(StochasticWeightAveraging(0.01, swa_epoch_start=1))
        trainer(tmp_path, *callbacks, precision=precision).fit(compiled, data(), data())
        assert module.seen == pytest.approx(formula(2, epochs=4 if how == "SWA" else 3))
        assert kw.get_temperature(module) == 0
        losses[how] = module.losses
    assert losses[""][-1] < 0.5 * losses[""][0]
    assert losses["compiled network"] == pytest.approx(losses[""], rel=1e-3)
    assert losses["compiled module"] == pytest.approx(losses[""], rel=1e-3)
    assert losses["bf16"] != losses[""]
    assert losses["bf16"] == pytest.approx(losses[""], abs=0.1)


def test_a_checkpoint_of_another_attention_is_refused(tmp_path):
    """Its weights would fit. Also without ConvertedModule, in training and in tests."""
    saved = ModelCheckpoint(tmp_path, "last")
    first = trainer(tmp_path, KernelWarehouse(Recipe(PLAN)), saved, max_epochs=1)
    first.fit(Plain(), data())
    other = KernelWarehouse(Recipe(PLAN, {"attention": "sigmoid"}))
    for run in ("fit", "test"):
        with pytest.raises(ValueError, match="by another plan or with other settings"):
            getattr(trainer(tmp_path, other), run)(
                Plain(), data(), ckpt_path=tmp_path / "last.ckpt"
            )


def test_configure_model_is_converted_once(tmp_path):
    class Late(Plain):
        def __init__(self, again):
            super().__init__(parts=())
            self.model, self.again = None, again

        def configure_model(self):
            if self.model is None or self.again:
                self.model = network()

    module = Late(again=False)
    trainer(tmp_path, KernelWarehouse(Recipe(PLAN))).fit(module, data())
    assert plans_of(module.model)
    with pytest.raises(ValueError, match="built its network anew"):
        trainer(tmp_path, KernelWarehouse(Recipe(PLAN))).fit(Late(again=True), data())


def test_what_cannot_work_is_refused(tmp_path):
    callback = KernelWarehouse(Recipe(PLAN, anneal=1))
    with pytest.raises(ValueError, match="put KernelWarehouse first"):
        trainer(tmp_path, EMAWeightAveraging(), callback).fit(Plain(), data())
    with pytest.raises(ValueError, match=r"2 parts with parameters \(model, other\); say which"):
        trainer(tmp_path, callback).fit(Plain(("model", "other")), data())
    endless = torch.utils.data.DataLoader(Iterable(), BATCH)
    with pytest.raises(ValueError, match="limit_train_batches"):
        trainer(tmp_path, callback).fit(Plain(), endless)
    module = Plain()
    trainer(tmp_path, callback, limit_train_batches=BATCHES).fit(module, endless)
    assert module.seen == pytest.approx(formula(1))
    long = KernelWarehouse(Recipe(PLAN, anneal=4))
    with pytest.raises(ValueError, match="anneal is 4 epochs; the run has 2"):
        trainer(tmp_path, long, max_epochs=2).fit(Plain(), data())
    for settings in ({"max_steps": 19}, {"max_steps": 7, "accumulate_grad_batches": 3}):
        with pytest.raises(ValueError, match=r"anneal is 4 epochs; the run has 3\.[58]"):
            trainer(tmp_path, long, max_epochs=-1, **settings).fit(Plain(), data())
    trainer(tmp_path, long, max_epochs=-1, max_steps=20).fit(Plain(), data())
    kept = Plain()
    kw.convert(kept.model, PLAN)
    with pytest.raises(ValueError, match="at temperature 0, but annealing starts at 1"):
        trainer(tmp_path, callback).fit(kept, data())
    for kind in (FSDPStrategy, DeepSpeedStrategy):
        strategy = object.__new__(kind)  # without the package that it drives
        with pytest.raises(ValueError, match=f"{kind.__name__}: layers share their cells"):
            callback.setup(SimpleNamespace(strategy=strategy), Plain(), "fit")
