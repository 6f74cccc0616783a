"""What several test files share: the project folder on the path, and two ways to run a command as a user
types it."""

import contextlib
import importlib.util
import io
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


def load(name):
    """The module in ROOT/name, loaded once. ssl.py gets another name, since `import ssl` is, rightly,
    Python's own."""
    module_name = "stage1" if name == "ssl.py" else pathlib.Path(name).stem
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, ROOT / name)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return sys.modules[module_name]


@pytest.fixture(scope="session")
def stage1():
    return load("ssl.py")


def call(name, *words, code=0):
    """What `python NAME WORDS` prints and how it ends, in this process, which need not start Python and
    torch again."""
    printed, ended = io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr("sys.argv", [name, *map(str, words)])
        try:
            load(name).main()
        except SystemExit as error:  # a code, or the sentence that Python would print
            ended = error.code if isinstance(error.code, int) else 1
            print(error.code)
    assert ended == code, f"exit code {ended}, expected {code}:\n{printed.getvalue()}"
    return printed.getvalue()


def run(*command, cwd=ROOT, code=0, env=None):
    """Run `python COMMAND`; check the exit code; return stdout + stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )
    text = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{text}"
    if code:
        assert "Traceback" not in text, text
    return text
