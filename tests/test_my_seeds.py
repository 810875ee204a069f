"""Draws depend on (seed, step, stream) and on nothing else."""

import math

import numpy as np
import pytest
import torch

from my.seeds import mix, normal, numpy_rng, philox, torch_noise, torch_rng

TRIPLES = [(0, 0, "camera"), (1, 0, "camera"), (0, 1, "camera"), (0, 0, "noise"), (10, 1, "noise"),
           (1, 10, "noise"), (-1, 0, "camera")]  # fmt: skip


def draws(triple):
    return (tuple(numpy_rng(*triple).standard_normal(4)), tuple(torch.randn(4, generator=torch_rng(*triple)).tolist()))


def test_one_triple_always_draws_the_same_and_any_other_differently():
    first = [draws(triple) for triple in TRIPLES]
    assert first == [draws(triple) for triple in TRIPLES]
    assert len({numpy for numpy, _ in first}) == len({torch for _, torch in first}) == len(TRIPLES)


def test_pinned_values():
    assert mix(0, 7, "noise") == 0x820AED9F837CC3C9
    assert numpy_rng(0, 7, "noise").integers(0, 1000, 4).tolist() == [548, 346, 119, 259]
    drawn = torch.randint(0, 1000, (4,), generator=torch_rng(0, 7, "noise"))
    assert drawn.tolist() == [29, 936, 833, 378]


def test_numpy_integers_are_integers_and_floats_are_refused():
    assert mix(np.int64(3), 4, "a") == mix(3, 4, "a")
    with pytest.raises(TypeError):
        mix(0.5, 0, "a")


def test_global_state_is_untouched_and_the_generator_is_on_the_cpu():
    before = torch.random.get_rng_state(), str(np.random.get_state())
    draws(TRIPLES[0])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]
    assert torch_rng(*TRIPLES[0]).device.type == "cpu"


def test_noise_of_an_item_does_not_depend_on_the_others():
    x = torch.empty(3, 2, 4, dtype=torch.float64)
    three, one = torch_noise(5, [0, 1, 2], "image"), torch_noise(5, [2], "image")
    for _ in range(2):  # and goes on
        batch = three(x)
        assert batch.shape == x.shape and batch.dtype == x.dtype
        assert torch.equal(batch[2:], one(x[2:])) and not torch.equal(batch[0], batch[1])
    assert not torch.equal(one(x[2:]), one(x[2:]))
    assert torch.equal(torch_noise(5, [2], "image")(x[2:]), normal((2, 4), 5, torch.tensor([2]), "image", 0, x.dtype))


def words(*hexadecimal):
    return [int(word, 16) for word in hexadecimal]


@pytest.mark.parametrize(
    "counter, key, want",
    [
        (["0"] * 4, ["0"] * 2, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
        (["ffffffff"] * 4, ["ffffffff"] * 2, ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
        (
            ["243f6a88", "85a308d3", "13198a2e", "03707344"],
            ["a4093822", "299f31d0"],
            ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, want):
    """Those that the authors of Random123 give as known answers."""
    low, high = words(*key)
    found = philox([torch.tensor([word]) for word in words(*counter)], high << 32 | low)
    assert [word.item() for word in found] == words(*want)


def test_normal_by_hand():
    """The first four numbers of an item, by Box and Muller from the four words of the counter (0, draw, item, 0)."""
    (got,) = normal((4,), 3, torch.tensor([7]), "noise", draw=2, dtype=torch.float64)
    w = [word.item() for word in philox([torch.tensor([x]) for x in (0, 2, 7, 0)], mix(3, 0, "noise"))]
    u = [(x + 0.5) / 2**32 for x in w]
    want = []
    for first, second in (u[:2], u[2:]):
        radius, angle = math.sqrt(-2 * math.log(first)), 2 * math.pi * second
        want += [radius * math.cos(angle), radius * math.sin(angle)]
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_normal_is_normal_and_independent():
    """Mean, variance, skewness and kurtosis of 400,000 numbers; and the correlation of two items."""
    z = normal((50, 2000), 0, torch.arange(4), "noise", dtype=torch.float64)
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 5 * math.sqrt(variance / n)
    correlation = torch.corrcoef(z.flatten(1)) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(n / 4)


def test_normal_of_a_step_does_not_depend_on_the_block_it_is_made_in():
    block = normal((3, 5), 1, torch.arange(4), "noise")
    for step in range(4):
        assert torch.equal(normal((3, 5), 1, torch.tensor([step]), "noise")[0], block[step])
    assert len({x.item() for x in block.flatten()}) == block.numel()
    others = normal((3, 5), 2, torch.arange(4), "noise"), normal((3, 5), 1, torch.arange(4), "other")
    assert not any(torch.equal(block, other) for other in others)
    far = normal((3, 5), 1, torch.tensor([2**32]), "noise")  # beyond a word
    assert not torch.equal(far[0], block[0])
