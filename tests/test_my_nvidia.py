"""What the driver's tool says, by tools that say all sorts of things, and why PyTorch does not see a GPU."""

import sys

import pytest
import torch

from my import nvidia, script
from my.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the tools of these tests are shell scripts")
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running."
)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Makes the shell script that is found as the driver's tool."""
    nvidia.ask.cache_clear()

    def install(lines):
        path = tmp_path / nvidia.TOOL
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    yield install
    nvidia.ask.cache_clear()


def say(text, status=0):
    return f"cat <<'END'\n{text}\nEND\nexit {status}"


@pytest.mark.parametrize(
    "lines, names, driver, failure",
    [
        (say("NVIDIA GeForce RTX 4090, 560.94"), ("NVIDIA GeForce RTX 4090",), "560.94", ""),
        (say("H100, PCIe, 580.65.06\nH100, SXM, 580.65.06"), ("H100, PCIe", "H100, SXM"), "580.65.06", ""),
        (say(NO_DRIVER, 9), (), "", f"nvidia-smi names no GPU: {NO_DRIVER}"),
        ("echo 'cannot open libnvidia-ml.so' >&2; exit 12", (), "", "names no GPU: cannot open libnvidia-ml.so"),
        ("exit 3", (), "", "names no GPU: status 3"),
        (say("No devices were found"), (), "", "names no GPU: No devices were found"),
        (say("some, words\nand more"), (), "", "names no GPU: some, words"),
        ("printf '\\377\\376\\000, x\\n'", (), "", "names no GPU: "),
        (say("A GPU, 560.94", 1), (), "", "names no GPU: A GPU, 560.94"),
        (say("A \x1b[31m GPU, 560.94"), ("A \\x1b[31m GPU",), "560.94", ""),
    ],
)
def test_answers(lines, names, driver, failure, tool):
    tool(lines)
    answer = nvidia.ask()
    assert (answer.names, answer.driver) == (names, driver) and bool(answer.failure) == bool(failure)
    assert failure in answer.failure and "\n" not in answer.failure


def test_it_is_asked_once_with_fields_that_every_driver_knows(tool, tmp_path):
    tool(f"echo \"$@\" >> '{tmp_path}/asked'\necho A GPU, 560.94")
    for _ in range(2):
        assert nvidia.ask().names == ("A GPU",)
    asked = (tmp_path / "asked").read_text()
    assert asked == "--query-gpu=name,driver_version --format=csv,noheader\n"


def test_a_tool_that_hangs(tool, monkeypatch):
    monkeypatch.setattr(nvidia, "TIMEOUT", 0.2)
    tool("exec sleep 60")
    assert nvidia.ask() == nvidia.Answer(failure="nvidia-smi does not answer within 0.2 s")


def test_a_tool_that_is_no_program(tool, tmp_path):
    tool("")
    (tmp_path / nvidia.TOOL).write_text("#!/no/such/shell\n")
    assert nvidia.ask().failure.startswith("nvidia-smi does not start: ")


def test_no_tool(tool, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.ask() == nvidia.Answer() and nvidia.unseen() == ""


def test_series_by_hand():
    found = {driver: nvidia.series(driver) for driver in ("580.65.06", "470", "", "N/A", "5\u0661", "9" * 40)}
    assert list(found.values()) == [580, 470, 0, 0, 0, 0]


# ---------------------------------------------------------------- why PyTorch does not see it

RTX, PAGE = say("NVIDIA GeForce RTX 4090, 560.94"), "https://pytorch.org/get-started/locally/"
CASES = [
    (RTX, None, {}, f"is built without CUDA; {PAGE} has the build for this driver, 560.94"),
    (RTX, "13.0", {}, "driver 560.94 is too old for PyTorch's CUDA 13.0, which needs a driver of series 580 or newer"),
    (say("GTX 1080, 520.61"), "12.8", {}, "driver 520.61 is too old for PyTorch's CUDA 12.8, .* series 525 or newer"),
    (RTX, "12.8", {}, "PyTorch's CUDA 12.8 does not start with driver 560.94$"),
    (RTX, "12.8", {"CUDA_VISIBLE_DEVICES": "7"}, "driver 560.94; CUDA_VISIBLE_DEVICES is '7'$"),
    (RTX, "14.1", {}, "PyTorch's CUDA 14.1 does not start with driver 560.94$"),
    (say(NO_DRIVER, 9), None, {}, "NVIDIA-SMI has failed because it couldn't communicate"),
]


@pytest.fixture(params=CASES, ids=[str(n) for n in range(len(CASES))])
def unseen(request, tool, monkeypatch):
    """A machine whose PyTorch sees no GPU; the words that say why."""
    lines, cuda, env, words = request.param
    tool(lines)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return words


def test_why_pytorch_sees_no_gpu(unseen):
    import re

    assert re.search(unseen, nvidia.unseen()) and "\n" not in nvidia.unseen()


def test_the_device_that_is_asked_for_is_refused_with_the_reason(unseen):
    with pytest.raises(
        UserError, match=f"^--device cuda: not available here: .*{unseen.rstrip('$')}.*; use auto, cpu$"
    ):
        script.pick_device("cuda")
    assert script.pick_device("auto").type == "cpu"


def test_nothing_is_said_where_it_is_seen(tool, monkeypatch):
    tool("touch asked; exit 1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert nvidia.unseen() == ""


def test_another_device_is_refused_without_the_tool(tool, tmp_path):
    tool(f"touch '{tmp_path}/asked'")
    with pytest.raises(UserError, match="^--device tpu9: not available here; use auto, cpu"):
        script.pick_device("tpu9")
    assert not (tmp_path / "asked").exists()
