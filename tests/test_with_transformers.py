"""Hugging Face's models and Trainer, with the real package: ``make test-integrations``."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import IterableDataset

hf = pytest.importorskip("transformers", reason="needs transformers")

import kw  # noqa: E402
from kw.integrations.core import Recipe, plans_of  # noqa: E402
from kw.integrations.transformers import KernelWarehouse, convert  # noqa: E402
from kw.warehouse import Plan  # noqa: E402

IMAGES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
DATA = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(IMAGES)]
PLAN = {"rules": [{"match": r".*(q_proj|v_proj|fc\d)", "warehouse": "w"}]}
OTHER = {"rules": [{"match": r".*k_proj", "warehouse": "w"}]}


def vit(**settings):
    torch.manual_seed(0)
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8, "num_labels": 3}
    return hf.ViTForImageClassification(hf.ViTConfig(**(common | settings)))


def segformer():
    torch.manual_seed(0)
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[1, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=3,
    )
    return hf.SegformerForSemanticSegmentation(config)


def convnext():
    torch.manual_seed(0)
    config = hf.ConvNextConfig(hidden_sizes=[16, 32, 32, 32], depths=[2, 2, 2, 2], image_size=32)
    return hf.ConvNextForImageClassification(config)


def timm():
    torch.manual_seed(0)
    return hf.TimmWrapperForImageClassification(
        hf.TimmWrapperConfig(architecture="resnet18", num_labels=3)
    )


def arguments(tmp_path, **settings):
    common = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    common |= {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "seed": 5}
    common |= {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return hf.TrainingArguments(tmp_path, **(common | settings))


class Watch(hf.TrainerCallback):
    def __init__(self):
        self.seen, self.losses = [], []

    def on_optimizer_step(self, args, state, control, model=None, **_):
        self.seen.append(kw.get_temperature(model))

    def on_log(self, args, state, control, logs=None, **_):
        self.losses += [logs["loss"]] if "loss" in logs else []


def trained(tmp_path, model=None, anneal=2, resume=None, **settings):
    recipe = Recipe(PLAN, anneal=anneal)
    model = convert(vit(), recipe) if model is None else model
    watch = Watch()
    host = hf.Trainer(
        model,
        arguments(tmp_path, **settings),
        train_dataset=DATA,
        callbacks=[KernelWarehouse(recipe), watch],
    )
    host.train(resume_from_checkpoint=resume)
    return model, watch


BUILT = {
    "vit": (vit, "AutoModelForImageClassification", ""),
    "convnext": (convnext, "AutoModelForImageClassification", ""),
    "segformer": (segformer, "AutoModelForSemanticSegmentation", ""),
    "timm": (timm, "AutoModelForImageClassification", "timm_model"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # what auto leaves static
@pytest.mark.parametrize("name", BUILT)
def test_the_function_is_kept_and_a_new_process_loads_it(name, tmp_path):
    build, auto, part = BUILT[name]
    model, images = build().eval(), IMAGES[:2]
    before = model(images).logits
    example = torch.zeros(2, 3, 32, 32)
    assert convert(model, example=example, part=part) is model
    torch.testing.assert_close(model(images).logits, before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # kernels that depend on the image
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    torch.save((images, model(images).logits), tmp_path / "outputs.pt")
    for imported, message in ((True, ""), (False, "`kernelwarehouse`")):
        code = (
            f"import sys, torch, transformers; from transformers import {auto}\n"
            f"if {imported}: import kw.integrations.transformers\n"
            "images, outputs = torch.load(sys.argv[1] + '/outputs.pt')\n"
            f"model = {auto}.from_pretrained(sys.argv[1] + '/model')\n"
            f"assert type(model) is transformers.{type(model).__name__}\n"
            "assert torch.equal(model(images).logits, outputs)\n"
            "model.save_pretrained(sys.argv[1] + '/again', max_shard_size='100KB')"
        )
        command = [sys.executable, "-c", code, tmp_path]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert (result.returncode == 0) == imported, result.stderr
        assert message in result.stderr
    for file in (tmp_path / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_the_class_loads_too_and_incomplete_weights_are_refused(tmp_path):
    model = convert(vit(), Recipe(PLAN)).eval()
    model.save_pretrained(tmp_path)
    loaded = hf.ViTForImageClassification.from_pretrained(tmp_path, dtype="float32")
    assert torch.equal(loaded(IMAGES).logits, model(IMAGES).logits)
    assert plans_of(loaded) == plans_of(model)
    wider = hf.ViTForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert wider(IMAGES[:1]).logits.shape == (1, 7)
    with pytest.raises(ValueError, match="save_pretrained cannot save a converted network"):
        model.vit.save_pretrained(tmp_path / "part")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    cells = [name for name in state if name.endswith("warehouse.weight")]
    assert len(cells) == 1
    del state[cells[0]]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the cells of w"):
        hf.AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("every", [1, 2])
def test_temperature_follows_the_formula(tmp_path, every):
    _, watch = trained(tmp_path, gradient_accumulation_steps=every)
    first = [e + b / 3 for e in range(3) for b in range(0, 3, every)]
    assert watch.seen == pytest.approx([max(0, 1 - epoch / 2) for epoch in first], abs=1e-6)
    assert watch.losses[-1] < watch.losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Also in the middle of an epoch; from a model that was converted at random."""
    whole, watch = trained(tmp_path / "whole")
    for step in (3, 4):
        torch.manual_seed(9)
        other = convert(vit(), Recipe(PLAN, anneal=2))
        folder = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed, again = trained(tmp_path / "resumed", other, resume=folder)
        assert again.seen == watch.seen[step:]
        state = resumed.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "whole/checkpoint-9")
    assert torch.equal(loaded(IMAGES).logits, whole.eval()(IMAGES).logits)


