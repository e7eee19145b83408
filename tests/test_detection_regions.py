"""Operators that sample maps: regions, deformable convolution and attention."""

from __future__ import annotations

import detection_reference as reference
import pytest
import torch
from detection_setup import DEVICES, DTYPES, compare, draw, operators

# The image's number, then corners: inside, across the border, outside, without extent, the whole.
ROIS = [
    [0, 2.3, 1.2, 17.9, 13.1],
    [1, -6, -3.5, 9.2, 22],
    [1, 40, 40, 60, 66],
    [0, 6.2, 5.1, 6.2, 5.1],
    [1, 0, 0, 23, 19],
]


# ---------------------------------------------------------------- regions


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("aligned", "ratio"), [(True, 0), (True, 2), (False, 0), (False, 2)])
def test_roi_align(device: str, aligned: bool, ratio: int) -> None:
    rois = torch.tensor(ROIS, dtype=torch.float64)
    settings = ((2, 3), 0.4, ratio)
    compare(
        lambda x: operators.roi_align(x, rois.to(x), *settings, "avg", aligned),
        lambda x: reference.roi_align(x, rois, *settings, aligned),
        [draw(2, 3, 8, 10)],
        device,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_roi_align_types(device: str, dtype: torch.dtype) -> None:
    rois = torch.tensor(ROIS[:2])  # stay float32: rounding a corner would be another region
    compare(
        lambda x: operators.roi_align(x, rois.to(x.device), 2, 0.5, 2, "avg", True),
        lambda x: reference.roi_align(x, rois, (2, 2), 0.5, 2, True),
        [draw(2, 2, 8, 10)],
        device,
        dtype,
    )


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_roi_align_with_deterministic_algorithms() -> None:
    rois = torch.tensor(ROIS, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        x = draw(2, 3, 8, 10).float().cuda().requires_grad_()
        operators.roi_align(x, rois, 7, 0.4).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad is not None


def test_maxima_are_refused() -> None:
    x, rois = draw(2, 3, 8, 10), torch.tensor(ROIS, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"'roi_align' with pool_mode='max'.*set pool"):
        operators.roi_align(x, rois, 7, 0.4, 0, "max", True)
    with pytest.raises(NotImplementedError, match=r"'roi_pool_forward' is not among"):
        operators.roi_pool(x, rois, 7, 0.4)


@pytest.mark.parametrize("device", DEVICES)
def test_no_regions(device: str) -> None:
    x = torch.ones(2, 3, 8, 10, device=device, requires_grad=True)
    rois = torch.zeros(0, 5, device=device)
    pooled = operators.roi_align(x, rois, 7, 0.5)
    pooled.sum().backward()
    assert pooled.shape == (0, 3, 7, 7)
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_regions_of_strided_maps_under_autocast(device: str) -> None:
    x = draw(2, 8, 10, 3).float().to(device).permute(0, 3, 1, 2).requires_grad_()
    rois = torch.tensor(ROIS, device=device)
    with torch.autocast(device, torch.bfloat16):
        pooled = operators.roi_align(x, rois, 2, 0.4)
        grad = torch.autograd.grad(pooled.transpose(2, 3).sum(), x)[0]
    plain = x.detach().contiguous().requires_grad_()
    expected = operators.roi_align(plain, rois, 2, 0.4)
    assert torch.equal(pooled, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), plain)[0])


# ---------------------------------------------------------------- deformable operators

