"""What several test files share: the project folder on the path, and a way to run a command as a user types it."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  (also proves that ssl.py in ROOT does no harm)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stage1():
    """ssl.py under another name, since `import ssl` is, rightly, Python's own."""
    spec = importlib.util.spec_from_file_location("stage1", ROOT / "ssl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command, cwd=ROOT, code=0, env=None):
    """Run `python ...` (or another program given by its path); check the exit code; return stdout + stderr."""
    first = [sys.executable] if str(command[0]).endswith(".py") or command[0] == "-c" or command[0] == "-m" else []
    done = subprocess.run([*first, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})})  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{text}"
    if code:
        assert "Traceback" not in text, text
    return text
