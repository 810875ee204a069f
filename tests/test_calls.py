"""One call of a network per step: recorded or compiled, it gives the same numbers, or goes on without."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from families.calls import MOST_RECORDINGS, RECORD_AFTER, NetworkCall, NotRecordable, Recorder, recorded
from families.sd.find import MINI


class Net(nn.Module):
    """y = w x + b, with Python around it; a record of how often that ran."""

    def __init__(self):
        super().__init__()
        self.w, self.ran = nn.Parameter(torch.tensor([2.0, 3.0]), requires_grad=False), 0
        self.register_buffer("b", torch.tensor([0.5]))

    def forward(self, x):
        self.ran += 1
        y, _ = torch.stack([x, x], 0).unbind(0)
        y = y.to(torch.float32).div(1) if y.shape[-1] == 2 else y  # both leave it as it is
        return self.w * y[None].mT.mT[0] + self.b


@pytest.fixture
def net():
    return Net()


def called(call, *inputs):
    with torch.no_grad():
        return [call(x).tolist() for x in inputs]


def inputs(n):
    return [torch.tensor([i, -i]) / 1.0 for i in range(n)]


def by_hand(n):
    return [[2 * i + 0.5, -3 * i + 0.5] for i in range(n)]


def test_a_recording_by_hand(net):
    """After RECORD_AFTER calls, and the one that is recorded, the module does not run again."""
    n, call = RECORD_AFTER + 5, NetworkCall(net, net)
    assert called(call, *inputs(n)) == by_hand(n) and net.ran == RECORD_AFTER + 1
    net.w.mul_(10)  # weights may change in place
    assert called(call, torch.tensor([1.0, 1.0])) == [[20.5, 30.5]] and net.ran == RECORD_AFTER + 1


def test_other_shapes_are_recorded_apart(net):
    call = NetworkCall(net, net)
    called(call, *inputs(RECORD_AFTER + 2))
    rows = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    assert called(call, rows) == [[[2.5, 3.5], [4.5, 6.5]]]
    called(call, *[rows] * (RECORD_AFTER + 1))
    ran = net.ran
    assert called(call, rows, inputs(1)[0]) == [[[2.5, 3.5], [4.5, 6.5]], by_hand(1)[0]] and net.ran == ran


def test_a_recording_is_for_one_number_format_and_layout(net):
    """A network may do other things for others."""

    def branches(x):
        return x * (5 if x.dtype == torch.float64 else 2 if x.is_contiguous() else 3)

    call, x = NetworkCall(net, branches), torch.ones(2, 2)
    called(call, *[x] * (RECORD_AFTER + 2))
    assert len(call.recordings) == 1
    assert called(call, x, torch.tensor([[1.0, 0.0], [1.0, 0.0]]).mT, x.double()) == [
        [[2, 2], [2, 2]],
        [[3, 3], [0, 0]],
        [[5, 5], [5, 5]],
    ]


def test_few_recordings_are_kept(net):
    call = NetworkCall(net, net)
    for rows in range(1, MOST_RECORDINGS + 2):
        called(call, *[torch.ones(rows, 2)] * (RECORD_AFTER + 2))
    assert len(call.recordings) == MOST_RECORDINGS


def test_memory_that_runs_out_is_no_reason_to_stop_recording(net):
    calls = itertools.count(1)

    def full(x):
        if next(calls) == RECORD_AFTER + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net(x)

    call = NetworkCall(net, full)
    with pytest.raises(torch.OutOfMemoryError):
        called(call, *[torch.ones(2)] * (RECORD_AFTER + 1))
    assert called(call, torch.ones(2)) == [[2.5, 3.5]] and call.recordings


def test_what_has_no_part_in_the_result_is_not_repeated():
    x = torch.ones(2)
    with Recorder([x]) as recorder:
        _, y = x * 2, x + 1
    assert [node.op for node in recorder.finished(y).nodes] == ["placeholder", "call_method", "output"]


def test_results_are_ordinary_tensors_of_their_own(net):
    call = NetworkCall(net, net)
    for _ in range(RECORD_AFTER + 3):
        with torch.no_grad():
            out = call(torch.ones(2))
        assert not out.is_inference()
        out.add_(1)  # such a tensor may be changed, and the next result is another one
    assert called(call, torch.ones(2)) == [[2.5, 3.5]]


def test_gradients_pass_as_ever(net):
    call, x = NetworkCall(net, net), torch.ones(2, requires_grad=True)
    for _ in range(RECORD_AFTER + 3):
        assert torch.autograd.grad(call(x).sum(), x)[0].tolist() == [2, 3]


UNFIT = {
    "in place": (lambda net, x: x.clone().add_(net.w), "add_ changes a tensor in place"),
    "operator in place": (lambda net, x: torch.Tensor.__imul__(x.clone(), 2), "mul_ changes a tensor in place"),
    "keyword": (lambda net, x: nn.functional.relu(x + 1, inplace=True), "relu changes a tensor in place"),
    "elsewhere": (lambda net, x: x + ELSEWHERE, "a tensor comes from elsewhere"),
}
ELSEWHERE = torch.ones(2)


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_recorded_goes_on_as_it_is(net, kind, capsys):
    unfit, why = UNFIT[kind]
    with pytest.raises(NotRecordable, match=why):
        recorded(net, lambda x: unfit(net, x), [torch.ones(2)])
    call = NetworkCall(net, lambda x: unfit(net, x))
    many = called(call, *[torch.ones(2)] * (RECORD_AFTER + 3))
    assert all(one == unfit(net, torch.ones(2)).tolist() for one in many)
    assert capsys.readouterr().err == f"note: the operations of Net could not be recorded ({why}); it is slower\n"


def test_a_call_that_is_not_finite_is_not_recorded_but_the_next_is(net, capsys):
    call = NetworkCall(net, net)
    called(call, *inputs(RECORD_AFTER))
    assert str(called(call, torch.tensor([float("nan"), 1.0]))) == "[[nan, 3.5]]" and not call.recordings
    assert called(call, *inputs(3)) == by_hand(3) and net.ran == RECORD_AFTER + 2
    assert capsys.readouterr().err == ""


def test_a_call_that_does_not_repeat_itself_is_not_recorded(net, capsys):
    """Such as one that draws random numbers."""
    call = NetworkCall(net, lambda x: net(x) * torch.rand(2))
    with torch.random.fork_rng():
        called(call, *[torch.ones(2)] * (RECORD_AFTER + 3))
    assert "could not be recorded (it does not repeat itself)" in capsys.readouterr().err and not call.recordings


@pytest.mark.parametrize("batch", [2, 3])
def test_the_miniature_recorded_equals_itself(batch):
    """Bit for bit: the operations are the same, in the same order."""
    unet = UNet2DConditionModel.from_pretrained(MINI / "unet").float().eval().requires_grad_(False)
    call = NetworkCall(unet, lambda x, t, c: unet(x, t, c).sample)
    rng = torch.Generator().manual_seed(0)

    def random(t):
        return (
            torch.randn(batch, 4, 16, 16, generator=rng),
            torch.tensor([t]),
            torch.randn(batch, 16, unet.config.cross_attention_dim, generator=rng),
        )

    with torch.inference_mode():
        first = random(900)
        out, recording = recorded(unet, call.call, first)
        for x, t, c in (first, random(3), random(500)):
            assert torch.equal(recording(x, t, c), unet(x, t, c).sample)
    assert torch.equal(out, unet(*first).sample)


# ---------------------------------------------------------------- torch.compile


class Broken(RuntimeError):
    """What a compiler raises that is not there."""


def with_backend(monkeypatch, backend):
    """Have torch.compile use a backend of ours, which needs no compiler."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: compile_(f, backend=backend, dynamic=dynamic))


def test_without_a_compiler_the_run_goes_on(net, monkeypatch, capsys):
    def backend(_graph, _inputs):
        raise Broken("no C++ compiler\nand many more lines")

    with_backend(monkeypatch, backend)
    call = NetworkCall(net, net, compiled=True)
    assert called(call, *inputs(3)) == by_hand(3)
    err = capsys.readouterr().err
    first, second = err.splitlines()
    assert first == "note: --compile True: compiling the network, which takes about a minute"
    assert second.startswith("note: --compile True: the network could not be compiled (")
    assert call.compiled is None and call.records


def test_a_compiled_network_gives_the_same(net, monkeypatch, capsys):
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    with_backend(monkeypatch, backend)
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))  # or graphs grow
    call = NetworkCall(net, net, compiled=True)
    assert called(call, *inputs(4)) == by_hand(4) and len(begun) == 4 and seen and call.compiled is not None
    assert capsys.readouterr().err.count("note: --compile True: compiling") == 1


def test_out_of_memory_is_not_taken_for_a_failure_to_compile(net):
    def full(_x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    call = NetworkCall(net, net, compiled=True)
    call.compiled = full
    with pytest.raises(torch.OutOfMemoryError):
        call(torch.ones(2))