@pytest.mark.parametrize(
    ("anneal", "settings"), [(2, {"attention": "softmax"}), (0, {"start": "keep"})]
)
def test_a_run_is_not_resumed_with_another_conversion(tmp_path, anneal, settings):
    """All tensors fit: only the plans tell them apart. One from before they were saved resumes."""
    trained(tmp_path, num_train_epochs=2)
    folder = tmp_path / "checkpoint-3"
    other = convert(vit(), Recipe(PLAN, settings, anneal))
    with pytest.raises(ValueError, match=r"by another plan.*take the recipe that it was trained"):
        trained(tmp_path / "other", other, anneal, resume=str(folder))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["stateful_callbacks"].pop("kernelwarehouse") == {"": [plan_of(PLAN)]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    _, watch = trained(tmp_path / "old", anneal=2, resume=str(folder), save_steps=4)
    assert len(watch.seen) == 6
    later = json.loads((tmp_path / "old/checkpoint-4/trainer_state.json").read_text())
    assert later["stateful_callbacks"]["kernelwarehouse"] == {"": [plan_of(PLAN)]}


def plan_of(plan):
    return Plan.from_mapping({**plan, "start": "paper"}).to_mapping()


def test_ways_of_training_change_nothing_else(tmp_path):
    losses = {}
    for name, settings in {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
        "bf16": {"bf16": True},
    }.items():
        torch.manual_seed(3)
        _, watch = trained(tmp_path / name, save_strategy="no", **settings)
        assert len(watch.seen) == 9
        assert watch.seen[-1] == 0
        losses[name] = watch.losses
    assert losses["checkpointed"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["bf16"] != losses["plain"]
    assert losses["bf16"][0] == pytest.approx(losses["plain"][0], rel=2**-7)


def test_what_cannot_work_is_refused(tmp_path):
    callback = KernelWarehouse(Recipe(PLAN, anneal=1))
    static = hf.Trainer(vit(), arguments(tmp_path), train_dataset=DATA, callbacks=[callback])
    with pytest.raises(ValueError, match="was not converted before the optimizer was made"):
        static.train()
    model = vit()
    early = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, callback.recipe)
    stale = hf.Trainer(
        model,
        arguments(tmp_path),
        train_dataset=DATA,
        callbacks=[callback],
        optimizers=(early, None),
    )
    with pytest.raises(ValueError, match="was not converted before the optimizer was made"):
        stale.train()

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(DATA)

    endless = hf.Trainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=Endless(), callbacks=[callback]
    )
    with pytest.raises(ValueError, match="has no length"):
        endless.train()
    with pytest.raises(ValueError, match="anneal is 7 epochs; the run has 3"):
        trained(tmp_path, anneal=7)
    kept = convert(vit(), Recipe(PLAN))
    with pytest.raises(ValueError, match="at temperature 0, but annealing starts at 1"):
        trained(tmp_path, kept)
    other = convert(vit(), Recipe(OTHER))
    other.save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="of another conversion: they lack vit"):
        trained(tmp_path, resume=str(tmp_path / "checkpoint-1"))


def test_plans_stay_with_the_part_they_are_for(tmp_path):
    model = convert(vit(), Recipe(PLAN), part="vit").eval()
    convert(model, Recipe(PLAN))  # does nothing, and forgets nothing
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(IMAGES).logits, model(IMAGES).logits)
    assert plans_of(loaded.vit) == plans_of(model.vit)
    model.vit.warehouses.plans = ()  # as by a method of kw.peers
    with pytest.raises(ValueError, match="no plan can be saved"):
        convert(model)


def test_config_holds_the_plans_alone(tmp_path):
    model = convert(vit(), Recipe(PLAN))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "kernelwarehouse"
    assert config["static_model_type"] == "vit"
    assert config["quantization_config"]["plans"] == {"": plans_of(model)}
    assert isinstance(model.vit, nn.Module)
    assert model.vit.config.to_dict()["model_type"] == "vit"
