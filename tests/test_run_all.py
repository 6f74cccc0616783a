"""The shell script's own promises; that it runs to its end is what `.ci/run` shows with the quick profile."""

import subprocess

import pytest
from conftest import ROOT


def bash(*words, code, **more):
    done = subprocess.run(["bash", str(ROOT / "run_all.sh"), *words], capture_output=True, text=True, **more)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_help_and_mistakes(tmp_path):
    assert "quick" in bash("--help", code=0)
    assert "usage:" in bash("fast", code=2)
    assert "no folder" in bash("quick", "--data", str(tmp_path / "nowhere"), code=2)
    assert "needs a folder" in bash("--data", code=2)


@pytest.mark.parametrize("construct", ["mapfile", "readarray", "declare -A", "${profile^^}", "|&", "&>>", "readlink -f", "realpath"])
def test_nothing_that_macos_bash_3_lacks(construct):
    assert construct not in (ROOT / "run_all.sh").read_text()
