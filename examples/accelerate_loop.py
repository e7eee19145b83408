"""A loop of one's own with Hugging Face accelerate, on images that it generates.

    accelerate launch examples/accelerate_loop.py work_dirs/loop
    accelerate launch examples/accelerate_loop.py work_dirs/more --resume work_dirs/loop/epoch_1

A folder epoch_N is what accelerate saves: weights, optimizer, random states, and how many epochs
are done. The temperature follows from epoch and batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from kw.integrations.core import Recipe


def stripes(count: int = 96, size: int = 32) -> TensorDataset:
    """Noisy images with stripes along one of two axes, which is the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    waves = torch.arange(size).mul(0.8).sin().expand(size, size)
    images = torch.stack([waves.T if label else waves for label in labels])
    noise = torch.randn(count, 3, size, size, generator=generator)
    return TensorDataset(images[:, None] + 0.5 * noise, labels)


class Progress:
    """What accelerate saves besides: epochs done."""

    epochs = 0

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for checkpoints")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--anneal", type=float, default=2, help="epochs; 0: a kept start")
    parser.add_argument("--accumulate", type=int, default=2, help="batches in an update")
    parser.add_argument("--resume", help="a folder epoch_N")
    args = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )
    torch.manual_seed(0)
    data, recipe = stripes(), Recipe("auto", anneal=args.anneal)
    model = timm.create_model("resnet10t", num_classes=2)
    recipe.check(args.epochs)
    recipe.convert(model, data.tensors[0][:2])  # before the optimizer, and before prepare
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = DataLoader(data, 8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        accelerator.load_state(args.resume)

    for epoch in range(progress.epochs, args.epochs):
        loader.set_epoch(epoch)
        total = 0.0
        for step, (images, labels) in enumerate(loader):
            first = step // args.accumulate * args.accumulate  # of the batches of this update
            tau = recipe.set_temperature(epoch + first / len(loader), model)
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += accelerator.gather(loss.detach()).mean().item()
        progress.epochs = epoch + 1
        accelerator.print(f"epoch {epoch + 1}: loss {total / len(loader):.6f}, temperature {tau:g}")
        accelerator.save_state(str(args.out / f"epoch_{epoch + 1}"))
    accelerator.end_training()


if __name__ == "__main__":
    main()
