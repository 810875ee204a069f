"""Memory goes round, and never while something still refers to it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from voxnerf.field import VoxRF
from voxnerf.fused import kernels
from voxnerf.fused.launch import volume
from voxnerf.fused.march import sweep
from voxnerf.fused.memory import GRAIN, Recycler, Workspaces
from voxnerf.render import render_rays

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def test_memory_comes_back_when_nothing_refers_to_it():
    memory = Recycler()
    first = memory.empty(10).fill_(1)
    where = first.data_ptr()
    alias = first.detach()[2:4]  # shares the storage, as a gradient that autograd keeps
    del first
    second = memory.empty(10).fill_(2)
    assert second.data_ptr() != where and alias.tolist() == [1, 1]
    del alias
    assert memory.empty(GRAIN).data_ptr() == where


def test_a_block_far_too_large_is_not_taken():
    memory = Recycler()
    large = memory.empty(10 * GRAIN)
    where = large.data_ptr()
    del large
    assert memory.empty(5).data_ptr() != where and len(memory.free) == 1


def test_gradients_of_two_steps_do_not_share_memory():
    field = VoxRF([[-1] * 3, [1] * 3], 8, generator=torch.Generator().manual_seed(0))
    o, d = torch.tensor([[0.1, 0.2, -3.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    kept = []
    for factor in (1.0, 2.0):
        field.zero_grad(set_to_none=True)
        (factor * render_rays(field, o, d, renderer="fused").color.sum()).backward()
        kept.append(field.color.grad)
    torch.testing.assert_close(kept[1], 2 * kept[0])
    assert kept[0].abs().max() > 0


def test_workspaces_go_round():
    spaces = Workspaces()
    zeros = spaces.take("a", 9, CPU)
    assert zeros.tolist() == [0] * 9
    where = zeros.data_ptr()
    spaces.give_back("a", zeros)
    assert spaces.take("a", 9, CPU).data_ptr() == where and not spaces.free


def test_workspaces_of_another_layout_are_let_go():
    spaces = Workspaces()
    early, late = (spaces.take("a", 9, CPU) for _ in range(2))
    spaces.give_back("a", early)
    assert len(spaces.take("b", 5, CPU)) == 5 and not spaces.free
    spaces.give_back("a", late)
    assert not spaces.free


def test_importing_does_not_start_warp_and_the_first_march_is_quiet():
    code = """
import importlib, pkgutil, sys
import voxnerf
for module in pkgutil.walk_packages(voxnerf.__path__, "voxnerf."):
    importlib.import_module(module.name)
import torch
from warp._src import context
assert context.runtime is None, "importing has started Warp"
from voxnerf.field import VoxRF
from voxnerf.render import render_rays
field = VoxRF([[-1] * 3, [1] * 3], 8)
render_rays(field, torch.tensor([[0.1, 0.2, -3.0]]), torch.tensor([[0.0, 0.0, 1.0]]), renderer="fused")
assert context.runtime is not None
print(len(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.strip().isdigit(), done.stderr


def nothing(field):
    pass


def weigh(field):
    torch.nn.utils.clip_grad_norm_(field.parameters(), 1e-3)


def decay(field):
    for p in field.parameters():
        p.grad += 0.1 * p


def decay_unseen(field):
    for p in field.parameters():
        p.grad.data.add_(p.data, alpha=0.1)


def write_a_voxel(field):
    field.density.grad[0, 0, 20, 20, 3] = 5.0
    field.color.grad[0, 1, 20, 20, 3] = 5.0


def write_a_float_unseen(field):
    for p in (field.density, field.color):
        p.grad.numpy()[0, 0, 12, 1, 22] = 5.0  # PyTorch does not count it, and no kernel did it


def write_a_float_through_dlpack(field):
    np.from_dlpack(field.density.grad.detach())[0, 0, 12, 1, 22] = 5.0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    "change", [nothing, weigh, decay, decay_unseen, write_a_voxel, write_a_float_unseen, write_a_float_through_dlpack]
)
def test_a_gradient_does_not_depend_on_the_one_before_nor_on_what_became_of_it(change, views, threads, monkeypatch):
    monkeypatch.setattr("voxnerf.fused.launch.MIN_ITEMS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_gradient_after(change, views)
    finally:
        torch.set_num_threads(before)


def check_gradient_after(change, views):
    """Take gradients of one view again and again, with those of another in between, which `change` writes to."""
    field = VoxRF([[-1] * 3, [1] * 3], 24, density_shift=-20.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # two small balls in empty space
        field.density[..., 4:7, 5:8, 6:9] = field.density[..., 15:18, 15:18, 15:18] = 40.0

    def gradients(where, views=1):
        field.zero_grad(set_to_none=True)
        d = torch.tensor([[0.0, 0.0, 1.0]]).expand_as(where)
        for _ in range(views):
            render_rays(field, where, d, renderer="fused").color.sum().backward()
        return [p.grad.clone() for p in (field.density, field.color)]

    here = torch.tensor([[-0.4, -0.5, -3.0], [-0.42, -0.5, -3.0]])  # two rays, since a thread takes one at least
    there = torch.tensor([[0.4, 0.35, -3.0], [0.35, 0.4, -3.0]])
    want = gradients(there)
    for _ in range(3):
        first = gradients(here, views)
        assert all(0 < (x != 0).float().mean() < 0.1 for x in first)
        change(field)
        for got, value in zip(gradients(there), want):
            assert torch.equal(got, value)


@pytest.mark.parametrize("run", ["move", "dot"])
def test_a_sweep_reaches_all_of_what_is_touched_and_nothing_else(run):
    grid = volume((1, 4, 21, 10, 13))
    n = 13 * 10 * 21
    for flag in (kernels.FILLED, kernels.EMPTY):
        touched = torch.full((grid.blocks[0] * grid.blocks[1] * grid.blocks[2],), flag, dtype=torch.uint8)
        a, b = ((torch.rand(n), torch.rand(n, 4)) for _ in range(2))
        a_before, b_before = (tuple(x.clone() for x in pair) for pair in (a, b))
        done = sweep(getattr(kernels, run), grid, touched, a, b).sum()
        for x, y, x_before, y_before in zip(a, b, a_before, b_before):
            if flag == kernels.FILLED:
                x_before = {"move": x_before + y_before, "dot": x_before}[run]
                y_before = 0 * y_before if run == "move" else y_before
            assert torch.equal(x, x_before) and torch.equal(y, y_before)
        want = sum((x * y).sum() for x, y in zip(a, b)) if run == "dot" and flag == kernels.FILLED else torch.zeros(())
        torch.testing.assert_close(done, want)
