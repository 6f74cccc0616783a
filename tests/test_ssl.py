"""Stage 1: the name that hides Python's ssl, the losses, the probe, the commands."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, run

import data
import video
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


def test_a_copied_ssl_py_may_have_classes_decorators_and_constants_that_need_torch(tmp_path):
    """Under the borrowed name torch is not there yet, and `import torch` itself comes through here."""
    for name in ("vit.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    mine = """
TEMPERATURES = torch.linspace(0.1, 0.5, 5)[1:]

class Teacher(nn.Module):
    def __init__(self, size: int = torch.iinfo(torch.uint8).max):
        super().__init__()

@torch.no_grad()
def averaged(teacher: nn.Module): ...
"""
    code = (ROOT / "ssl.py").read_text()
    head, mark, rest = code.partition(
        "# ---------------------------------------------------------------- Model M"
    )
    (tmp_path / "ssl.py").write_text(head + mine + mark + rest)
    assert "--task {infonce,m}" in run("ssl.py", "pretrain", "--help", cwd=tmp_path)
    assert str(tmp_path) not in run("-c", TLS, cwd=tmp_path).splitlines()[-1]


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
    loss, match = stage1.info_nce(z[:4], z[4:], temperature=0.3)
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
    in a tensor that stayed on the CPU, raises. So here is what all steps do, until Muon's update."""
    encoder = vit.ViT(dim=32, depth=2)
    m, contrastive = vit.ModelM(encoder).to("meta"), vit.Contrastive(encoder).to("meta")
    clips = video.FactorisedEncoder(encoder, 1, 4).to("meta")
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    loss, match = stage1.info_nce(*(contrastive(data.contrastive_view(images)) for _ in range(2)), 0.1)
    target = data.crop_flip(images)
    x, masked, _, angle = data.patch_augment(target)
    logits, painted = m(x, masked)
    loss = loss + F.cross_entropy(logits, angle) + stage1.paint_loss(painted, target, masked, 8)
    mixed, share = data.cutmix(target, torch.empty(8, dtype=torch.long, device="meta"), 4)
    loss = loss + F.cross_entropy(m(mixed, masked)[0], share)
    encoded = clips.encode(target)  # [8, D]
    loss = loss + clips.temporal(encoded.unflatten(0, (2, 4))).sum() + video.static(clips, images).sum()
    loss.backward()
    assert loss.is_meta and match.is_meta
    parameters = [p for name, p in m.named_parameters() if vit.INSIDE.search(name) and p.ndim > 1]
    optimizer = vit.Muon([{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "parts": 1}], lr=0.1)
    optimizer.step_matrices([optimizer.param_groups[0] | {"params": parameters}])


# ------------------------------------------------------------------------------------------------------------

TINY = ["--data", "synthetic", "--limit", 256, "--device", "cpu", "--precision", "float32", "--split", "test"]
FAST = ["--epochs", 1, "--batch", 64]
PRETRAIN = ["ssl.py", "pretrain", "--dim", 32, "--batch", 64, *TINY]
FINETUNE = ["ssl.py", "finetune", "--dim", 32, "--batch", 64, *TINY]


@pytest.mark.parametrize("name", ["infonce", "m", "finetune_scratch"])
def test_every_stage_lowers_its_loss(name, tmp_path):
    command = FINETUNE if name == "finetune_scratch" else [*PRETRAIN, "--task", name]
    call(*command, "--epochs", 8, "--lr", 4e-3, "--out", tmp_path)
    losses = vit.read_checkpoint(tmp_path / f"{name}.pt")["history"]["loss"]
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    "masked, turned, measures, idle",
    [(4, 0, {"loss", "mse"}, "rotation_head"), (0, 6, {"loss", "angle"}, "reconstruction_head")],
)
def test_half_of_model_m_trains_half_of_its_heads(tmp_path, masked, turned, measures, idle):
    """The other half stays, to the last bit, as it was drawn."""
    half = ["--task", "m", "--masked", masked, "--turned", turned]
    text = call(*PRETRAIN, *half, "--epochs", 2, "--keep-epochs", "--out", tmp_path)
    assert f"of 16 patches {masked} are blacked out, {turned} others turned" in text
    first, last = (vit.read_checkpoint(tmp_path / name) for name in ("m/epoch1.pt", "m.pt"))
    assert last["history"].keys() == measures
    changed = [k for k, value in last["model"].items() if not torch.equal(value, first["model"][k])]
    heads = {"encoder", "rotation_head", "reconstruction_head"}
    assert {key.split(".")[0] for key in changed} == heads - {idle}


