"""Steps that were left out: when each is due again, also in a run that was stopped in between."""

import pytest
import torch

from my.left_out import BLOCK, LeftOut

N = 47
BAD = {3, 9, 10, 28, 30, 44, 46}


def followed(left_out, first, last, fails=()):
    """{steps taken: steps that are due} of a run from `first` to `last` of its N steps, in which BAD are left out."""
    due = {}
    for i in range(first, last):
        left_out.add(i, torch.tensor(i in BAD))
        for late in left_out.due(i + 1, last=i + 1 == N):
            due.setdefault(i + 1, []).append(late)
            if late not in fails:
                left_out.done(late)
    return due


WHOLE = {20: [3, 9], 30: [10], 40: [28], 47: [30, 44, 46]}


def test_steps_are_due_a_block_after_their_own():
    assert followed(LeftOut(), 0, N) == WHOLE
    assert all(n % BLOCK == 0 for n in WHOLE if n != N)


@pytest.mark.parametrize("stop", range(1, N))
def test_a_run_that_was_stopped_tries_them_at_the_same_moments(stop):
    first = LeftOut()
    due = followed(first, 0, stop)
    known = first.all()
    assert known == sorted(i for i in BAD if i < stop and not any(i in steps for steps in due.values()))
    assert due | followed(LeftOut(known), stop, N) == WHOLE
    assert due | followed(first, stop, N) == WHOLE  # to ask for all changes nothing


def test_a_step_stays_due_until_it_is_done():
    assert followed(LeftOut(), 0, N, fails=(9,)) == {20: [3, 9], 30: [9, 10], 40: [9, 28], 47: [9, 30, 44, 46]}


def test_without_such_steps_nothing_is_due():
    left_out = LeftOut()
    for i in range(30):
        left_out.add(i, torch.tensor(False))
        assert not left_out.due(i + 1, last=i == 29)
    assert left_out.all() == []
