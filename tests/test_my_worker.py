"""The thread that does jobs in the background: their order, their errors, their end."""

import threading

import pytest
import torch

from my.worker import Worker


class Gate:
    """Holds the worker until it is opened, so that a test decides what waits."""

    def __init__(self, worker):
        self.reached, self.open = threading.Event(), threading.Event()
        worker.put(self.hold)
        assert self.reached.wait(60)

    def hold(self):
        self.reached.set()
        assert self.open.wait(60)


def fail(error):
    raise error


def test_jobs_are_done_in_order_and_nobody_waits_for_them():
    done = []
    with Worker() as worker:
        gate = Gate(worker)
        for number in range(10):
            worker.put(done.append, number)
        assert done == []  # and here we are, while the first job still runs
        gate.open.set()
        worker.join()
        assert done == list(range(10))
        worker.put(done.append, "last")
    assert done[-1] == "last"  # the end of the block waits too


def test_a_full_queue_makes_the_giver_wait():
    done = []
    with Worker(most=2) as worker:
        gate = Gate(worker)
        worker.put(done.append, 1)
        giver = threading.Thread(target=worker.put, args=(done.append, 2))
        giver.start()
        giver.join(0.2)
        assert giver.is_alive() and len(worker.given) == 2 and done == []
        gate.open.set()
        giver.join(60)
        assert not giver.is_alive()
    assert done == [1, 2]


def test_an_error_reaches_the_giver_and_ends_the_work():
    """At the next job, at `join`, and at the end of the block."""
    done = []
    with pytest.raises(OSError, match="the disk is full") as at_the_end, Worker() as worker:
        gate = Gate(worker)
        worker.put(fail, OSError(28, "the disk is full", "a.png"))
        worker.put(done.append, "later")
        last = worker.given[-1]
        gate.open.set()
        last.result(60)
        with pytest.raises(OSError, match="the disk is full"):
            worker.put(done.append, "still later")
        with pytest.raises(OSError, match="the disk is full"):
            worker.join()
    assert at_the_end.value.filename == "a.png" and done == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_fails_keeps_its_own_error_and_leaves_no_job(error):
    done = []
    with pytest.raises(error), Worker() as worker:
        worker.put(done.append, 1)
        worker.put(fail, OSError("hidden"))
        raise error
    assert done == [1] and not any(thread.name.startswith("worker") for thread in threading.enumerate())


def test_jobs_take_no_threads_from_the_loop():
    """One OpenMP thread for jobs, and as many as before for the thread that gives them."""
    own, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with Worker() as worker:
            worker.put(lambda: seen.append(torch.get_num_threads()))
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(own)
