"""Adam whose step a flag leaves out: the bits of PyTorch's where it is True, no change where it is False."""

import math

import pytest
import torch

from voxnerf.adam import Adam
from voxnerf.field import VoxRF
from voxnerf.finite import all_finite
from voxnerf.fused.adam import OccupiedAdam

BETAS = (0.9, 0.99)
SEEN, HIDDEN = (0, 0, 6, 6, 6), (0, 0, 15, 6, 6)


def small_field(masked):
    """16^3 voxels of noise. With a mask, rays see the first 6 layers: they reach 8, the first of blocks."""
    field = VoxRF([[-1] * 3, [1] * 3], 16, c=3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in field.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        if masked:
            mask = torch.zeros_like(field.density)
            mask[:, :, :6] = 1
            field.alpha_mask = mask
    return field


def give_gradients(field, seed=2):
    """Random gradients, none where a mask hides a voxel."""
    g = torch.Generator().manual_seed(seed)
    for p in field.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))
        if p.ndim == 5 and field.alpha_mask is not None:
            p.grad[:, :, 8:] = 0


def state_of(optimizer):
    """All numbers of a field and of its moments."""
    field = optimizer.field
    kept = [s[key].clone() for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return [p.detach().clone() for p in field.parameters()] + kept


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


KINDS = pytest.mark.parametrize("kind, masked", [(Adam, False), (OccupiedAdam, False), (OccupiedAdam, True)])


@pytest.mark.parametrize("kind", [Adam, OccupiedAdam])
def test_it_is_pytorchs_bit_for_bit(kind):
    """Ten steps with rates that fall; the fourth is left out, and counts."""
    mine, theirs = (small_field(masked=False) for _ in range(2))
    optimizer = kind(mine, 0.1, BETAS)
    reference = torch.optim.Adam([{"params": [p]} for p in theirs.parameters()], 0.1, BETAS)
    for k in range(10):
        for field in (mine, theirs):
            give_gradients(field, seed=k)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.1 * 0.9**k
        optimizer.step_where(torch.tensor(k != 3))
        if k != 3:
            reference.step()
        else:
            for state in reference.state.values():
                state["step"] += 1
    assert same(mine.parameters(), theirs.parameters())
    for p, q in zip(mine.parameters(), theirs.parameters()):
        assert {*optimizer.state[p]} == {*reference.state[q]}
        assert all(torch.equal(optimizer.state[p][key], reference.state[q][key]) for key in reference.state[q])


@KINDS
def test_a_step_whose_flag_is_false_changes_nothing(kind, masked):
    """Be it the first, which has no moments yet, or a later one."""
    field = small_field(masked)
    optimizer = kind(field, 0.1, BETAS)
    for _ in range(2):
        for p in field.parameters():
            p.grad = torch.full_like(p, math.nan)
        before = state_of(optimizer)
        optimizer.step_where(torch.tensor(False))
        assert same(before, state_of(optimizer)[: len(before)])
        give_gradients(field)
        optimizer.step_where(torch.tensor(True))
        assert not any(torch.equal(a, b) for a, b in zip(before, state_of(optimizer)))
        assert all(x.isfinite().all() for x in state_of(optimizer))


@KINDS
@pytest.mark.parametrize("value, finite", [(math.nan, False), (-math.inf, False), (1e20, False), (1e18, True)])
def test_each_gradient_and_the_loss_are_looked_at(kind, masked, value, finite):
    """The square of 1e20 is too large for float32, that of 1e18 is not."""
    field = small_field(masked)
    optimizer, loss = kind(field, 0.1, BETAS), torch.tensor(1.0)
    for name, p in field.named_parameters():
        give_gradients(field)
        assert optimizer.finite(loss).item() is True
        p.grad[SEEN if p.ndim == 5 else ()] = value
        assert optimizer.finite(loss).item() is finite, name
    give_gradients(field)
    assert optimizer.finite(torch.tensor(value)).item() is finite


def test_a_number_in_voxels_that_no_ray_sees_reaches_nothing():
    """There no gradient is looked at, since none is used."""
    field = small_field(masked=True)
    give_gradients(field)
    field.density.grad[HIDDEN] = math.nan
    optimizer, before = OccupiedAdam(field, 0.1, BETAS), field.density.detach().clone()
    optimizer.step_where(optimizer.finite(torch.tensor(1.0)))
    after = field.density.detach()
    assert torch.equal(after[:, :, 8:], before[:, :, 8:]) and not torch.equal(after[:, :, :8], before[:, :, :8])
    assert after.isfinite().all()


def test_the_flag_by_hand():
    """sqrt(3^2 + 4^2) = 5 is finite; infinities of both signs must not cancel."""
    one, inf = torch.tensor(1.0), torch.tensor(math.inf)
    gradients = [torch.tensor([3.0, 4.0]), torch.zeros(2, 2)]
    assert all_finite([one], gradients) and not all_finite([one, inf, -inf], gradients)
    assert not all_finite([one], [*gradients, torch.tensor([math.inf, -math.inf])])


def test_a_step_that_ends_half_way_leaves_no_whole_state(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    field = small_field(masked=False)
    give_gradients(field)
    optimizer = Adam(field, 0.1, BETAS)
    optimizer.step_where(torch.tensor(True))
    assert optimizer.whole
    monkeypatch.setattr(Adam, "update", full)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step_where(torch.tensor(True))
    assert not optimizer.whole
