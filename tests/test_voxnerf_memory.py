"""Memory goes round, and never while something still refers to it."""

import pytest
import torch

from voxnerf.memory import GRAIN, Recycler, Zeros

CPU = torch.device("cpu")
FLAGS = torch.tensor([3, 4])


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


def given_back(write, touched):
    """Return the zeros taken after others of the same memory came back, and the flags that were cleared."""
    zeros, cleared = Zeros(keep=2), []

    def clear(tensor, flags):
        cleared.append(flags.tolist())
        tensor[flags] = 0

    tensor, loan = zeros.take("layout", 5000, clear, CPU)
    assert not tensor.any()
    where, loan.touched = tensor.data_ptr(), touched
    write(tensor)
    del tensor
    tensor, _ = zeros.take("layout", 5000, clear, CPU)
    assert tensor.data_ptr() == where
    return tensor, cleared


def test_zeros_are_cleared_where_they_were_touched():
    def write(tensor):  # as a kernel, which PyTorch does not see
        tensor.numpy()[1:3] = 7
        tensor.numpy()[3:5] = 8

    tensor, cleared = given_back(write, FLAGS)
    assert tensor.nonzero()[:, 0].tolist() == [1, 2]  # nobody said so
    assert cleared == [[3, 4]]


@pytest.mark.parametrize("touched", [FLAGS, False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor[1:3].fill_(7),
        lambda tensor: tensor.view(50, 100).T.detach()[0].add_(1),
        lambda tensor: torch._foreach_add_([tensor], 1),
        lambda tensor: tensor.data.add_(1),
    ],
)
def test_zeros_are_zeros_whoever_wrote_to_them(write, touched):
    tensor, _ = given_back(write, touched)
    assert not tensor.any()


def test_zeros_of_another_layout_are_new_ones():
    zeros = Zeros(keep=2)
    tensor, loan = zeros.take("a", 9, None, CPU)
    loan.touched = FLAGS
    del tensor
    assert len(zeros.free) == 1
    tensor, _ = zeros.take("b", 9, None, CPU)
    assert not tensor.any() and not zeros.free


def test_no_more_zeros_are_kept_than_asked():
    zeros = Zeros(keep=2)
    several = [zeros.take("a", 9, None, CPU)[0] for _ in range(4)]
    several.clear()
    assert len(zeros.free) == 2


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


@pytest.mark.parametrize("change", [nothing, weigh, decay, decay_unseen, write_a_voxel])
@pytest.mark.parametrize("views", [1, 2])
def test_a_gradient_does_not_depend_on_the_one_before_nor_on_what_became_of_it(change, views):
    from voxnerf.field import VoxRF
    from voxnerf.render import render_rays

    field = VoxRF([[-1] * 3, [1] * 3], 24, density_shift=-20.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # two small balls in empty space
        field.density[..., 4:7, 5:8, 6:9] = field.density[..., 15:18, 15:18, 15:18] = 40.0

    def gradients(where, views=1):
        field.zero_grad(set_to_none=True)
        d = torch.tensor([[0.0, 0.0, 1.0]])
        for _ in range(views):
            sum(render_rays(field, o[None], d, renderer="fused").color.sum() for o in where).backward()
        return [p.grad.clone() for p in (field.density, field.color)]

    here, there = torch.tensor([[-0.4, -0.5, -3.0]]), torch.tensor([[0.4, 0.35, -3.0], [0.35, 0.4, -3.0]])
    want = gradients(there)
    for _ in range(3):
        first = gradients(here, views)
        assert all(0 < (x != 0).float().mean() < 0.1 for x in first)
        change(field)
        for got, value in zip(gradients(there), want):
            assert torch.equal(got, value)


@pytest.mark.parametrize("run", ["clear", "move", "dot"])
def test_a_sweep_reaches_all_of_what_is_touched_and_nothing_else(run):
    from voxnerf import fused, kernels
    from voxnerf.field import make_field

    volume = fused.volume_of(make_field("V_SD", [[-1] * 3, [1] * 3], (13, 10, 21), 4))
    n = 13 * 10 * 21
    for flag in (kernels.FILLED, kernels.EMPTY):
        touched = torch.full((volume.blocks[0] * volume.blocks[1] * volume.blocks[2],), flag, dtype=torch.uint8)
        a, b = ((torch.rand(n), torch.rand(n, 4)) for _ in range(2))
        a_before, b_before = (tuple(x.clone() for x in pair) for pair in (a, b))
        done = fused.sweep(getattr(kernels, run), volume, touched, a, b).sum()
        for x, y, x_before, y_before in zip(a, b, a_before, b_before):
            if flag == kernels.FILLED:
                x_before = {"clear": 0 * x_before, "move": x_before + y_before, "dot": x_before}[run]
                y_before = 0 * y_before if run == "move" else y_before
            assert torch.equal(x, x_before) and torch.equal(y, y_before)
        want = sum((x * y).sum() for x, y in zip(a, b)) if run == "dot" and flag == kernels.FILLED else torch.zeros(())
        torch.testing.assert_close(done, want)
