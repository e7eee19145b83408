"""Partition arithmetic: counts, own cells, and what is refused."""

from __future__ import annotations

import math
import random

import pytest

from kw.warehouse import KernelShape, partition_kernels

STAGE = (  # the first stage of a basic ResNet with what the second hands over
    KernelShape(64, 64, (3, 3), name="conv1"),
    KernelShape(128, 64, (3, 3), name="next.conv1"),
    KernelShape(128, 64, (1, 1), name="next.downsample"),
)


@pytest.mark.parametrize(
    ("ratio", "plane", "cells", "cell_shape", "mixtures"),
    [
        (1, 1, 9 + 18 + 2, (64, 64, 1, 1), [9, 18, 2]),
        (2, 1, 58, (64, 64, 1, 1), [9, 18, 2]),
        (4, 1, 116, (64, 64, 1, 1), [9, 18, 2]),
        (0.5, 0.5, 58, (32, 32, 1, 1), [36, 72, 8]),
        (0.25, 0.25, 116, (16, 16, 1, 1), [144, 288, 32]),
        (1, 0.5, 116, (32, 32, 1, 1), [36, 72, 8]),
    ],
)
def test_counts_of_a_stage(ratio, plane, cells, cell_shape, mixtures):
    partition = partition_kernels(
        STAGE, cell_num_ratio=ratio, cell_inplane_ratio=plane, cell_outplane_ratio=plane
    )
    assert (partition.cells, partition.cell_shape) == (cells, cell_shape)
    assert [layer.mixtures for layer in partition.layers] == mixtures
    for shape, layer in zip(STAGE, partition.layers, strict=True):
        assert layer.kernel_shape == (shape.out_channels, shape.in_per_group, *shape.kernel)
        assert layer.grid[0] == math.prod(shape.kernel)


@pytest.mark.parametrize(
    ("shapes", "settings", "cells", "cell_shape", "grids"),
    [
        # depthwise: one input channel a group
        ([KernelShape(24, 24, (7, 7), 24)], {}, 49, (24, 1, 1, 1), [(49, 1, 1)]),
        # grouped: the greatest common divisor is taken of I / g
        (
            [KernelShape(32, 16, (3,), 2), KernelShape(48, 24, (5,), 2)],
            {},
            3 * 2 * 2 + 5 * 3 * 3,
            (16, 4, 1),
            [(3, 2, 2), (5, 3, 3)],
        ),
        # cells that keep the kernel's size
        (
            [KernelShape(8, 4, (3, 3, 3)), KernelShape(16, 8, (3, 3, 3))],
            {"spatial_partition": False},
            1 + 4,
            (8, 4, 3, 3, 3),
            [(1, 1, 1), (1, 2, 2)],
        ),
        # linear layers and pointwise convolutions join
        (
            [KernelShape(96, 24, (1,)), KernelShape(24, 96, (1, 1))],
            {},
            8,
            (24, 24, 1),
            [(1, 4, 1), (1, 1, 4)],
        ),
        # input channels cut finely, output channels not at all, as in a converted classifier
        (
            [KernelShape(1000, 1280, (1,))],
            {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.025},
            20,
            (1000, 32, 1),
            [(1, 1, 40)],
        ),
        # a cell has at least one channel
        ([KernelShape(3, 2, (1,))], {"cell_inplane_ratio": 0.1}, 2, (3, 1, 1), [(1, 1, 2)]),
    ],
    ids=["depthwise", "grouped", "whole", "pointwise", "classifier", "least"],
)
def test_counts_of_other_kinds(shapes, settings, cells, cell_shape, grids):
    partition = partition_kernels(shapes, **settings)
    assert (partition.cells, partition.cell_shape) == (cells, cell_shape)
    assert [layer.grid for layer in partition.layers] == grids


def owners(counts, ratio):
    """Own cells of layers of 1x1 kernels with these numbers of mixtures."""
    assert math.gcd(*counts) == 1, "else a cell spans more than 4 channels"
    shapes = [KernelShape(4 * m, 4, (1,), name=f"l{i}") for i, m in enumerate(counts)]
    return partition_kernels(shapes, cell_num_ratio=ratio)


def test_own_cells_with_whole_budgets():
    partition = owners([2, 3], 2)
    assert [s.owners for s in partition.slices] == [(0, 2), (4, 6, 8)]
    assert [(s.start, s.stop) for s in partition.slices] == [(0, 4), (4, 10)]
    assert partition.cells == 10


def test_own_cells_with_a_half():
    """Mixture i takes the next cell where i mod 2 == (i div 2) mod 2, else the null cell."""
    partition = owners([8, 4, 9, 7], 0.5)
    first, second, third, fourth = partition.slices
    assert first.owners == (0, None, None, 1, 2, None, None, 3)
    assert second.owners == (4, None, None, 5)
    assert third.owners == (6, None, None, 7, 8, None, None, 9, 10)
    assert fourth.owners == (11, None, None, 12, 13, None, None)
    assert fourth.stop == partition.cells == 14


def test_own_cells_with_a_third():
    partition = owners([9, 10, 8], 1 / 3)
    assert partition.slices[0].owners == (0, None, None, None, 1, None, None, None, 2)
    assert partition.slices[1].owners[9] == 6  # the pattern starts again: (9 div 3) mod 3 == 0
    assert partition.slices[-1].stop == partition.cells == 9


