"""Two processes under torchrun (gloo, on the CPU): their gradients of one augmented batch are one process's.

This file is also the program that they run, in one go, as starting Python takes seconds: test_torchrun.py OUT
"""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGE = (
    "ssl.py pretrain --task infonce --dim 32 --batch 16 --data synthetic --limit 161 --device cpu --epochs"
)


def program(out: str) -> None:
    """Write each loss's gradients, as this process has them, into OUT; then train a stage."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import argparse

    import torch
    from conftest import load

    import data
    import vit

    stage1 = load("ssl.py")
    sys.argv = [*STAGE.split(), "2", "--precision", "float32", "--out", out]
    vit.set_up(argparse.Namespace(device="cpu", precision="float32", seed=0))  # joins the other process

    generator = torch.Generator().manual_seed(0)
    images, labels = data.synthetic(16)
    target = data.crop_flip(images, generator)
    views = [data.contrastive_view(images, generator) for _ in range(2)]
    x, masked, _, angle = data.patch_augment(target, generator)
    own = data.own_part
    torch.manual_seed(0)
    encoder = vit.ViT(dim=32, depth=2)
    contrastive, m, classifier = vit.Contrastive(encoder), vit.ModelM(encoder), vit.Classifier(encoder)
    gradients = {}

    first, second = contrastive(torch.cat([own(view) for view in views])).chunk(2)
    stage1.info_nce(vit.gather(first), vit.gather(second), 0.1)[0].backward()
    keep(gradients, "infonce", contrastive, vit)
    logits, painted = m(own(x), own(masked))
    loss = torch.nn.functional.cross_entropy(logits, own(angle))
    (loss + stage1.paint_loss(painted, own(target), own(masked), 8)).backward()
    keep(gradients, "m", m, vit)
    torch.nn.functional.cross_entropy(classifier(own(target)), own(labels)).backward()
    keep(gradients, "finetune", classifier, vit)
    with vit.whole_file(f"{out}/gradients.pt") as file:
        torch.save(gradients, file)
    stage1.main()
    if vit.PROCESSES > 1:
        torch.distributed.destroy_process_group()


def keep(gradients: dict, name: str, model, vit) -> None:
    """Average the gradients of all processes, keep them, and forget them."""
    vit.average_gradients(model)
    gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where one process and where two have written, and what the two have printed."""
    found = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        out = tmp_path_factory.mktemp(str(processes))
        command = [sys.executable, *(launcher if processes > 1 else []), __file__, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(out)
    return *found, done.stdout


@pytest.mark.parametrize("name", ["infonce", "m", "finetune"])
def test_the_gradients_of_two_processes_are_those_of_one(folders, name):
    import torch

    one, two = (torch.load(folder / "gradients.pt", weights_only=True)[name] for folder in folders[:2])
    assert one.keys() == two.keys() and max(x.abs().max() for x in one.values()) > 0.01
    for key, value in one.items():
        torch.testing.assert_close(
            two[key], value, rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_a_stage_trains_on_halves_of_every_batch_and_goes_on_in_one_process(folders, tmp_path, monkeypatch):
    """Only process 0 prints and writes; 161 images make ten steps of 16."""
    from conftest import call

    import vit

    _, two, printed = folders
    assert printed.count("infonce 2/2") == 1 and "10 steps" in printed
    state = vit.read_checkpoint(two / "infonce.pt")
    assert state["epoch"] == 2 and state["history"]["loss"][1] < state["history"]["loss"][0]
    monkeypatch.setattr(vit, "hash_of_code", lambda: state["recipe"]["code"])
    again = [*STAGE.split(), 2, "--precision", "float32", "--out", two]
    assert "finished before" in call(*again)


def test_what_can_not_be_shared_out_evenly_is_refused(monkeypatch):
    import torch

    import data

    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(data.dist, "get_rank", lambda: 1)
    assert data.own_part(torch.arange(9)).tolist() == [3, 4, 5]
    with pytest.raises(RuntimeError, match="don't multiply up"):
        data.own_part(torch.zeros(8))


if __name__ == "__main__":
    program(*sys.argv[1:])