GEOMETRIES = {
    "plain": ((1, 1), (1, 1), (1, 1), 1, 1),
    "grouped": ((2, 1), (0, 2), (1, 2), 2, 4),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("version", ["v1", "v2", "v2 with bias"])
@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [*(("plain", dtype) for dtype in DTYPES), ("grouped", torch.float64), ("grouped", torch.half)],
)
def test_deform_conv(device: str, geometry: str, version: str, dtype: torch.dtype) -> None:
    stride, padding, dilation, groups, deform_groups = settings = GEOMETRIES[geometry]
    x, weight, bias = draw(2, 8, 5, 6), draw(4, 8 // groups, 3, 2, seed=1) / 4, draw(4, seed=2)
    sizes = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d]
        + 1
        for d in range(2)
    ]
    offset = draw(2, deform_groups * 12, *sizes, seed=3) * 1.5  # some leave the image
    # Not at pixels: there the derivative is one side's or the other's.
    offset = offset.floor() + 0.2 + 0.6 * (offset - offset.floor())
    mask = draw(2, deform_groups * 6, *sizes, seed=4).sigmoid()
    if version == "v1":
        compare(
            lambda x, o, w: operators.deform_conv2d(x, o, w, *settings),
            lambda x, o, w: reference.deform_conv(x, o, None, w, None, *settings),
            [x, offset, weight],
            device,
            dtype,
        )
    elif version == "v2":
        compare(
            lambda x, o, m, w: operators.modulated_deform_conv2d(x, o, m, w, None, *settings),
            lambda x, o, m, w: reference.deform_conv(x, o, m, w, None, *settings),
            [x, offset, mask, weight],
            device,
            dtype,
        )
    else:
        compare(
            lambda x, o, m, w, b: operators.modulated_deform_conv2d(x, o, m, w, b, *settings),
            lambda x, o, m, w, b: reference.deform_conv(x, o, m, w, b, *settings),
            [x, offset, mask, weight, bias],
            device,
            dtype,
        )


@pytest.mark.parametrize("device", DEVICES)
def test_deform_conv_gradients_one_by_one(device: str) -> None:
    """mmcv asks for the weight's in a call of its own, or not at all; backward may run twice."""
    tensors = [t.to(device) for t in (draw(2, 4, 5, 5), draw(2, 18, 5, 5), draw(4, 4, 3, 3))]
    everything = [t.clone().requires_grad_() for t in tensors]
    output = operators.deform_conv2d(*everything, 1, 1)
    grad = draw(*output.shape, seed=5).to(device)
    together = torch.autograd.grad(output, everything, grad, retain_graph=True)
    again = torch.autograd.grad(output, everything, 2 * grad)
    for i, expected in enumerate(together):
        torch.testing.assert_close(again[i], 2 * expected)
        alone = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        output = operators.deform_conv2d(*alone, 1, 1)
        torch.testing.assert_close(torch.autograd.grad(output, alone[i], grad)[0], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
def test_deformable_modules_under_autocast(device: str, kind: str) -> None:
    """Of autocast's layers offsets come rounded; all else is then rounded to their type."""
    from mmcv.cnn import build_conv_layer

    layer = build_conv_layer({"type": kind, "deform_groups": 2}, 4, 6, 3, padding=1).to(device)
    x = draw(2, 5, 7, 4).float().to(device).permute(0, 3, 1, 2)
    plain = layer(x)
    with torch.autocast(device, torch.bfloat16):
        output = layer(x)
        output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), plain, atol=0.05, rtol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_deformable_attention(device: str, dtype: torch.dtype) -> None:
    shapes = [(3, 4), (2, 2)]
    value = draw(2, 16, 2, 3)
    locations = draw(2, 4, 2, 2, 3, 2, seed=1) * 0.4 + 0.5  # some outside
    weights = draw(2, 4, 2, 2, 3, seed=2).sigmoid()
    function = operators.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    sizes = torch.tensor(shapes, device=device)
    starts = torch.tensor([0, 12], device=device)
    compare(
        lambda v, at, w: function(v, sizes, starts, at, w, 64),
        lambda v, at, w: reference.deform_attention(v, shapes, at, w),
        [value, locations, weights],
        device,
        dtype,
    )
    none = [t[:, :0].to(device, dtype) for t in (locations, weights)]
    assert function(value.to(device, dtype), sizes, starts, *none, 64).shape == (2, 0, 6)
