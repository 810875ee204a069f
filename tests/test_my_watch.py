"""What a training leaves while it runs: when, and where it stands when something goes wrong."""

import json
import signal
import threading

import pytest
import torch

from my.errors import RunError
from my.run_dir import read_history
from my.signals import ASKING, Stopped, stopping
from my.watch import watched


def heartbeat():
    with open("heartbeat.json") as file:
        return json.load(file)


def shown(row):
    """A judge of rows: it takes all of them."""
    return row, {name: f"{float(value):.2f}" for name, value in row.items()}


def unsaved(step):
    """The state of a training that has none."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_training_from_its_first_step_to_its_last():
    with watched("tiny", 5, 0, unsaved) as watch:
        beats = []
        for step, loss in watch.over((step, 1 / step) for step in range(1, 6)):
            beats.append((watch.heartbeat.step, watch.bar.n))
            if watch.due(step, 2):
                watch.log(step, {"loss": loss}, shown)
        assert beats == [(n, n) for n in range(5)]  # a step counts when the loop has dealt with it
        assert (watch.heartbeat.step, watch.bar.n, watch.bar.postfix) == (5, 5, "loss=0.20")
        assert not heartbeat()["done"]
    assert heartbeat()["done"] and heartbeat()["step"] == 5
    assert read_history("history.json") == [{"step": n, "loss": 1 / n} for n in (2, 4, 5)]  # every second, and the last


def test_a_resumed_training_goes_on():
    with watched("tiny", 4, 0, unsaved) as watch:
        for step, _ in watch.over((step, None) for step in range(1, 5)):
            watch.log(step, {"run": 1}, shown)
    with watched("tiny", 4, 2, unsaved) as watch:
        assert watch.bar.n == 2
        for step, _ in watch.over((step, None) for step in range(3, 5)):
            watch.log(step, {"run": 2}, shown)
    assert [row["run"] for row in read_history("history.json")] == [1, 1, 2, 2]


def test_a_resumed_training_may_begin_with_what_is_left_of_its_last_step():
    with watched("tiny", 4, 2, unsaved) as watch:
        bars = [watch.bar.n for _ in watch.over((step, None) for step in range(2, 5))]
        assert (bars, watch.bar.n, watch.heartbeat.step) == ([2, 2, 3], 4, 4)


def test_an_exception_in_the_loop_is_told():
    with pytest.raises(ValueError, match="broken"), watched("tiny", 4, 0, unsaved) as watch:
        for step, _ in watch.over((step, None) for step in range(1, 5)):
            if step == 3:
                raise ValueError("broken")
    assert heartbeat()["failed"] == "ValueError: broken" and heartbeat()["step"] == 2


def test_a_loop_that_fails_leaves_the_rows_before_it():
    """They wait for the worker, and the end waits for them."""
    go = threading.Event()
    with pytest.raises(KeyboardInterrupt), watched("tiny", 4, 0, unsaved) as watch:
        watch.worker.put(go.wait, 60)
        for step, _ in watch.over((step, None) for step in range(1, 5)):
            watch.log(step, {"loss": 1.5}, shown)
            if step == 3:
                threading.Timer(0.1, go.set).start()
                raise KeyboardInterrupt
    assert [row["step"] for row in read_history("history.json")] == [1, 2, 3]
    assert heartbeat()["stopped"] == "Ctrl-C" and "failed" not in heartbeat()


def test_values_are_those_of_their_step():
    """A row is written later, and the step after it may change a tensor in place."""
    go = threading.Event()
    with watched("tiny", 20, 0, unsaved) as watch:
        watch.worker.put(go.wait, 60)
        loss = torch.zeros(())
        for step, _ in watch.over((step, None) for step in range(1, 21)):
            loss += 0.5
            if watch.due(step, 10):
                watch.log(step, {"loss": loss, "minutes": step}, shown)
                assert read_history("history.json") == []
            if step == 20:
                go.set()
    assert read_history("history.json") == [
        {"step": 10, "loss": 5.0, "minutes": 10},
        {"step": 20, "loss": 10.0, "minutes": 20},
    ]


def test_a_row_may_be_refused_or_left_out():
    def judge(row):
        if row["loss"] == 3:
            raise RunError("loss is 3")
        return (row if row["loss"] == 2 else {}), {}

    with pytest.raises(RunError, match="loss is 3"), watched("tiny", 4, 0, unsaved) as watch:
        for step, _ in watch.over((step, None) for step in range(1, 5)):
            watch.log(step, {"loss": torch.tensor(float(step))}, judge)
    assert read_history("history.json") == [{"step": 2, "loss": 2}]
    assert heartbeat()["failed"] == "RunError: loss is 3" and not heartbeat()["done"]


def test_the_last_beat_is_the_one_that_stays():
    """The worker writes beats; it has none left when the end is written."""
    go = threading.Event()
    with watched("tiny", 3, 0, unsaved) as watch:
        watch.heartbeat.every_s = 0
        watch.worker.put(go.wait, 60)
        for step, _ in watch.over((step, None) for step in range(1, 4)):
            if step == 3:
                assert heartbeat()["step"] == 0  # nobody waited for the first two
                go.set()
    assert heartbeat()["done"] and heartbeat()["step"] == 3


def test_an_estimate_of_the_length_can_change():
    with watched("tiny", 100, 0, unsaved) as watch:
        for step, _ in watch.over((step, None) for step in range(1, 3)):
            watch.expect(step + 1)
        assert watch.bar.total == 3 and watch.due(3, 10)
    assert heartbeat()["n_steps"] == 3


@pytest.fixture
def plans_of_nobody():
    """Signals do what they do by themselves, whoever has started the tests."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in ASKING}
    yield
    for n, handler in before.items():
        signal.signal(n, handler)


