"""mmcv's focal loss as kw.detection.ops provides them."""

from __future__ import annotations

import detection_reference as reference
import pytest
import torch
from detection_setup import DEVICES, DTYPES, compare, draw, operators


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (1.5, 0.3)])
def test_focal_loss(device: str, dtype: torch.dtype, gamma: float, alpha: float) -> None:
    x = draw(6, 4) * 2
    target = torch.tensor([0, 3, 4, 1, 2, 4])  # 4 is the background
    compare(
        lambda x: operators.sigmoid_focal_loss(x, target.to(device), gamma, alpha, None, "none"),
        lambda x: reference.sigmoid_focal(x, target, gamma, alpha),
        [x],
        device,
        dtype,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_focal_loss_weighs_classes(device: str) -> None:
    x, weight = draw(5, 3), torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    target, factor = torch.tensor([0, 2, 3, 1, 3]), torch.tensor([0.5, 3, 1, 2, 1])
    on_device = (target.to(device), 2.0, 0.25, weight.to(device), "mean")
    compare(
        lambda x: operators.sigmoid_focal_loss(x, *on_device),
        lambda x: (reference.sigmoid_focal(x, target, 2, 0.25) * factor[:, None]).sum() / 5,
        [x],
        device,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_focal_loss_of_extreme_and_of_no_logits(device: str) -> None:
    x = torch.tensor([[60.0, -60, 200, -200]], device=device, requires_grad=True)
    target = torch.tensor([1], device=device)
    loss = operators.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "none")
    loss.sum().backward()
    expected = torch.tensor([[0.75 * 60, 0.25 * 60, 0.75 * 200, 0]])
    torch.testing.assert_close(loss.detach().cpu(), expected)
    torch.testing.assert_close(x.grad.cpu(), torch.tensor([[0.75, -0.25, 0.75, 0]]))
    empty = torch.zeros(0, 4, device=device, requires_grad=True)
    loss = operators.sigmoid_focal_loss(empty, target[:0], 2.0, 0.25, None, "none")
    assert loss.shape == (0, 4)
