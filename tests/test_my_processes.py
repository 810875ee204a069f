"""Several processes of one run: what torchrun says, who does what, sums with the same bits, and how all of it ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import run_nerf
from my import errors, processes
from my.errors import RunError, UserError, note, run_main
from my.processes import Lost, Processes, of_torchrun
from my.signals import Stopped

ROOT = Path(run_nerf.__file__).parent
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_what_torchrun_says():
    one, other = of_torchrun({}), of_torchrun({**TORCHRUN, "OMP_NUM_THREADS": "1"})
    assert (one.rank, one.n, one.local_rank, one.n_local, one.first) == (0, 1, 0, 1, True)
    assert (other.rank, other.n, other.local_rank, other.n_local, other.first) == (3, 4, 1, 2, False)


@pytest.mark.parametrize("n_items, n, parts", [(4, 2, [2, 2]), (5, 2, [2, 3]), (8, 3, [2, 3, 3]), (3, 3, [1, 1, 1])])
def test_parts_make_the_whole(n_items, n, parts):
    shares = [list(Processes(rank, n).part(n_items)) for rank in range(n)]
    assert list(map(len, shares)) == parts and sum(shares, []) == list(range(n_items))


def test_a_process_without_an_item_is_refused():
    Processes(1, 2).refuse_fewer("--batch_views", 2)
    with pytest.raises(UserError, match="--batch_views 1 with 2 processes: .* give --batch_views 2 or"):
        Processes(1, 2).refuse_fewer("--batch_views", 1)


def test_each_process_takes_its_own_gpu(monkeypatch):
    second = Processes(5, 8, 1, 2)
    assert second.device("cpu") == "cpu" and Processes().device("cuda:3") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert second.device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert second.device("auto") == second.device("cuda") == "cuda:1"
    with pytest.raises(UserError, match="--device cuda:0 with 8 processes: each takes a GPU of its own"):
        second.device("cuda:0")
    for local_rank in range(3):  # the first too, since it says what all would say
        with pytest.raises(UserError, match="--nproc_per_node 3: this machine has 2 GPUs.* start 2 or fewer"):
            Processes(3 + local_rank, 6, local_rank, 3).device("auto")


def test_one_process_needs_nobody():
    alone, x = Processes(), torch.tensor([1.5])
    alone.join(torch.device("cpu"))
    assert alone.summed([x])[0] is x
    alone.leave()


class Endless:
    """An exchange to which nobody answers, and which a signal interrupts."""

    def __init__(self, heed):
        self.heed = heed

    def is_completed(self):
        self.heed.asked = signal.SIGTERM
        return False


def test_a_signal_ends_a_process_at_a_sum(monkeypatch):
    """Where else it comes, what it interrupts is finished before."""
    first = Processes(0, 2)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda *_, **__: Endless(first.heed))
    with pytest.raises(Stopped, match="^SIGTERM$"):
        first.summed([torch.ones(2)])


def test_a_signal_counts_for_more_than_what_it_has_led_to(monkeypatch):
    """It goes to all processes, and another one may end of it first."""

    class Broken(Endless):
        def wait(self):
            raise RuntimeError("connection closed by peer")

        def is_completed(self):
            return True

    first = Processes(0, 2)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda *_, **__: Broken(first.heed))
    with pytest.raises(Lost, match="^another process of this run has ended$"):
        first.summed([torch.ones(2)])
    monkeypatch.setattr(Broken, "wait", told_and_broken)
    with pytest.raises(Stopped, match="^SIGTERM$"):
        first.summed([torch.ones(2)])


def told_and_broken(work):
    work.heed.asked = signal.SIGTERM
    raise RuntimeError("connection closed by peer")


def test_a_process_whose_torchrun_has_ended_is_lost(monkeypatch):
    """A SIGKILL of torchrun reaches none of its processes."""

    class Unanswered:
        def is_completed(self):
            monkeypatch.setattr(os, "getppid", lambda: 1)  # who takes over processes that have lost their parent
            return False

    monkeypatch.setattr(os, "getppid", lambda: processes.LAUNCHER)
    monkeypatch.setattr(processes, "TIMEOUT_S", 1.0)
    first = Processes(0, 2)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda *_, **__: Unanswered())
    with pytest.raises(Lost, match="^torchrun, which started the processes of this run, has ended"):
        first.summed([torch.ones(2)])


# ---------------------------------------------------------------- who speaks


@pytest.mark.parametrize("local_rank, lines", [("0", 1), ("1", 0)])
@pytest.mark.parametrize("error", [UserError("no such option"), Lost("another has ended"), KeyboardInterrupt()])
def test_what_all_would_say_is_said_once(monkeypatch, capsys, error, local_rank, lines):
    def main(_):
        print("the configuration")
        note("something")
        raise error

    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as ended:
        run_main(main, [], several=True)
    out, err = capsys.readouterr()
    assert ended.value.code != 0 and (out.count("\n"), err.count("\n")) == (lines, 2 * lines)
    waits = lines == 0 and not isinstance(
        error, KeyboardInterrupt
    )  # else torchrun could end the first before it speaks
    assert waited == [errors.HEARD_S] * waits


def test_one_that_waits_for_the_first_to_speak_is_told_to_end(monkeypatch, capsys):
    """Torchrun does so once the first has ended."""

    def main(_):
        raise UserError("no such option")

    monkeypatch.setattr(errors.time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        run_main(main, [], several=True)
    assert ended.value.code == 2 and capsys.readouterr().err == ""


def test_what_one_alone_knows_it_says(monkeypatch, capsys):
    def main(_):
        raise RunError("out of memory")

    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run_main(main, [], several=True)
    assert capsys.readouterr().err.endswith(": out of memory\n")


def test_other_commands_run_in_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        run_main(run_nerf.main, ["--scene", "nosuch"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("several processes, and this command is one; start it with python\n")


# ---------------------------------------------------------------- two processes

TWO = """
import os, signal, sys, time
import torch
from safetensors.torch import save_file
from my import errors, processes
from my.errors import run_main
from my.processes import of_torchrun
from my.signals import gently