@pytest.mark.parametrize("seed", range(40))
def test_random_warehouses(seed):
    """Every mixture its own cell for b >= 1; cells visited exactly once, in order, to the end."""
    rng = random.Random(seed)
    dims = rng.choice([1, 2, 3])
    cell_out, cell_in = rng.choice([1, 2, 6, 8]), rng.choice([1, 3, 4])
    shapes = []
    for i in range(rng.randint(1, 5)):
        groups = rng.choice([1, 1, 2])
        shapes.append(
            KernelShape(
                cell_out * groups * rng.randint(1, 3),
                cell_in * groups * rng.randint(1, 3),
                tuple(rng.choice([1, 2, 3]) for _ in range(dims)),
                groups,
                f"l{i}",
            )
        )
    budget = rng.choice([1, 1, 2, 3, 4])
    plane = rng.choice([1, 1, 1 / cell_in])
    partition = partition_kernels(shapes, cell_num_ratio=budget, cell_inplane_ratio=plane)
    gcd_in = math.gcd(*(s.in_channels // s.groups for s in shapes))
    assert partition.cell_shape[:2] == (
        math.gcd(*(s.out_channels for s in shapes)),
        max(int(gcd_in * plane), 1),
    )
    numel = math.prod(partition.cell_shape)
    kernels = [s.out_channels * s.in_channels // s.groups * math.prod(s.kernel) for s in shapes]
    assert partition.cells * numel == budget * sum(kernels)
    visited = []
    for kernel, layer, own in zip(kernels, partition.layers, partition.slices, strict=True):
        assert layer.mixtures * numel == kernel
        assert len(own.owners) == layer.mixtures
        assert own.start == (visited[-1] + budget if visited else 0)
        assert all(own.start <= cell < own.stop for cell in own.owners)
        visited += own.owners
    assert visited == list(range(0, partition.cells, budget))
    assert partition.slices[-1].stop == partition.cells


@pytest.mark.parametrize("period", [2, 3, 4, 5, 7, 49])
def test_random_fractions_end_exactly(period):
    """With b = 1 / r and multiples of r * r, one mixture in r owns a cell, every cell once."""
    rng = random.Random(period)
    square = period**2
    counts = [square, *(square * rng.randint(1, 3) for _ in range(3))]
    shapes = [KernelShape(4 * count, 4, (1,)) for count in counts]
    partition = partition_kernels(shapes, cell_num_ratio=1 / period, cell_outplane_ratio=1 / square)
    assert [layer.mixtures for layer in partition.layers] == counts
    assert partition.cells == sum(counts) // period
    taken = [cell for own in partition.slices for cell in own.owners if cell is not None]
    assert taken == list(range(partition.cells))


@pytest.mark.parametrize("ratio", [1.5, 0.3, 0.75, 2 / 3, 2.5, 1.0001, 0.33, 0.333333])
def test_ratio_that_cannot_be_exact_is_refused(ratio):
    with pytest.raises(ValueError, match="1 / integer") as error:
        partition_kernels(STAGE, cell_num_ratio=ratio, name="layer1")
    message = str(error.value)
    assert "warehouse 'layer1'" in message
    assert f"cell_num_ratio {ratio:g}" in message
    for shape in STAGE:
        assert repr(shape.name) in message


def test_mixtures_that_a_fraction_cannot_serve_are_refused():
    """Two layers of nine mixtures take five cells each; half of eighteen is nine."""
    shapes = [KernelShape(8, 8, (3, 3), name=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match="take 10 cells of 9") as error:
        partition_kernels(shapes, cell_num_ratio=0.5, name="stage")
    message = str(error.value)
    for fact in ("'stage'", "'a' 9", "'b' 9", "cell_inplane_ratio", "multiple of 4"):
        assert fact in message
    exact = partition_kernels(
        shapes, cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5
    )
    assert exact.slices[-1].stop == exact.cells == 36


@pytest.mark.parametrize("key", ["cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_ratio_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=f"'w'.*{key} is {value}"):
        partition_kernels(STAGE, name="w", **{key: value})


@pytest.mark.parametrize("key", ["cell_inplane_ratio", "cell_outplane_ratio"])
def test_cells_wider_than_the_layers_are_refused(key):
    with pytest.raises(ValueError, match=rf"'w'.*{key} is 2.*\(0, 1\]"):
        partition_kernels(STAGE, name="w", **{key: 2})


@pytest.mark.parametrize(
    ("key", "axis", "channels"),
    [("cell_inplane_ratio", "input", 64), ("cell_outplane_ratio", "output", 64)],
)
def test_cells_that_do_not_divide_channels_are_refused(key, axis, channels):
    with pytest.raises(ValueError, match=f"'w'.*cells of 48 {axis} channels") as error:
        partition_kernels(STAGE, name="w", **{key: 0.75})
    message = str(error.value)
    for fact in (str(channels), "'conv1'", f"{key} is 0.75", "1 / integer"):
        assert fact in message


def test_unequal_kernels_without_spatial_partition_are_refused():
    with pytest.raises(ValueError, match="unequal size") as error:
        partition_kernels(STAGE, spatial_partition=False, name="layer1")
    for fact in ("'layer1'", "'conv1' 3x3", "'next.downsample' 1x1", "spatial_partition"):
        assert fact in str(error.value)


def test_a_warehouse_without_layers_is_refused():
    with pytest.raises(ValueError, match="'w' has no layers"):
        partition_kernels([], name="w")
