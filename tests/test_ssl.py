"""Stage 1: the name that hides Python's ssl, the losses, the probe, the commands."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, run

import data
import vit

# ------------------------------------------------------------------------------------------------------------

TLS = "import torch, ssl, urllib.request; ssl.create_default_context(); print(ssl.__file__)"


def test_import_ssl_from_the_project_folder_is_pythons_own():
    assert str(ROOT) not in run("-c", TLS).splitlines()[-1]


def test_a_folder_with_a_copied_ssl_py_still_has_https_and_transformers(tmp_path):
    shutil.copy(ROOT / "ssl.py", tmp_path)
    (tmp_path / "script.py").write_text(
        "import urllib.request, transformers\n"
        "try: urllib.request.urlopen('https://127.0.0.1:9/', timeout=5)\n"
        "except urllib.error.URLError as e: print('refused' if 'refused' in str(e).lower() else e)\n"
        "import ssl, http.client; print(ssl.SSLContext, http.client.HTTPSConnection)\n"
    )
    text = run("script.py", cwd=tmp_path)
    assert "refused" in text and "SSLContext" in text


@pytest.mark.parametrize("command", [["-c", "import data, vit, analysis"], ["ssl.py", "pretrain", "--help"]])
def test_every_way_in_works_from_the_project_folder(command):
    run(*command)


def test_files_work_when_copied_alone_with_those_they_name(tmp_path):
    folder = tmp_path / "my course work"
    folder.mkdir()
    shutil.copy(ROOT / "vit.py", folder)
    assert "parameters" in run("vit.py", cwd=folder)
    (folder / "vit.py").unlink()
    shutil.copy(ROOT / "data.py", folder)
    assert "[20, 3, 32, 32]" in run("-c", "import data; print([*data.synthetic(20)[0].shape])", cwd=folder)
    for name in ("vit.py", "ssl.py"):
        shutil.copy(ROOT / name, folder)
    few = "--data synthetic --limit 64 --batch 32 --epochs 1"
    run("ssl.py", "pretrain", "--task", "infonce", *few.split(), cwd=folder)
    assert (folder / "runs/mine/infonce.pt").exists()


# ------------------------------------------------------------------------------------------------------------


def test_info_nce_equals_its_definition_in_numpy(stage1):
    z = torch.randn(8, 5)
    loss, match = stage1.info_nce(z, temperature=0.3)
    unit = z.numpy().astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    terms, hits = [], []
    for i in range(8):
        partner = (i + 4) % 8
        others = [k for k in range(8) if k != i]
        scores = {k: np.exp(unit[i] @ unit[k] / 0.3) for k in others}
        terms.append(-np.log(scores[partner] / sum(scores.values())))
        hits.append(max(scores, key=scores.get) == partner)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
    assert match.item() == pytest.approx(np.mean(hits))


def test_what_is_painted_is_compared_with_the_image_as_it_was_before_masking(stage1):
    images, masked = torch.rand(2, 3, 32, 32), torch.tensor([[3, 0], [15, 7]])
    painted = torch.randn(2, 2, 3 * 64)
    errors = []
    for b in range(2):
        for m in range(2):
            row, column = divmod(masked[b, m].item(), 4)
            hidden = images[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            errors.append((painted[b, m] - ((hidden - 0.5) / 0.25).flatten()).square().mean())
    torch.testing.assert_close(stage1.paint_loss(painted, images, masked, 8), torch.stack(errors).mean())


def test_losses_and_augmentation_stay_on_the_device_and_never_wait_for_it(stage1):
    """On torch's meta device a tensor has no values: reading one (a synchronisation on a GPU), or mixing
    in a tensor that stayed on the CPU, raises."""
    model = vit.JointM(vit.ViT(dim=32, depth=2)).to("meta")
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.empty(8, dtype=torch.long, device="meta")
    views = stage1.two_views(images, None)  # [2B, 3, S, S]
    x, masked, _, angle = data.patch_augment(views)
    logits, painted, z = model(x, masked)
    loss, match = stage1.info_nce(z, 0.2)
    loss = loss + F.cross_entropy(logits, angle) + stage1.paint_loss(painted, views, masked, 8)
    x, other, kept = data.cutmix(data.crop_flip(images), labels)
    logits = vit.Classifier(model.encoder).to("meta")(x)
    loss = loss + data.cutmix_loss(logits, labels, other, kept, 0.1)
    loss.backward()
    assert all(value.is_meta for value in (loss, match, data.cutmix_accuracy(logits, labels, other, kept)))
    assert all(p.grad is None or p.grad.is_meta for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------

TINY = ["--data", "synthetic", "--limit", 256, "--device", "cpu", "--precision", "float32", "--split", "test"]
FAST = ["--epochs", 1, "--batch", 64]
PRETRAIN = ["ssl.py", "pretrain", "--dim", 32, "--batch", 64, *TINY]
FINETUNE = ["ssl.py", "finetune", "--dim", 32, "--batch", 64, *TINY]


@pytest.mark.parametrize("task", ["infonce", "m", "m joint", "finetune"])
def test_every_stage_lowers_its_loss(task, tmp_path):
    command = {
        "infonce": [*PRETRAIN, "--task", "infonce"],
        "m": [*PRETRAIN, "--task", "m"],
        "m joint": [*PRETRAIN, "--task", "m", "--contrast", 1, "--name", "m joint"],
        "finetune": [*FINETUNE, "--cutmix", 0, "--name", "finetune"],
    }[task]
    call(*command, "--epochs", 8, "--lr", 4e-3, "--out", tmp_path)
    losses = vit.read_checkpoint(tmp_path / f"{task}.pt")["history"]["loss"]
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    "pretext, gap, measures, idle",
    [
        ("masking", 0, {"loss", "mse"}, "rotation_head"),
        ("rotation", 1, {"loss", "angle"}, "reconstruction_head"),
        ("image-rotation", 1, {"loss", "angle"}, "reconstruction_head"),
    ],
)
def test_half_of_model_m_trains_half_of_its_heads(tmp_path, pretext, gap, measures, idle):
    """The other half stays, to the last bit, as it was drawn."""
    half = ["--task", "m", "--pretext", pretext, "--gap", gap]
    call(*PRETRAIN, *half, "--epochs", 2, "--keep-epochs", "--out", tmp_path)
    first, last = (vit.read_checkpoint(tmp_path / f"{name}.pt") for name in ("m-epoch1", "m"))
    assert last["history"].keys() == measures
    before = first["model"]
    changed = [key for key, value in last["model"].items() if not torch.equal(value, before[key])]
    assert {key.split(".")[0] for key in changed} == {"encoder", "rotation_head", "reconstruction_head"} - {
        idle
    }


def test_a_quarter_of_the_patches_is_masked_and_another_turned_whatever_their_size(tmp_path):
    text = call(*PRETRAIN, "--task", "m", *FAST, "--out", tmp_path)
    assert "of 16 patches 4 are blacked out, 4 others turned" in text
    text = call(*PRETRAIN, "--task", "m", "--patch", 4, *FAST, "--out", tmp_path / "small")
    assert "of 64 patches 16 are blacked out, 16 others turned" in text
    text = call(*PRETRAIN, "--task", "m", "--pretext", "image-rotation", *FAST, "--out", tmp_path / "whole")
    assert "of 16 patches 0 are blacked out, the whole image is turned" in text


def test_whole_images_are_turned_by_the_angle_that_is_asked_for(tmp_path, monkeypatch):
    seen, turned = [], []
    monkeypatch.setattr(data, "crop_flip", lambda images, generator: images.float() / 255)
    forward, turn = vit.ModelM.forward, data.turn
    monkeypatch.setattr(
        vit.ModelM, "forward", lambda model, x, masked: (seen.append(x), forward(model, x, masked))[1]
    )
    monkeypatch.setattr(data, "turn", lambda x, angle: (turned.append((x, angle)), turn(x, angle))[1])
    call(*PRETRAIN, "--task", "m", "--pretext", "image-rotation", *FAST, "--out", tmp_path)
    images, angles = turned[-1]
    assert images.ndim == 4 and set(angles.tolist()) == {0, 1, 2, 3}
    for image, shown, k in zip(images, seen[-1], angles.tolist()):
        assert torch.equal(shown, image.rot90(k, (1, 2)))


# -------------------------------------------------------------------------------------------------- the probe


def test_fit_linear_reaches_the_optimum_where_the_gradient_vanishes(stage1):
    x, y = torch.randn(200, 6), torch.randint(3, (200,))
    layer = stage1.fit_linear(x, y, decay=1e-2, classes=3)
    (F.cross_entropy(layer(x), y) + 1e-2 * layer.weight.square().sum()).backward()
    assert layer.weight.grad.abs().max() < 1e-4 and layer.bias.grad.abs().max() < 1e-4


def test_features_are_cls_and_the_mean_of_the_patch_tokens(stage1):
    machine, encoder = vit.set_up("cpu", "float32"), vit.ViT(dim=16, depth=1).eval()
    images = data.synthetic(5)[0]
    found = stage1.features(encoder, images, machine)
    with torch.no_grad():
        tokens = encoder(images / 255)
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    torch.testing.assert_close(found["mean"], tokens[:, 1:].mean(1))


# ------------------------------------------------------------------------------------------------------------


def test_the_whole_of_stage_one_and_its_analysis_on_a_few_images(tmp_path, monkeypatch):
    out = ["--out", tmp_path, *TINY]
    call("ssl.py", "pretrain", "--task", "infonce", "--dim", 32, *FAST, *out)
    call("ssl.py", "pretrain", "--task", "m", "--init", tmp_path / "infonce.pt", *FAST, *out)
    joint = ["--init", tmp_path / "infonce.pt", "--contrast", 1, "--name", "m_joint"]
    call("ssl.py", "pretrain", "--task", "m", *joint, *FAST, *out)
    call("ssl.py", "probe", "--checkpoint", "pixels", "untrained", tmp_path / "m.pt", *out)
    call("ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", *FAST, *out)
    pair = ["--before", tmp_path / "m.pt", "--after", tmp_path / "finetune.pt"]
    call("analysis.py", "maps", "cka", *pair, *out)
    drawn = call("analysis.py", "figures", *out)
    # not drawn are those of video.py, multimodal.py and AdamW's rows
    assert drawn.count("drew") == 7 and drawn.count("not drawn") == 6, drawn
    call("analysis.py", "maps", "cka", *pair, "--name", "mine", *out, "--precision", "bfloat16")
    text = call("analysis.py", "report", *out)
    results = json.loads((tmp_path / "results.json").read_text())
    # by another name, and as precise as asked; the coursework's numbers are of its own two checkpoints only
    assert results["rows"]["mine_after"]["precision"] == "bfloat16" and "mine_after" not in text
    assert "report" not in results["rows"]["mine_before"] and "0.7353" in text
    expected = {"pixels_probe", "untrained_probe", "m_probe", "finetune"}
    assert expected | {"cka_before", "cka_after", "maps_after"} <= results["rows"].keys()
    assert results["dataset"] == "synthetic" and "SYNTHETIC" in text
    for row in results["rows"].values():
        assert "SYNTHETIC" in row["provenance"] and row["seed"] == 0 and len(row["images"]) == 12
        assert 0 <= row["value"] <= 1 and row["command"].startswith("python ")
    # CLS enters the first block the same for every image
    assert results["rows"]["cka_before"]["blocks"][0] is None
    report = (tmp_path / "report.md").read_text()
    assert f"{100 * results['rows']['m_probe']['value']:.2f} %" in report and "SYNTHETIC" in report
    alone = {name: results["rows"][name]["value"] for name in ("untrained_probe", "m_probe")}
    # alone, and in another place of the list: the same
    call("ssl.py", "probe", "--checkpoint", tmp_path / "m.pt", *out)
    call("ssl.py", "probe", "--checkpoint", "untrained", "pixels", *out)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert alone == {name: rows[name]["value"] for name in alone}
    assert "measured before" in call("ssl.py", "probe", "--checkpoint", "untrained", "pixels", *out)
    tuned = ["ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", *FAST, *out]
    again = call(*tuned)
    assert "finished before" in again and "measured before" in again
    # what was measured by other code is measured anew
    monkeypatch.setattr(vit, "edited_since", lambda before: "ssl.py" if "ssl.py" in before else "vit.py")
    assert "measured before" not in call("ssl.py", "probe", "--checkpoint", "untrained", "pixels", *out)
    again = call(*tuned)
    assert "has been edited since: --fresh" in again and "measured before" not in again
    load = data.load
    monkeypatch.setattr(
        data, "load", lambda *a: (load(*a)[0] ^ 1, load(*a)[1])
    )  # other images by the same name
    assert "made with another images" in call(*tuned, code=1)


def test_choosing_happens_on_validation_unless_the_test_split_is_asked_for(tmp_path):
    call("ssl.py", "probe", "--checkpoint", "pixels", "--out", tmp_path, *TINY[:-2])
    assert list(json.loads((tmp_path / "results.json").read_text())["rows"]) == ["pixels_probe_validation"]


@pytest.mark.parametrize(
    "line, code, message",
    [
        ("ssl.py", 2, "required"),
        ("ssl.py pretrain --task moco", 2, "invalid choice"),
        ("ssl.py finetune --batch 0", 2, "argument --batch: '0' is not a whole number above 0"),
        ("ssl.py finetune --epochs -1", 2, "argument --epochs: '-1' is not a whole number above 0"),
        ("ssl.py finetune --smoothing 3", 2, "argument --smoothing: '3' is not a number from 0 to 1"),
        ("ssl.py finetune --labels few", 2, "argument --labels: 'few' is not a number from 0 to 1"),
        ("video.py --checkpoint nowhere.pt --frames 0", 2, "argument --frames: '0' is not a whole number"),
        ("ssl.py probe --checkpoint nowhere.pt --data synthetic --limit 100", 1, "no checkpoint nowhere.pt"),
        ("ssl.py pretrain --task m --data synthetic --limit 10", 1, "choose a smaller batch"),
        ("ssl.py pretrain --task m --data synthetic --limit 10 --patch 5", 1, "5-pixel patches"),
        ("ssl.py pretrain --task m --patch 4 --gap 2 --data synthetic --limit 10", 1, "leaves nothing"),
        ("ssl.py finetune --labels 0.01 --data synthetic --limit 100", 1, "leaves 1; at least 10"),
        ("analysis.py report", 1, "no rows of the validation split yet"),
    ],
)
def test_mistakes_get_one_clear_sentence(tmp_path, line, code, message):
    assert message in call(*line.split(), *([] if code == 2 else ["--out", tmp_path]), code=code)


def test_results_on_validation_are_reported_too_and_never_mixed_with_another_data_set(tmp_path):
    call("ssl.py", "probe", "--checkpoint", "pixels", "--out", tmp_path, *TINY[:-2])
    assert "pixels_probe" in call("analysis.py", "report", "--out", tmp_path, "--data", "synthetic")
    assert "validation split" in (tmp_path / "report.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(results | {"dataset": "cifar10"}))
    text = call("ssl.py", "probe", "--checkpoint", "untrained", "--out", tmp_path, *TINY[:-2], code=1)
    assert "choose another --out" in text


def test_a_width_left_to_its_default_and_the_same_width_typed_are_the_same_run(tmp_path):
    command = ["ssl.py", "pretrain", "--task", "m", "--out", tmp_path, *TINY, *FAST]
    call(*command)
    assert "finished before" in call(*command, "--dim", 128)


def test_a_checkpoint_without_a_stem_can_not_be_given_one(tmp_path):
    out = ["--out", tmp_path, *TINY]
    call("ssl.py", "pretrain", "--task", "m", "--dim", 32, *out, *FAST)
    text = call("ssl.py", "probe", "--checkpoint", tmp_path / "m.pt", "--stem", *out, code=1)
    assert "has --stem False, not True" in text


def test_a_start_file_with_other_contents_does_not_count_as_the_same_run(tmp_path):
    out = ["--out", tmp_path, "--dim", 32, *TINY, *FAST]
    call("ssl.py", "pretrain", "--task", "m", *out)
    call("ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", *out)
    call("ssl.py", "pretrain", "--task", "m", "--fresh", "--lr", 0.01, *out)
    assert "another start" in call("ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", *out, code=1)


def test_a_folder_that_can_not_be_made_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    text = call("analysis.py", "report", "--out", tmp_path / "file" / "out", code=1)
    assert "can't work in the folder" in text


def test_interrupting_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", stop)
    assert "same command goes on" in call("ssl.py", "finetune", "--out", tmp_path, code=130)
