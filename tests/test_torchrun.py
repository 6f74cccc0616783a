"""Two processes under torchrun (gloo, on the CPU) do what one process does with the same global batch.

This file is also the program that they run, in one go, as starting Python takes seconds: test_torchrun.py OUT
[dying]
"""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

if __name__ != "__main__":
    from conftest import call

ROOT = pathlib.Path(__file__).resolve().parent.parent
# 161: odd
COMMON = "--out OUT --data synthetic --limit 161 --device cpu --precision float32 --split test"
M = f"ssl.py pretrain --task m --dim 32 --batch 16 {COMMON} --epochs"
LONG = f"{M} 3 --name long"
STAGES = [
    f"{M} 1",
    f"{M} 1 --pretext masking --name masking",
    f"{M} 1 --contrast 1 --name m_joint",
    LONG,
    f"ssl.py pretrain --task infonce --dim 32 --epochs 1 --batch 16 {COMMON}",
    f"ssl.py finetune --checkpoint OUT/m.pt --epochs 1 --batch 16 {COMMON}",
    f"video.py --checkpoint OUT/m.pt --clips 2 --frames 8 --no-balanced --cutmix 0.5 --epochs 1 {COMMON}",
    f"multimodal.py tiny --checkpoint OUT/m.pt --enlarge 32 --epochs 1 --batch 16 {COMMON}",
    "multimodal.py fuse --captions OUT/words.jsonl --text tokens --blocks 1 --cutmix 0.5 --epochs 1 --batch "
    f"16 {COMMON}",
    "multimodal.py fuse --captions OUT/words.jsonl --control image_only --blocks 1 --epochs 1 --batch 16 "
    f"{COMMON}",
]


def program(out: str, what: str = "") -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import vit

    log = vit.Run.log

    def log_or_die(self, **metrics):
        log(self, **metrics)
        if vit.RANK == 1 and (self.epoch, self.batches) == (1, 3):  # of LONG, the only one so long
            os.kill(os.getpid(), signal.SIGKILL)

    vit.Run.log = log_or_die if what == "dying" else log
    for line in [LONG] if what else STAGES:
        sys.argv = line.replace("OUT", out).split()
        spec = importlib.util.spec_from_file_location("stage", ROOT / sys.argv[0])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
        if vit.PROCESSES > 1:
            torch.distributed.barrier()  # the next stage reads what process 0 has written


def start(processes: int, *words, code: int = 0) -> str:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where one process and where two have written, and what the two have printed."""
    import torch

    import data
    import vit

    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    captions = [["a cat", "a dog on grass", "red"][i % 3] for i in range(161)]
    lines = [{"captioner": "hand", "model": "a test"}]
    for split in ("train", "validation", "test"):
        keys = data.image_keys(data.load("synthetic", split, limit=161)[0])
        lines += [{"image": key, "caption": c} for key, c in zip(keys, captions)]
    embedded = {c: (c, torch.randn(n, 24).half()) for c, n in zip(captions[:3], (4, 6, 3))}
    for folder in (one, two):
        (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        vit.write_tensors(folder / "words_clip.pt", {"clip": "a test", "embedded": embedded})
    start(1, one)
    return one, two, start(2, two)


def same_weights(a, b):
    """Up to rounding; but without the biases of keys. Such a bias adds the same to all scores of a query,
    softmax ignores that, and so its gradient is nothing but rounding errors, of which Adam, dividing by
    their size, makes whole steps."""
    import torch

    assert a.keys() == b.keys()
    for name, value in a.items():
        keys = torch.zeros(len(value) if value.ndim else 1, dtype=torch.bool)
        # keys: which of how many parts
        kinds = {"qkv.bias": (1, 3), "in_proj_bias": (1, 3), "kv.bias": (0, 2), "key.bias": (0, 1)}
        for part, of in [where for kind, where in kinds.items() if name.endswith(kind)][:1]:
            keys.chunk(of)[part].fill_(True)
        found, expected = (x.reshape(len(keys), -1)[~keys] for x in (value, b[name]))
        torch.testing.assert_close(
            found, expected, rtol=0, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "name",
    [
        "infonce",
        "m",
        "masking",
        "m_joint",
        "finetune",
        "video_encoder_1",
        "tiny_blip_0",
        "tiny_clip",
        "fusion_hand_1_tokens",
        "fusion_hand_1_image_only",
    ],
)
def test_after_ten_steps_the_weights_are_those_of_one_process(folders, name):
    import vit

    one, two = (vit.read_checkpoint(folder / f"{name}.pt") for folder in folders[:2])
    same_weights(one["model"], two["model"])
    for metric, values in one["history"].items():
        assert two["history"][metric] == pytest.approx(values, rel=1e-4), metric


def test_each_of_an_odd_number_of_images_is_judged_once_and_only_the_first_process_prints(folders):
    one, two, printed = folders
    guesses = [np.load(folder / "finetune.npz") for folder in (one, two)]
    assert len(guesses[1]["guess"]) == 161
    np.testing.assert_array_equal(guesses[0]["guess"], guesses[1]["guess"])
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (one, two)]
    assert rows[0]["finetune"]["value"] == rows[1]["finetune"]["value"]
    assert rows[0]["video_encoder_1"]["different"] == rows[1]["video_encoder_1"]["different"]
    assert rows[1]["finetune"]["command"].startswith("torchrun --nproc_per_node=2 ssl.py finetune")
    assert printed.count("finetune 1/1") == 1 and "Warning" not in printed


def test_a_killed_process_ends_the_run_which_then_goes_on_with_another_number_of_processes(tmp_path, folders):
    import vit

    text = start(2, tmp_path, "dying", code=1)
    assert "SIGKILL" in text or "-9" in text  # torchrun says who died
    assert vit.read_checkpoint(tmp_path / "long.pt")["epoch"] == 1
    assert "going on after epoch 1 of 3" in call(*LONG.replace("OUT", str(tmp_path)).split())
    same_weights(*(vit.read_checkpoint(folder / "long.pt")["model"] for folder in (tmp_path, folders[0])))


def test_what_can_not_be_shared_out_gets_one_sentence(monkeypatch):
    import torch

    import vit

    monkeypatch.setattr(vit, "PROCESSES", 3)
    assert len(vit.share(torch.zeros(9))) == 3
    with pytest.raises(
        SystemExit, match="8 can't be shared out evenly among 3 processes; choose another --batch"
    ):
        vit.share(torch.zeros(8))


if __name__ == "__main__":
    program(*sys.argv[1:])
