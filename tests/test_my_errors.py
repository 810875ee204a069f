"""How a command ends: in one line and an exit status, or in the traceback of a bug."""

import ast
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from my.errors import RunError, Stop, UserError, run_main

ROOT = Path(__file__).resolve().parent.parent


def test_neither_kind_of_stop_is_the_other():
    assert UserError.__bases__ == RunError.__bases__ == (Stop,)
    assert (UserError("").status, RunError("").status) == (2, 1)


def code():
    """{path: syntax tree} of the project's Python files, without the tests."""
    paths = (path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", ".venv"))
    return {path: ast.parse(path.read_text()) for path in paths}


def test_no_handler_of_everything_takes_one_kind_of_stop_for_a_bug():
    """A `try` that lets one kind through before `except Exception` lets both through."""
    for path, tree in code().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Try):
                caught = [handler.type and ast.unparse(handler.type) for handler in node.handlers]
                one_kind = any(kind in (name or "") for name in caught for kind in ("UserError", "RunError"))
                assert not (one_kind and {"Exception", None} & set(caught)), f"{path}:{node.lineno}"


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is known by its name."""


@pytest.mark.parametrize(
    "error, status, word",
    [
        (UserError("two\nlines"), 2, "two lines"),
        (RunError("broken"), 1, "broken"),
        (OSError(28, "No space", "a.png"), 1, "a.png: the disk is full"),
        (PermissionError(13, "Permission", "/x"), 1, "/x: permission denied"),
        (OSError(30, "Read-only"), 1, "read-only"),
        (OSError(36, "Too long", "x" * 300), 1, "longer than the system allows"),
        (OSError(27, "Too large", "a.mp4"), 1, "a.mp4: this file is larger than the system allows"),
        (OSError(24, "Too many"), 1, "ulimit -n"),
        *(
            (OSError(getattr(errno, name), "words of the system", "a.png"), 1, f"a.png: {words}")
            for name, words in {
                "EIO": "the disk gave an error; look after it, or use another disk, then start it once more",
                "ESTALE": "this network folder is no longer what it was; mount it again, then",
                "ENOTCONN": "this network folder is not connected; mount it again, then",
                "ENODEV": "the disk is no longer there; connect it again, then",
                "ENFILE": "the system has too many files open; end other programs, then",
                "ELOOP": "links lead in a ring; give the file or folder itself, then",
                "ENOTEMPTY": "a folder that is not empty has this name; move it away, then",
                "EPERM": "the system does not permit that; work in a folder that you may read and write, then",
            }.items()
        ),
        (OutOfMemoryError("CUDA"), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4e12"), 1, "out of memory"),
        (OSError(28, "No space"), 1, "free some space, then start it once more"),
        (KeyboardInterrupt(), 130, "stopped; start it once more"),
    ],
)
def test_run_main_ends_in_one_line_and_a_status(capsys, monkeypatch, error, status, word):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["/some/where/run_toy.py"])
    with pytest.raises(SystemExit) as caught:
        run_main(main, [], go_on=lambda: "start it once more")
    err = capsys.readouterr().err
    assert caught.value.code == status and err.count("\n") == 1
    assert err.startswith("run_toy.py: ") and word in err


@pytest.mark.parametrize("swallow", ["KeyboardInterrupt", "BaseException"])
def test_ctrl_c_inside_an_import_ends_the_command(tmp_path, swallow):
    """Though what is imported makes nothing of the interrupt, or something else."""
    (tmp_path / "slow.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(10**6): pass\n"
        f"except {swallow}:\n    pass\n"
    )
    (tmp_path / "toy.py").write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever started the tests
        "from my.errors import run_main\ndef main(argv):\n    print('begun')\n    import slow\n    print('went on')\n"
        "run_main(main, [], go_on=lambda: 'start it again')\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "toy.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "toy.py: stopped; start it again\n")
    assert "went on" not in done.stdout


def test_a_folder_that_is_gone_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")

    def main(argv):
        (tmp_path / "run").rmdir()
        open("history.json", "w")

    with pytest.raises(SystemExit) as caught:
        run_main(main, [])
    assert caught.value.code == 1 and "works in was deleted" in capsys.readouterr().err


def test_ctrl_c_elsewhere_is_pythons_own():
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            run_main(lambda argv: signal.raise_signal(signal.SIGINT), [])
        assert caught.value.code == 130 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_run_main_lets_bugs_through_and_passes_the_words(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["p", "--lr", "1"])
    run_main(seen.append)
    assert seen == [["--lr", "1"]]
    with pytest.raises(ZeroDivisionError):
        run_main(lambda argv: 1 / 0, [])
    with pytest.raises(FileNotFoundError):
        run_main(lambda argv: open("/nonexistent/x"), [])
