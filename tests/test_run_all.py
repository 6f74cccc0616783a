"""The shell script's own promises; that it runs to its end is what `.ci/run` shows with the quick profile."""

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


def fake(path, script):
    """An executable of that content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + script)
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path):
    """A folder with run_all.sh, and a PATH on which stand-ins in bin/ come first."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path, os.environ | {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}


def test_help_and_mistakes(tmp_path):
    assert "quick" in bash("--help", code=0)
    assert "usage:" in bash("fast", code=2)
    assert "no folder" in bash("quick", "--data", str(tmp_path / "nowhere"), code=2)
    assert "needs a folder" in bash("--data", code=2)
    assert "needs a number" in bash("quick", "--seed", "one", code=2)


def test_processes_that_can_not_share_a_step_are_refused_at_once(bare):
    folder, env = bare
    fake(folder / "bin/python", "exit 0")
    assert "NPROC must be 1 or 2" in bash("quick", code=2, folder=folder, env=env | {"NPROC": "4"})


LACKS = 'case "$*" in *importlib.metadata*) exit 1 ;; *version_info*) exit %d ;; '
LACKS += '"-m venv .venv") echo made; exit 1 ;; esac'


def test_an_environment_that_has_everything_is_used_as_it_is(bare):
    """Also one without pip, as uv makes them; else .venv, though python3 itself may be too old for it."""
    folder, env = bare
    fake(folder / "bin/python", 'case "$*" in *pip*) exit 1 ;; *pytest*) echo the tests run ;; esac')
    assert bash("test", code=0, folder=folder, env=env).strip() == "the tests run"
    fake(folder / "bin/python", LACKS % 1)
    fake(folder / ".venv/bin/python", 'case "$*" in *pytest*) echo the others run ;; esac')
    assert "the others run" in bash("test", code=0, folder=folder, env=env)


@pytest.mark.parametrize("optimize", ["", "1"])
def test_a_package_that_is_too_old_is_noticed_whatever_python_strips(optimize):
    """PYTHONOPTIMIZE strips asserts."""
    check = (ROOT / "run_all.sh").read_text().split("-c '", 1)[1].split("' >/dev/null", 1)[0]
    env = os.environ | {"PYTHONOPTIMIZE": optimize}
    for least, code in (("0.1", 0), ("999", 1)):
        program = check.replace('open("requirements.txt")', f'["torch>={least}"]')
        assert subprocess.run([sys.executable, "-c", program], env=env).returncode == code


def test_a_python_that_is_too_old_can_be_replaced_by_name_and_a_half_made_venv_is_made_again(bare):
    folder, env = bare
    for name, too_old in (("python", 1), ("python3", 1), ("python3.12", 0)):
        fake(folder / "bin" / name, LACKS % too_old)
    fake(folder / ".venv/bin/python", "exit 1")  # what Debian leaves where python3-venv is missing: no pip
    text = bash("test", code=2, folder=folder, env=env)
    assert "Python 3.10 or newer is needed" in text and "PYTHON=" in text
    text = bash("test", code=2, folder=folder, env=env | {"PYTHON": "python3.12"})
    assert "made" in text and "apt install python3-venv" in text and "pip install -r requirements.txt" in text


@pytest.mark.parametrize("blip, code", [(0, 0), (3, 0), (1, 1), (130, 130)])
def test_only_a_blip_that_can_not_be_had_is_replaced_by_the_small_one(bare, blip, code):
    """Not one that was stopped by Ctrl-C or a full disk: everything after it would be trained on other
    captions."""
    folder, env = bare
    no_gpu = "*torch.ones*) exit 1 ;;"
    fake(folder / "bin/python", f'case "$*" in {no_gpu} *"caption --captioner blip"*) exit {blip} ;; esac')
    captions = folder / "runs/cifar10-laptop/captions_blip.json"
    captions.parent.mkdir(parents=True)
    captions.touch()
    text = bash("laptop", code=code, folder=folder, env=env)
    assert ("captions_tiny.json" in text) == (blip == 3)
    assert ("multimodal.py fuse" in text) == (code == 0)


@pytest.mark.parametrize("code, goes_on", [(3, True), (1, False), (130, False)])
def test_only_without_a_network_drawn_shapes_take_the_images_place(bare, code, goes_on):
    folder, env = bare
    fake(folder / "bin/python", f'case "$*" in *torch.ones*) exit 1 ;; "data.py"*) exit {code} ;; esac')
    text = bash("quick", code=0 if goes_on else code, folder=folder, env=env)
    assert ("SYNTHETIC SHAPES" in text) == goes_on


def test_every_command_is_printed_as_it_can_be_typed_kept_for_the_table_and_asks_for_a_gpu_by_name(bare):
    """Else a GPU that is full for a moment would let a stage go on on the CPU, for hours."""
    folder, env = bare
    fake(folder / "bin/python", "exit 0")
    (folder / "my data").mkdir()
    text = bash("quick", "--data", str(folder / "my data"), "--seed", "3", code=0, folder=folder, env=env)
    stages = [line[2:] for line in text.splitlines() if line.startswith("$ ") and "data.py" not in line]
    assert len(stages) > 15 and all("--device cuda" in line and "my\\ data" in line for line in stages)
    kept = (folder / "runs/cifar10-quick-seed3/commands.txt").read_text().splitlines()
    assert kept[0].startswith("# commit ") and kept[1:] == stages
    (folder / "runs/cifar10-quick-seed3/old.pt").touch()
    bash("quick", "--data", str(folder / "my data"), "--seed", "3", "--fresh", code=0, folder=folder, env=env)
    assert not (folder / "runs/cifar10-quick-seed3/old.pt").exists()


def test_shell_scripts_keep_their_line_ends_on_windows():
    assert "*.sh text eol=lf" in (ROOT / ".gitattributes").read_text().splitlines()
    assert b"\r" not in (ROOT / "run_all.sh").read_bytes()


@pytest.mark.parametrize(
    "construct",
    ["mapfile", "readarray", "declare -A", "${profile^^}", "|&", "&>>", "readlink -f", "realpath"],
)
def test_nothing_that_macos_bash_3_lacks(construct):
    assert construct not in (ROOT / "run_all.sh").read_text()


def test_without_network_it_turns_to_synthetic_images_loudly(tmp_path):
    """From another directory, in a folder with spaces in its name, behind a dead proxy, on a terminal that
    can't show every letter."""
    folder = tmp_path / "my course work"
    folder.mkdir()
    for name in ("run_all.sh", "requirements.txt", "ssl.py", "data.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "vit.py").write_text("import sys; print('\u0151'); sys.exit(5)")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "https_proxy": "http://127.0.0.1:9", "PYTHONIOENCODING": "ascii"}
    start = time.monotonic()
    text = bash("quick", code=5, folder=folder, cwd="/", env=env)
    assert time.monotonic() - start < 30  # nobody waits for a network that is not there
    assert "can't download" in text and "THIS RUN USES SYNTHETIC SHAPES" in text and "\n?\n" in text
    assert not (folder / ".venv").exists() and sorted(p.name for p in (folder / "data").iterdir()) == []