def test_a_signal_as_the_last_step_ends_is_heard(plans_of_nobody):
    """It comes after the last look of the loop. The last step is saved once."""
    saved = []

    def steps():
        yield from ((step, None) for step in range(1, 4))
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as caught, stopping(print, str), watched("tiny", 3, 0, saved.append) as watch:
        for step, _ in watch.over(steps()):
            if watch.due(step, 2):
                watch.checkpoint(step)
    assert saved == [2, 3] and caught.value.saved == "the state after step 3 is saved"
    assert read_history("history.json") == [{"step": 3, "stopped": "SIGTERM"}] and heartbeat()["stopped"] == "SIGTERM"


def test_a_job_that_failed_does_not_keep_a_whole_state_from_being_saved():
    saved = []

    def fail():
        raise OSError("no picture")

    with pytest.raises(RunError, match="out of memory"), watched("tiny", 9, 0, saved.append) as watch:
        watch.worker.put(fail)
        with pytest.raises(OSError, match="no picture"):
            watch.checkpoint(3)
        for _ in range(2):  # it is saved once
            watch.rescue(3)
        assert heartbeat()["saved"] == 3
        raise RunError("out of memory")
    assert saved == [3]


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_ends_a_training_once_the_running_step_is_done(number, plans_of_nobody):
    """The state is saved after what the worker has to do, and the last beat and the last row say what happened."""
    saved = []
    with pytest.raises(Stopped) as caught, stopping(print, str), watched("tiny", 9, 0, saved.append) as watch:
        for step, _ in watch.over((step, None) for step in range(1, 10)):
            watch.log(step, {"loss": 1}, shown)
            if step == 3:
                signal.raise_signal(number)
                watch.worker.put(saved.append, "the worker's")
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert saved == ["the worker's", 3] and caught.value.status == 128 + number
    assert caught.value.saved == "the state after step 3 is saved"
    assert read_history("history.json")[-2:] == [{"step": 3, "loss": 1}, {"step": 3, "stopped": name}]
    assert heartbeat()["stopped"] == name and heartbeat()["step"] == 3 and not heartbeat()["done"]