def test_a_quarter_of_the_patches_is_masked_and_another_turned_whatever_their_size(tmp_path):
    text = call(*PRETRAIN, "--task", "m", *FAST, "--out", tmp_path)
    assert "of 16 patches 4 are blacked out, 4 others turned" in text
    text = call(*PRETRAIN, "--task", "m", "--patch", 4, *FAST, "--out", tmp_path / "small")
    assert "of 64 patches 16 are blacked out, 16 others turned" in text


def test_features_are_cls_and_the_mean_of_the_patch_tokens(stage1):
    encoder, images = vit.ViT(dim=16, depth=1).eval(), data.synthetic(5)[0]
    found = stage1.features(encoder, images, vit.contextlib.nullcontext())
    with torch.no_grad():
        tokens = encoder(images / 255)
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    torch.testing.assert_close(found["mean"], tokens[:, 1:].mean(1))


# ------------------------------------------------------------------------------------------------------------


def rows(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "rows").glob("*.json")}


def test_the_whole_of_stage_one_and_its_analysis_on_a_few_images(tmp_path, monkeypatch):
    out = ["--out", tmp_path, *TINY]
    call("ssl.py", "pretrain", "--task", "infonce", "--dim", 32, "--keep-epochs", *FAST, *out)
    call("ssl.py", "pretrain", "--task", "m", "--init", tmp_path / "infonce.pt", *FAST, *out)
    probes = [["pixels", "untrained", tmp_path / "m.pt"], ["untrained", "pixels"], [tmp_path / "m.pt"]]
    call("ssl.py", "probe", "--checkpoint", *probes[0], *out)
    tuned = ["ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", "--cutmix"]
    tuned += ["--epochs", 2, "--batch", 64, *out]
    call(*tuned)
    call("analysis.py", "maps", "cka", *out)
    found = rows(tmp_path)
    expected = {"pixels_probe", "untrained_probe", "m_probe", "finetune"}
    assert found.keys() == expected | {"cka_before", "cka_after", "maps_before", "maps_after"}
    for row in found.values():
        assert "SYNTHETIC" in row["provenance"] and (row["seed"], row["limit"]) == (0, 256)
        assert 0 <= row["value"] <= 1 and row["command"].startswith("python ") and len(row["images"]) == 12
    assert found["cka_before"]["precision"] == "float32"
    drawn = call("results/draw.py", *out)
    assert drawn.count(": drawn") == 4 and "learning.gif: 1 frames" in drawn  # not those of later stages
    text = call("results/table.py", *out)
    assert "0.7353" in text and "SYNTHETIC" in text and "MEAN NOTHING" in text
    report = (tmp_path / "report.md").read_text()
    assert f"{100 * found['m_probe']['value']:.2f} %" in report and "figures/curves.png" in report
    # alone, and in another place of the list: the same
    for probe in probes[1:]:
        call("ssl.py", "probe", "--checkpoint", *probe, *out)
    assert all(found[name]["value"] == row["value"] for name, row in rows(tmp_path).items())
    assert "finished before" in call(*tuned)
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a: (load(*a)[0] ^ 1, load(*a)[1]))  # others by the same name
    assert "made with another images" in call(*tuned, code=1)


