"""Memory goes round, and never while something still refers to it."""

import torch

from voxnerf.memory import GRAIN, Recycler


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
    from voxnerf.field import VoxRF
    from voxnerf.render import render_rays

    field = VoxRF([[-1] * 3, [1] * 3], 8, generator=torch.Generator().manual_seed(0))
    o, d = torch.tensor([[0.1, 0.2, -3.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    kept = []
    for factor in (1.0, 2.0):
        field.zero_grad(set_to_none=True)
        (factor * render_rays(field, o, d, renderer="fused").color.sum()).backward()
        kept.append(field.color.grad)
    torch.testing.assert_close(kept[1], 2 * kept[0])
    assert kept[0].abs().max() > 0