def main(argv):
    here = of_torchrun()
    here.join(torch.device("cpu"))
    x = torch.arange(6.0).view(2, 3) / 7 * (here.rank + 1)
    a, b = here.summed([x.T, torch.tensor(0.1 * 3 ** here.rank)])
    save_file({"a": a.contiguous(), "b": b}, f"sum_{here.rank}.safetensors")
    if argv == ["killed"] and here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if argv == ["late"]:
        processes.TIMEOUT_S = 0.5
        if here.rank == 1:
            time.sleep(60)
    if argv != ["whole"]:
        with gently() as here.heed:
            here.heed.waits = here.first
            here.summed([x])
    here.leave()

run_main(main, several=True)
"""


def two(folder, how):
    """Run TWO as two processes, which torchrun starts; return (exit status, what they printed)."""
    (folder / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py", how]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def test_sums_over_processes(tmp_path):
    status, err = two(tmp_path, "whole")
    assert status == 0, err
    sums, others = (load_file(tmp_path / f"sum_{rank}.safetensors") for rank in range(2))
    x = torch.arange(6.0).view(2, 3) / 7
    assert torch.equal(sums["a"], x.T + 2 * x.T) and sums["b"].item() == pytest.approx(0.4)
    assert all(torch.equal(sums[name], others[name]) for name in sums)


@pytest.mark.parametrize(
    "how, words",
    [("killed", ["has ended", "SIGTERM"]), ("late", ["has not answered for 0.5 s", "has ended", "SIGTERM"])],
)
def test_a_process_that_is_lost_ends_the_others_in_one_line(tmp_path, how, words):
    status, err = two(tmp_path, how)
    said = [line for line in err.splitlines() if "two.py: " in line]
    assert status != 0 and len(said) == 1, err
    assert any(word in said[0] for word in words)


def test_sums_keep_their_shapes_and_number_formats(monkeypatch):
    """Though they travel in one row, in the widest format."""
    double = Processes(0, 2)
    monkeypatch.setattr(double, "_gathered", lambda flat: torch.stack([flat, flat]))
    a, b = double.summed([torch.ones(2, 3), torch.tensor(0.1, dtype=torch.float64)])
    assert (a.dtype, a.tolist()) == (torch.float32, [[2.0] * 3] * 2)
    assert (b.dtype, b.shape, b.item()) == (torch.float64, (), 0.2)


def test_processes_on_gpus_meet_through_nccl_each_on_its_own(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: done.append(backend))
    for name in ("cuda:1", "cpu"):
        Processes(1, 2, 1, 2).join(torch.device(name))
    assert done == [torch.device("cuda:1"), "nccl", "gloo"]


def test_processes_that_do_not_find_one_another(monkeypatch):
    def fail(*_, **__):
        raise ValueError("no address")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(RunError, match="the 2 processes of this run do not find one another: no address"):
        Processes(0, 2).join(torch.device("cpu"))


def test_the_limit_is_stated():
    assert processes.TIMEOUT_S == 600


JOINING = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import torch
from my.errors import run_main
from my.processes import Processes
def main(argv):
    print("joining", flush=True)
    Processes(1, 2).join(torch.device("cpu"))
run_main(main, [], several=True)
"""


@pytest.fixture
def second_of_two():
    """The environment of the second of two processes, the first of which does not come."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    return {**os.environ, **where}


def test_one_that_waits_for_the_others_to_come_is_ended_by_a_signal(second_of_two):
    """Though the library waits in C, where no handler of Python is called."""
    command = [sys.executable, "-c", JOINING]
    with subprocess.Popen(command, env=second_of_two, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"joining\n"
        with pytest.raises(subprocess.TimeoutExpired):  # it waits
            child.wait(3)
        child.send_signal(signal.SIGTERM)
        try:
            assert child.wait(20) == -signal.SIGTERM
        finally:
            child.kill()


def test_one_that_has_never_seen_its_torchrun_ends(second_of_two):
    """It was killed while Python began: what is the parent now, was it always. Its store takes no connection."""
    environ = {**second_of_two, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    child = subprocess.Popen([sys.executable, "-c", JOINING], env=environ, stderr=subprocess.DEVNULL)
    try:
        assert child.wait(100) == -signal.SIGTERM
    finally:
        child.kill()


def test_whether_the_store_of_torchrun_is_gone(second_of_two):
    environ = {**second_of_two, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert processes.store_is_gone(environ) and not processes.store_is_gone(second_of_two)
    with socket.create_server(("127.0.0.1", int(environ["MASTER_PORT"]))):
        assert not processes.store_is_gone(environ)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell a process that its parent has ended")
def test_one_that_waits_for_the_others_to_come_ends_with_torchrun(second_of_two):
    """What it writes to is closed with its end. It would wait for the others for 10 minutes."""
    starter = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", starter, JOINING]
    launcher = subprocess.Popen(command, env=second_of_two, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with launcher:
        assert launcher.stdout.readline() == b"joining\n"
        (pid,) = (child.pid for child in psutil.Process(launcher.pid).children())
        try:
            launcher.kill()
            assert launcher.communicate(timeout=60) == (b"", None)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
