"""Stage 2: both factorisations against independent versions, the clips, the way static videos are judged,
the command."""

import json

import numpy as np
import pytest
import torch
from conftest import call
from torch import nn

import data
import video
import vit

F = 4  # frames
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the same sums in another order


def small(kind, blocks=1):
    """A small model whose gates are open, so that everything in it matters."""
    model = video.MODELS[kind](vit.ViT(dim=32, depth=3), blocks, F).eval()
    for name, p in model.named_parameters():
        if name.endswith("gate"):
            nn.init.ones_(p)
    return model


def clips(number=3, images=F):
    """[C, F, 3, S, S] in [0, 1]."""
    return data.synthetic(number * images)[0].view(number, images, 3, 32, 32) / 255


def answer(model, x):
    """Class logits [C, K] of clips [C, F, 3, S, S]."""
    return model.temporal(model.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


both = pytest.mark.parametrize("kind", ["encoder", "divided"])

TINY = ["--data", "synthetic", "--limit", 400, "--device", "cpu", "--precision", "float32", "--split", "test"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("m")
    call("ssl.py", "pretrain", "--task", "m", "--dim", 32, "--epochs", 1, "--out", out, *TINY)
    return out / "m.pt"


# ------------------------------------------------------------------------------------------------------------


def torch_attention(ours, x):
    """nn.MultiheadAttention with our weights: [B, T, D] -> [B, T, D]."""
    theirs = nn.MultiheadAttention(x.shape[-1], ours.heads, batch_first=True).eval()
    theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    return theirs(x, x, x)[0]


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
def test_divided_attention_equals_multihead_attention_over_patches_then_over_frames(blocks):
    """The oracle has no reshape of whole batches: it takes one frame, then one patch position, at a time."""
    model, x = small("divided", blocks), clips()
    found = answer(model, x)
    for c in range(len(x)):
        h = model.encoder.embed(x[c])  # [F, T, D]
        for i, block in enumerate(model.encoder.blocks):
            h = h + torch.cat([torch_attention(block.attn, block.norm1(h[f : f + 1])) for f in range(F)])
            if i >= 3 - blocks:
                t = model.temporals[i - (3 - blocks)]
                places = [t.norm(h[:, p] + t.positions)[None] for p in range(17)]  # [1, F, D] each
                places = [torch_attention(t.attn, place)[0] for place in places]  # [F, D] each
                h = h + torch.stack(places, dim=1)  # the gates are one
            h = h + block.mlp(block.norm2(h))
        cls = model.encoder.norm(h)[:, 0]  # [F, D]
        torch.testing.assert_close(found[c], model.head(cls.mean(dim=0)), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_temporal_encoder_equals_torchs_transformer_encoder(blocks):
    model, x = small("encoder", blocks), clips()
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, blocks, norm=nn.LayerNorm(32), enable_nested_tensor=False).eval()
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj."}
    names |= {"linear1.": "mlp.0.", "linear2.": "mlp.2.", "layers.": "blocks."}
    state = model.state_dict()
    for key in theirs.state_dict():
        ours = key
        for a, b in names.items():
            ours = ours.replace(a, b)
        theirs.state_dict()[key].copy_(state[ours])
    cls = torch.stack([model.encoder(clip)[:, 0] for clip in x]) + model.positions  # [C, F, D]
    tokens = torch.cat([model.cls.expand(len(x), -1, -1), cls], dim=1)
    torch.testing.assert_close(answer(model, x), model.head(theirs(tokens)[:, 0]), **CLOSE)


@pytest.mark.parametrize("blocks", [1, 2])
def test_divided_attention_starts_as_model_m_on_each_frame(blocks):
    encoder, x = vit.ViT(dim=32, depth=3).eval(), clips()
    model = video.FactorisedAttention(encoder, blocks, F)
    with torch.no_grad():
        cls = torch.stack([encoder(clip)[:, 0] for clip in x])  # [C, F, D]
        torch.testing.assert_close(answer(model, x), model.head(cls.mean(dim=1)))
    for temporal, block in zip(model.temporals, encoder.blocks[-blocks:]):
        assert all(torch.equal(a, b) for a, b in zip(temporal.attn.parameters(), block.attn.parameters()))
    answer(model, x).square().sum().backward()
    assert all(t.gate.grad.abs().min() > 0 for t in model.temporals), "without a gradient it would stay shut"


def test_the_temporal_encoder_starts_as_copies_of_model_ms_last_blocks():
    encoder = vit.ViT(dim=32, depth=3)
    model = video.FactorisedEncoder(encoder, 2, F)
    ours, theirs = list(model.blocks.parameters()), list(encoder.blocks[1:].parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------------


@both
def test_a_static_video_is_a_clip_of_copies_at_the_price_of_one_image(kind):
    model, images = small(kind, 2), data.synthetic(3)[0]
    with torch.no_grad():
        copies = torch.stack([images] * F, dim=1).float() / 255  # [3, F, 3, S, S]
        torch.testing.assert_close(video.static(model, images), answer(model, copies), **CLOSE)
        assert video.repeated(model.encode(copies[:, 0]), F).stride(1) == 0, "expanded, not copied"


@both
def test_only_temporal_positions_know_the_order_of_frames(kind):
    model, x = small(kind, 2), clips()
    with torch.no_grad():
        mixed = x[:, [2, 0, 3, 1]]
        assert (answer(model, x) - answer(model, mixed)).abs().max() > 1e-4
        for name, p in model.named_parameters():
            if name.endswith("positions") and not name.startswith("encoder."):
                p.zero_()
        torch.testing.assert_close(answer(model, x), answer(model, mixed), **CLOSE)


def test_an_epochs_steps_hold_whole_clips_of_one_class_and_no_image_twice():
    labels = torch.arange(10).repeat_interleave(33)[torch.randperm(330)]
    steps = torch.stack(list(video.clip_batches(data.SameClassBatchSampler(labels, F), 10)))  # [steps, C, F]
    assert steps.shape == (8, 10, F) and len(steps.unique()) == steps.numel()
    assert (labels[steps] == labels[steps[..., :1]]).all()
    assert any(len(labels[step[:, 0]].unique()) > 5 for step in steps)


# ------------------------------------------------------------------------------------------------------------


@both
def test_the_loss_falls_and_the_row_is_the_accuracy_on_static_videos(kind, tmp_path, pretrained):
    command = ["video.py", "--checkpoint", pretrained, "--model", kind, "--blocks", 2, "--out", tmp_path]
    call(*command, "--epochs", 6, "--frame-loss", 1, *TINY)
    name = "video_divided" if kind == "divided" else "video_2"
    state = vit.read_checkpoint(tmp_path / f"{name}.pt")
    assert state["history"]["loss"][-1] < 0.97 * state["history"]["loss"][0]
    model = video.MODELS[kind](vit.ViT(**state["config"]), 2, 16)
    model.load_state_dict(state["model"])
    images, labels = data.load("synthetic", "test", limit=400)
    row = json.loads((tmp_path / f"rows/{name}.json").read_text())
    assert row["value"] == pytest.approx(vit.accuracy(video.static(model, images), labels))
    assert vit.load_encoder(tmp_path / f"{name}.pt").config["dim"] == 32


def test_clips_alone_give_no_gradient_to_images_by_themselves(tmp_path, pretrained, monkeypatch):
    shown, repeated = [], video.repeated
    monkeypatch.setattr(
        video, "repeated", lambda x, frames: (shown.append(x.requires_grad), repeated(x, frames))[1]
    )
    command = ["video.py", "--checkpoint", pretrained, "--epochs", 1, *TINY]
    call(*command, "--frame-loss", 0, "--name", "clips_1", "--out", tmp_path)
    assert not any(shown)  # only where nothing is learned
    call(*command, "--out", tmp_path)
    assert any(shown)
    stored = np.load(tmp_path / "rows/video_1.npz")
    assert stored["weights"].shape == (10, 17) and np.allclose(stored["weights"].sum(1), 1, atol=1e-5)
    images, labels = data.load("synthetic", "test", limit=400)
    assert (stored["images"][3] == images[labels == 3][:16].numpy()).all()
    assert "clips: drawn" in call("results/draw.py", "--out", tmp_path, *TINY)


def test_a_run_that_was_stopped_goes_on_with_the_clips_it_would_have_had(tmp_path, pretrained):
    """Epoch 2 has other clips than epoch 1; a run of two epochs equals a run whose second epoch is done by
    a new process."""
    command = ["video.py", "--checkpoint", pretrained, "--frames", 4, "--epochs", 2, *TINY]
    call(*command, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:

        def stop_after_saving(run, save=vit.Run.save, **measured):
            save(run, **measured)
            raise KeyboardInterrupt

        patch.setattr(vit.Run, "save", stop_after_saving)
        call(*command, "--out", tmp_path / "parts", code=130)
    assert "going on after epoch 1" in call(*command, "--out", tmp_path / "parts")
    whole, parts = (vit.read_checkpoint(tmp_path / p / "video_1.pt") for p in ("whole", "parts"))
    assert whole["history"] == parts["history"]
    assert all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--limit", 100], "fewer than one batch of 16"),
        (["--blocks", 7], "has only 6 blocks"),
        (["--clips", 100], "too few for one step"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt: there is no checkpoint"),
    ],
)
def test_mistakes_get_one_clear_sentence(tmp_path, pretrained, more, message):
    assert message in call("video.py", "--checkpoint", pretrained, "--out", tmp_path, *TINY, *more, code=1)
