"""What a checkpoint holds of a field and its optimizer, and what is refused."""

import pytest
import torch

from my import checkpoint
from my.errors import UserError
from voxnerf import state
from voxnerf.field import VoxRF
from voxnerf.render import render_rays

O, D = torch.tensor([[0.1, 0.2, -3.0]]), torch.tensor([[0.0, 0.0, 1.0]])


def after_steps(n, kind):
    """A field and its optimizer after `n` steps."""
    field = VoxRF([[-1] * 3, [1] * 3], 4, generator=torch.Generator().manual_seed(0))
    optimizer = kind([{"params": [p]} for p in field.parameters()], 0.1)
    for _ in range(n):
        optimizer.zero_grad()
        render_rays(field, O, D, renderer="reference").color.sum().backward()
        optimizer.step()
    return field, optimizer


KINDS = pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adamax])


@KINDS
@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_saved_is_restored(tmp_path, kind, steps):
    field, optimizer = after_steps(steps, kind)
    state.save(tmp_path, steps, field, optimizer, {"note": 3})
    tensors, meta = checkpoint.load(checkpoint.latest(tmp_path))
    assert (meta["step"], meta["note"]) == (steps, 3)
    assert state.moment_shapes(field, optimizer).keys() == {n for n in tensors if n.startswith("optim/")} or not steps
    other_field, other = after_steps(0, kind)
    state.restore(other_field, other, tensors, steps)
    for a, b in zip(field.state_dict().values(), other_field.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(field.parameters(), other_field.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], other.state[q][key]) for key in optimizer.state[p])


def without(tensors, end):
    return {name: value for name, value in tensors.items() if not name.endswith(end)}


@KINDS
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {n: v for n, v in t.items() if n.startswith("field/")}, "optim/color/exp_avg is absent there"),
        (lambda t: without(t, "optim/color/exp_avg"), "optim/color/exp_avg is absent there"),
        (lambda t: without(t, "optim/d_scale/step"), "optim/d_scale/step is absent there"),
        (lambda t: t | {"optim/density/exp_avg": torch.zeros(2)}, r"optim/density/exp_avg is \(2,\) there"),
        (lambda t: t | {"optim/bg/exp_avg": torch.zeros(2)}, r"optim/bg/exp_avg is \(2,\) there, absent here"),
        (lambda t: without(t, "field/color"), "color is absent there"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(tmp_path, kind, change, words):
    field, optimizer = after_steps(2, kind)
    state.save(tmp_path, 2, field, optimizer)
    tensors, _ = checkpoint.load(checkpoint.latest(tmp_path))
    other_field, other = after_steps(0, kind)
    before = {name: value.clone() for name, value in other_field.state_dict().items()}
    with pytest.raises(UserError, match=f"does not fit this model.*{words}") as caught:
        state.restore(other_field, other, change(tensors), 2)
    assert "\n" not in str(caught.value)
    assert not other.state and all(torch.equal(before[n], v) for n, v in other_field.state_dict().items())
