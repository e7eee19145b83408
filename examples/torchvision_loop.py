"""A training loop in the style of torchvision's references, with a network made dynamic.

Parameter groups, mixed precision, a moving average and checkpoints are as usual. The lines with a
``recipe``, and ``plans`` in the checkpoint, make the network dynamic. On images that it makes
itself, a minute on a CPU::

    python examples/torchvision_loop.py --epochs 4
    python examples/torchvision_loop.py --epochs 8 --anneal 2  # from nothing, as the papers train
"""

import argparse
import math
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from kw.integrations.core import Recipe, plans_of, repeat


def stripes(count: int, seed: int, classes: int = 4, side: int = 32) -> TensorDataset:
    """Noisy stripes; their direction is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    angle = labels[:, None, None] * math.pi / classes
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    phase = 6.3 * torch.rand(count, 1, 1, generator=generator)
    waves = (0.8 * (x * angle.cos() + y * angle.sin()) + phase).sin()
    noise = torch.randn(count, 3, side, side, generator=generator)
    return TensorDataset(waves[:, None] + noise, labels)


def main(arguments: list[str] | None = None) -> float:
    """Train; returns the moving average's accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="resnet18", help="a name of torchvision.models")
    parser.add_argument("--weights", type=Path, help="a state of the static network")
    parser.add_argument("--anneal", type=float, default=0, help="epochs; 0 keeps the static start")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--resume", type=Path, help="a checkpoint of this script")
    parser.add_argument("--out", type=Path, help="where to write the checkpoint")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved = torch.load(args.resume, weights_only=True) if args.resume else None

    model = torchvision.models.get_model(args.model, num_classes=4)
    if args.weights:
        model.load_state_dict(torch.load(args.weights, weights_only=True))
    recipe = Recipe("auto", anneal=args.anneal)
    if saved:
        repeat(model, saved["plans"])
    else:
        recipe.convert(model, torch.zeros(2, 3, 32, 32))  # images of the real size
    model.to(device)

    decayed = [p for p in model.parameters() if p.dim() > 1]  # cells and attention among them
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    if saved:
        for name, part in (("model", model), ("average", average), ("optimizer", optimizer)):
            part.load_state_dict(saved[name])

    loader = DataLoader(stripes(args.images, seed=1), batch_size=32, shuffle=True)
    for epoch in range(saved["epoch"] if saved else 0, args.epochs):
        model.train()
        for step, (images, labels) in enumerate(loader):
            now = epoch + step / len(loader)
            recipe.set_temperature(now, model)  # before every update
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(images.to(device))
            loss = nn.functional.cross_entropy(logits.float(), labels.to(device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)
            recipe.set_temperature(now, average)  # it averages buffers; this one is set
        found = f"loss {loss.item():.3f}, accuracy of the average {evaluate(average, device):.1%}"
        print(f"epoch {epoch}: {found}")
        if args.out:
            state = {"model": model, "average": average, "optimizer": optimizer}
            content = {name: part.state_dict() for name, part in state.items()}
            torch.save({**content, "epoch": epoch + 1, "plans": plans_of(model)}, args.out)
    return evaluate(average, device)


@torch.inference_mode()
def evaluate(model: nn.Module, device: torch.device) -> float:
    model.eval()
    images, labels = stripes(256, seed=2).tensors
    return float((model(images.to(device)).argmax(1).cpu() == labels).float().mean())


if __name__ == "__main__":
    main()
