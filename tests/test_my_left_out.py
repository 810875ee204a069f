"""Steps that were left out, as their numbers were not finite: counted, told once, and the end of a run at worst."""

import math

import pytest
import torch

from my.errors import RunError
from my.left_out import LeftOut


def read(left_out, step, flags, logged=True, **stats):
    """Take in a step per flag, and judge the reading after the last."""
    for flag in flags:
        left_out.add({"masked": torch.tensor(flag)})
    reading = {name: value.numpy() for name, value in left_out.reading({"score": torch.tensor(2.0), **stats}).items()}
    return left_out.judged(step, logged, reading)


def new():
    return LeftOut("an earlier checkpoint stays", "try a smaller --lr")


def test_a_run_without_such_steps(capsys):
    left_out = new()
    assert read(left_out, 10, [0.0] * 10) == ({"score": 2.0}, {"score": "2"})
    assert read(left_out, 15, [False] * 5, logged=False) == ({}, {"score": "2"})
    assert capsys.readouterr().err == ""


def test_steps_without_the_statistic_were_not_left_out():
    left_out = new()
    left_out.add({"score": 1.0})
    assert left_out.reading({"score": 1.0})["masked"].tolist() == [0]


def test_some_are_counted_and_told_once(capsys):
    left_out = new()
    row, shown = read(left_out, 10, [0, 1, 0, 1], score=torch.tensor(math.nan))
    assert row["masked"] == 2 and math.isnan(row["score"]) and shown == {"score": "nan"}
    assert read(left_out, 15, [1, 0], logged=False)[0] == {"score": 2.0, "masked": 1}  # counted where not logged too
    assert read(left_out, 20, [0, 0])[0] == {"score": 2.0}
    err = capsys.readouterr().err
    assert err.count("note:") == 1 and "2 of 4 steps up to step 10 gave numbers that are not finite" in err
    assert "if it goes on, try a smaller --lr" in err


def test_all_of_a_reading_stop_the_run():
    told = "an earlier checkpoint stays; try a smaller --lr"
    left_out = new()
    read(left_out, 10, [1, 0])
    with pytest.raises(RunError, match=f"^step 20: score is not finite; {told}$"):
        read(left_out, 20, [1, 1], score=torch.tensor(math.inf))
    with pytest.raises(RunError, match=f"^step 10: its update is not finite; {told}$"):
        read(new(), 10, [1])


def test_a_number_that_is_not_finite_though_nothing_was_left_out():
    with pytest.raises(RunError, match="^step 10: score is not finite"):
        read(new(), 10, [0, 0], score=torch.tensor(math.nan))
