"""Draws depend on (seed, step, stream) and on nothing else."""

import numpy as np
import pytest
import torch

from my.seeds import mix, numpy_rng, torch_noise, torch_rng

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
    assert torch.equal(
        torch_noise(5, [2], "image")(x[2:])[0],
        torch.randn(2, 4, generator=torch_rng(5, 2, "image"), dtype=torch.float64),
    )