def test_choosing_happens_on_validation_unless_the_test_split_is_asked_for(tmp_path):
    call("ssl.py", "probe", "--checkpoint", "pixels", "--out", tmp_path, *TINY[:-2])
    assert list(rows(tmp_path)) == ["pixels_probe_validation"]
    assert "pixels_probe" in call("results/table.py", "--out", tmp_path)
    assert "split: validation" in (tmp_path / "report.md").read_text()
    assert "no rows of the test split yet" in call(
        "results/table.py", "--out", tmp_path, "--split", "test", code=1
    )


@pytest.mark.parametrize(
    "line, code, message",
    [
        ("ssl.py finetune --batch 0", 2, "--batch 0 is not between 1 and"),
        ("ssl.py finetune --lr nan", 2, "--lr nan is not between"),
        ("ssl.py finetune --seed 4294967296", 2, "--seed 4294967296 is not between 0 and"),  # would be seed 0
        ("ssl.py pretrain --task m --data synthetic --limit 10", 1, "choose a smaller batch"),
        ("ssl.py pretrain --task m --data synthetic --limit 10 --patch 5", 1, "5-pixel patches"),
        ("ssl.py pretrain --task m --masked 17 --data synthetic --limit 10", 1, "must be 1 to 16 patches"),
        ("ssl.py pretrain --task m --masked 0 --turned 0 --data synthetic --limit 10", 1, "must be 1 to 16"),
        ("ssl.py finetune --dim 130 --data synthetic --limit 100", 1, "choose another --patch or --dim"),
        ("ssl.py finetune --labels 0.01 --data synthetic --limit 100", 1, "leaves 1; at least 10"),
        ("ssl.py finetune --device xpu:9 --data synthetic --limit 100", 1, "'xpu:9' can't be used"),
    ],
)
def test_mistakes_get_one_clear_sentence(tmp_path, line, code, message):
    assert message in call(*line.split(), *([] if code == 2 else ["--out", tmp_path]), code=code)


def test_a_width_left_to_its_default_and_the_same_width_typed_are_the_same_run(tmp_path):
    command = ["ssl.py", "pretrain", "--task", "m", "--out", tmp_path, *TINY, *FAST]
    call(*command)
    assert "finished before" in call(*command, "--dim", 128)


def test_a_start_of_other_contents_does_not_count_as_the_same_run(tmp_path):
    out = ["--out", tmp_path, "--dim", 32, *TINY, *FAST]
    call("ssl.py", "pretrain", "--task", "m", *out)
    call("ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", *out)
    call("ssl.py", "pretrain", "--task", "m", "--fresh", "--lr", 0.01, *out)
    assert "another start" in call("ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", *out, code=1)
    wide = ["ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", "--name", "x", *out, "--dim", 64]
    assert "has --dim 32, not 64" in call(*wide, code=1)


def test_a_name_may_be_a_path(tmp_path):
    call(*FINETUNE, *FAST, "--name", "sub/x", "--keep-epochs", "--out", tmp_path)
    assert (tmp_path / "sub/x/epoch1.pt").exists() and (tmp_path / "sub/x.pt").exists()
    assert "sub/x" in call("results/table.py", "--out", tmp_path, "--split", "test")


def test_interrupting_says_how_to_go_on_and_too_little_memory_what_to_do(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    def exhausted(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(data, "load", stop)
    assert "the same command (without --fresh) goes on" in call(
        "ssl.py", "finetune", "--out", tmp_path, code=130
    )
    monkeypatch.setattr(data, "load", exhausted)
    assert "choose a smaller --batch" in call("ssl.py", "finetune", "--out", tmp_path, code=1)


def test_a_fault_in_the_code_is_not_taken_for_too_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: torch.zeros(1).expand(2).add_(1))
    with pytest.raises(RuntimeError, match="single memory location"):
        call("ssl.py", "finetune", "--out", tmp_path)
