"""What made a file: the version of this project, which pyproject.toml states, and that of PyTorch."""

import importlib.metadata
import platform
import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def made_by(command: str | None = None) -> dict[str, str]:
    """Return {"version": of this project, "torch": of PyTorch, "command": where given}; nothing heavy is imported."""
    stated = re.findall(r'^version = "(.+)"$', PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    versions = {"version": stated[0], "torch": importlib.metadata.version("torch")}
    return versions | ({"command": command} if command else {})


def versions() -> dict[str, str]:
    """Return the versions on which the numbers of a run may depend, by name; nothing heavy is imported."""
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**made_by(), "warp": importlib.metadata.version("warp-lang"), **system}
