"""The shell script's own promises; that it runs to its end is what `.ci/run` shows with the quick profile."""

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT


def bash(*words, code, folder=ROOT, **more):
    done = subprocess.run(
        ["bash", str(folder / "run_all.sh"), *words], capture_output=True, text=True, **more
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_help_and_mistakes(tmp_path):
    assert "quick" in bash("--help", code=0)
    assert "usage:" in bash("fast", code=2)
    assert "no folder" in bash("quick", "--data", str(tmp_path / "nowhere"), code=2)
    assert "needs a folder" in bash("--data", code=2)
    assert "needs a number" in bash("quick", "--seed", "one", code=2)


def test_a_half_made_environment_is_made_again(tmp_path):
    """What Debian's Python leaves where python3-venv is missing: bin/python, but no pip."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    bare = tmp_path / ".venv/bin/python"
    bare.parent.mkdir(parents=True)
    bare.write_text("#!/bin/sh\nexit 1")
    system = tmp_path / "bin/python3"
    system.parent.mkdir()
    system.write_text(
        '#!/bin/sh\ncase "$*" in *colab*) exit 1 ;; "-m venv .venv") touch asked; exit 1 ;; esac'
    )
    bare.chmod(0o755)
    system.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")} | {
        "PATH": f"{system.parent}:/usr/bin:/bin"
    }
    assert "python3 -m venv does not work here" in bash("quick", code=2, folder=tmp_path, env=env)
    assert (tmp_path / "asked").exists()


def fake(path, script):
    """An executable of that content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + script)
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path):
    """A folder with run_all.sh, and an environment in which no virtual environment is active."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return tmp_path, env | {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}


OLD = 'case "$*" in *version_info*) exit 1 ;; *google.colab*) exit 1 ;; --version) echo Python 3.9.1 ;; esac'


def test_a_good_venv_is_used_though_python3_is_too_old(bare):
    folder, env = bare
    fake(folder / "bin/python3", OLD)
    fake(folder / ".venv/bin/python", 'case "$*" in *pytest*) echo the tests run ;; esac')
    assert "the tests run" in bash("test", code=0, folder=folder, env=env)


def test_python3_that_is_too_old_can_be_replaced_by_name(bare):
    folder, env = bare
    fake(folder / "bin/python3", OLD)
    text = bash("test", code=2, folder=folder, env=env)
    assert "Python 3.10 or newer is needed; python3 is Python 3.9.1" in text and "PYTHON=" in text
    fake(
        folder / "bin/python3.12",
        'case "$*" in *google.colab*) exit 1 ;; "-m venv .venv") echo made; exit 1 ;; esac',
    )
    assert "made" in bash("test", code=2, folder=folder, env=env | {"PYTHON": "python3.12"})


def test_colab_is_installed_into_as_it_can_make_no_venv(bare):
    folder, env = bare
    has_not = "*importlib.metadata*) exit 1 ;;"
    fake(folder / "bin/python3", f'case "$*" in {has_not} *install*) echo installed; esac')
    fake(folder / "bin/python", "echo the tests run")
    text = bash("test", code=0, folder=folder, env=env)
    assert "into this notebook's environment" in text and "installed" in text and "the tests run" in text


def test_an_active_environment_without_pip_is_used_as_it_is(bare):
    """As uv makes them; and pip before 22.2, Ubuntu 22.04's, can't tell what is missing."""
    folder, env = bare
    fake(folder / "bin/python", 'case "$*" in *pip*) exit 1 ;; *pytest*) echo the tests run ;; esac')
    text = bash("test", code=0, folder=folder, env=env | {"VIRTUAL_ENV": str(folder)})
    assert "the tests run" in text and "installing" not in text


@pytest.mark.parametrize("blip, code", [(0, 0), (3, 0), (1, 1), (130, 130)])
def test_only_a_blip_that_can_not_be_had_is_replaced_by_the_small_one(bare, blip, code):
    """Not one that was stopped by Ctrl-C or a full disk: everything after it would be trained on other
    captions."""
    folder, env = bare
    no_gpu = "*torch.ones*) exit 1 ;;"
    fake(folder / "bin/python", f'case "$*" in {no_gpu} *"caption --captioner blip"*) exit {blip} ;; esac')
    captions = folder / "runs/cifar10-laptop/captions_blip.jsonl"
    captions.parent.mkdir(parents=True)
    captions.touch()
    (folder / "data").mkdir()
    text = bash("laptop", code=code, folder=folder, env=env | {"VIRTUAL_ENV": str(folder)})
    assert ("captions_tiny.jsonl" in text) == (blip == 3)
    assert ("multimodal.py fuse" in text) == (code == 0)


@pytest.mark.parametrize("code, goes_on", [(3, True), (1, False), (130, False)])
def test_only_without_a_network_drawn_shapes_take_the_images_place(bare, code, goes_on):
    folder, env = bare
    fake(folder / "bin/python", f'case "$*" in *torch.ones*) exit 1 ;; "data.py"*) exit {code} ;; esac')
    text = bash("quick", code=0 if goes_on else code, folder=folder, env=env | {"VIRTUAL_ENV": str(folder)})
    assert ("SYNTHETIC SHAPES" in text) == goes_on


def test_once_a_gpu_is_found_its_stages_ask_for_it_by_name(bare):
    """Else a GPU that is full for a moment would let a stage go on on the CPU, for hours."""
    folder, env = bare
    fake(folder / "bin/python", "exit 0")
    (folder / "data").mkdir()
    text = bash("quick", code=0, folder=folder, env=env | {"VIRTUAL_ENV": str(folder)})
    stages = [line for line in text.splitlines() if line.startswith("$ ") and "data.py" not in line]
    assert len(stages) > 10 and all("--device cuda" in line for line in stages)


def test_shell_scripts_keep_their_line_ends_on_windows():
    assert "*.sh text eol=lf" in (ROOT / ".gitattributes").read_text().splitlines()
    assert b"\r" not in (ROOT / "run_all.sh").read_bytes()


@pytest.mark.parametrize(
    "construct",
    ["mapfile", "readarray", "declare -A", "${profile^^}", "|&", "&>>", "readlink -f", "realpath"],
)
def test_nothing_that_macos_bash_3_lacks(construct):
    assert construct not in (ROOT / "run_all.sh").read_text()


def test_without_network_it_turns_to_synthetic_images_loudly_and_a_second_run_is_refused(tmp_path):
    """From another directory, in a folder with spaces in its name, with an active environment, behind a
    dead proxy."""
    folder = tmp_path / "my course work"
    folder.mkdir()
    for name in (
        "run_all.sh",
        "requirements.txt",
        "vit.py",
        "data.py",
        "ssl.py",
        "video.py",
        "multimodal.py",
        "analysis.py",
    ):
        shutil.copy(ROOT / name, folder)
    (folder / "runs/synthetic-quick").mkdir(parents=True)
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path, "https_proxy": "http://127.0.0.1:9"}
    with open(folder / "runs/synthetic-quick/.run_all.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what a first run holds
        start = time.monotonic()
        text = bash("quick", code=2, folder=folder, cwd="/", env=env)
    assert time.monotonic() - start < 15  # nobody waits for a network that is not there
    assert (
        "can't download" in text and "THIS RUN USES SYNTHETIC SHAPES" in text and "another run_all.sh" in text
    )
    assert not (folder / ".venv").exists() and sorted(p.name for p in (folder / "data").iterdir()) == []
