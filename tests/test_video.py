"""Stage 2: both factorisations against independent versions, the clips, the way static videos are judged,
the command."""

import json

import pytest
import torch
from conftest import call
from torch import nn

import data
import video
import vit

F = 4  # frames
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the same sums in another order


def small(kind, blocks=1, ordered=True):
    """A small model whose gates are open, so that everything in it matters; in training mode, where images
    are also judged by themselves."""
    model = video.MODELS[kind](vit.ViT(dim=32, depth=3), blocks, F, ordered=ordered)
    for name, p in model.named_parameters():
        if name.endswith("gate"):
            nn.init.ones_(p)
    return model


def clips(number=3, images=F):
    return data.synthetic(number * images)[0].view(number, images, 3, 32, 32) / 255


def in_order(x):
    """Every image of the clips [C, F, ...] in a frame of its own."""
    return torch.arange(x.shape[1]).expand(len(x), -1)


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


@pytest.mark.parametrize("blocks", [1, 2])
def test_divided_attention_equals_multihead_attention_over_patches_then_over_frames(blocks):
    """The oracle has no reshape of whole batches: it takes one frame, then one patch position, at a time."""
    model, x = small("divided", blocks), clips()
    with torch.no_grad():
        found, each = model(x, in_order(x))
        for c in range(len(x)):
            h = model.encoder.embed(x[c])  # [F, T, D]
            for i, block in enumerate(model.encoder.blocks):
                h = h + torch.cat([torch_attention(block.attn, block.norm1(h[f : f + 1])) for f in range(F)])
                if i >= 3 - blocks:
                    t = model.temporal[i - (3 - blocks)]
                    places = [t.norm(h[:, p] + t.positions)[None] for p in range(17)]  # [1, F, D] each
                    places = [torch_attention(t.attn, place)[0] for place in places]  # [F, D] each
                    h = h + torch.stack(places, dim=1)  # the gates are one
                h = h + block.mlp(block.norm2(h))
            cls = model.encoder.norm(h)[:, 0]  # [F, D]
            alone = model.frame_head(model.encoder(x[c])[:, 0])
            torch.testing.assert_close(found[c], model.head(cls.mean(dim=0)), **CLOSE)
            torch.testing.assert_close(each[c], alone, **CLOSE)


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_temporal_encoder_equals_torchs_transformer_encoder(blocks):
    model, x = small("encoder", blocks), clips()
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, blocks, norm=nn.LayerNorm(32), enable_nested_tensor=False).eval()
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
        "layers.": "blocks.",
    }
    state = model.state_dict()
    for key in theirs.state_dict():
        ours = key
        for a, b in names.items():
            ours = ours.replace(a, b)
        theirs.state_dict()[key].copy_(state[ours])
    with torch.no_grad():
        cls = torch.stack([model.encoder(clip)[:, 0] for clip in x]) + model.positions  # [C, F, D]
        x_in = torch.cat([model.cls.expand(len(x), -1, -1), cls], dim=1)
        torch.testing.assert_close(model(x, in_order(x))[0], model.head(theirs(x_in)[:, 0]), **CLOSE)


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
def test_divided_attention_starts_as_model_m_on_each_frame(blocks):
    encoder, x = vit.ViT(dim=32, depth=3).eval(), clips()
    model = video.FactorisedAttention(encoder, blocks, F)
    with torch.no_grad():
        cls = torch.stack([encoder(clip)[:, 0] for clip in x])  # [C, F, D]
        logits, each = model(x, in_order(x))
        torch.testing.assert_close(each, model.frame_head(cls))
        torch.testing.assert_close(logits, model.head(cls.mean(dim=1)))
    for temporal, block in zip(model.temporal, encoder.blocks[-blocks:]):
        assert all(torch.equal(a, b) for a, b in zip(temporal.attn.parameters(), block.attn.parameters()))
    logits, _ = model(x, in_order(x))
    logits.square().sum().backward()
    assert all(t.gate.grad.abs().min() > 0 for t in model.temporal), "without a gradient it would stay shut"


def test_the_temporal_encoder_starts_as_copies_of_model_ms_last_blocks():
    encoder = vit.ViT(dim=32, depth=3)
    model = video.FactorisedEncoder(encoder, 2, F)
    ours, theirs = list(model.blocks.parameters()), list(encoder.blocks[1:].parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------------


@both
def test_a_batch_of_clips_gives_what_the_clips_give_one_by_one(kind):
    model, x = small(kind, 2), clips()
    with torch.no_grad():
        one_by_one = [model(clip[None], in_order(x)[:1]) for clip in x]
        for together, alone in zip(model(x, in_order(x)), zip(*one_by_one)):
            torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@both
def test_no_gradient_flows_between_clips(kind):
    model, x = small(kind, 2), clips().requires_grad_()
    model(x, in_order(x))[0][0].sum().backward()
    assert x.grad[0].abs().amax(dim=(1, 2, 3)).min() > 0, "every frame of a clip has its say"
    assert x.grad[1:].abs().max() == 0


def test_outside_training_divided_attention_does_not_compute_what_nobody_reads():
    model, x = small("divided"), clips()
    logits, image_logits = model(x, in_order(x))
    again, nothing = model.eval()(x, in_order(x))
    assert image_logits is not None and nothing is None and torch.equal(logits, again)


@both
def test_an_image_classified_by_itself_gets_no_gradient_from_other_frames(kind):
    model, x = small(kind), clips().requires_grad_()
    model(x, in_order(x))[1][1, 2].sum().backward()
    others = x.grad.flatten(0, 1)[torch.arange(3 * F) != F + 2]
    assert x.grad[1, 2].abs().max() > 0 and others.abs().max() == 0


def test_the_temporal_step_mixes_the_same_patch_position_of_the_same_clip_only():
    temporal, x = small("divided").temporal[0], torch.randn(3, F, 17, 32, requires_grad=True)
    temporal(x)[1, 2, 5].sum().backward()
    seen = x.grad.abs().amax(dim=-1) > 0  # [C, F, T]
    expected = torch.zeros(3, F, 17, dtype=torch.bool)
    expected[1, :, 5] = True
    assert torch.equal(seen, expected)


@both
@pytest.mark.parametrize("ordered", [False, True])
def test_the_order_of_frames_matters_only_to_temporal_positions(kind, ordered):
    model, x = small(kind, 2, ordered), clips()
    with torch.no_grad():
        mixed = x[:, [2, 0, 3, 1]]
        difference = (model(x, in_order(x))[0] - model(mixed, in_order(x))[0]).abs().max()
    assert (difference > 1e-4) if ordered else (difference < 1e-5)


# -------------------------------------------------------------------------------------------------- clips


@both
@pytest.mark.parametrize("images", [1, 2])
def test_an_image_shown_in_several_frames_is_what_copies_of_it_are(kind, images):
    """With one image this is the static video, judged at the price of one image where frames do not mix."""
    model, x = small(kind, 2), clips(images=images)
    shown = (torch.arange(F) % images).expand(3, -1)
    with torch.no_grad():
        copies = x[:, shown[0]]
        torch.testing.assert_close(model(x, shown)[0], model(copies, in_order(copies))[0], **CLOSE)


@both
def test_predict_shows_the_images_in_turn_until_the_clip_is_full(kind):
    model, images = small(kind), data.synthetic(6)[0]
    found = video.predict(model, images, torch.tensor([[4, 1], [0, 5]]), F, vit.set_up("cpu", "float32"))
    with torch.no_grad():
        by_hand = [images[torch.tensor([shown])] / 255 for shown in ([4, 1, 4, 1], [0, 5, 0, 5])]
        by_hand = torch.cat([model(x, in_order(x))[0] for x in by_hand])
    torch.testing.assert_close(found, by_hand, **CLOSE)


def test_balanced_steps_hold_every_class_once_and_no_image_twice():
    labels = torch.arange(10).repeat_interleave(33)[:-6][torch.randperm(324)]  # the last class is smaller
    sampler = data.SameClassBatchSampler(labels, F)
    steps = video.clip_steps(sampler, labels.tolist(), 10, balanced=True)
    assert len(steps) == 27 // F
    for index in steps:
        assert index.shape == (10, F) and sorted(labels[index[:, 0]].tolist()) == list(range(10))
        assert (labels[index] == labels[index[:, :1]]).all()
    used = steps.flatten()
    assert len(used.unique()) == len(used)


def test_steps_that_are_not_balanced_use_every_whole_clip_in_random_order():
    labels = torch.arange(10).repeat_interleave(40)
    steps = video.clip_steps(data.SameClassBatchSampler(labels, F), labels.tolist(), 10, balanced=False)
    assert torch.equal(steps.flatten().sort().values, torch.arange(400))
    assert any(len(labels[index[:, 0]].unique()) < 10 for index in steps)


def test_random_repeats_show_1_to_f_images_as_evenly_as_they_go():
    shown = video.random_repeats(2000, F, torch.device("cpu"), torch.Generator().manual_seed(0))
    counts = torch.stack([row.bincount(minlength=F) for row in shown])  # [clips, F]: how often each image
    different = (counts > 0).sum(dim=1)
    for n in range(1, F + 1):
        some = counts[different == n]
        assert 400 < len(some) < 600 and (some[:, n:] == 0).all()
        assert (some[:, :n].amax(1) - some[:, :n].amin(1) <= 1).all()
    assert (shown[:, 0] > 0).any(), "frames come in random order"


# ------------------------------------------------------------------------------------------------------------


def test_augmentation_and_loss_stay_on_the_device_and_never_wait_for_it():
    """See the test of the same name in test_ssl.py."""
    model, device = small("encoder").to("meta"), torch.device("meta")
    images = torch.empty(2 * F, 3, 32, 32, dtype=torch.uint8, device=device)
    labels = torch.empty(2, dtype=torch.long, device=device)
    x = data.crop_flip(images).unflatten(0, (2, F))
    mixed, other, kept = data.cutmix(x.flatten(1, 2), labels)
    logits, each = model(mixed.view(x.shape), video.random_repeats(2, F, device))
    loss = video.clip_loss(logits, each, labels, other, kept, 0.1, 16.0)
    loss.backward()
    assert loss.is_meta and data.cutmix_accuracy(logits, labels, other, kept).is_meta


def test_the_loss_is_that_of_the_clip_plus_the_weighted_loss_of_its_images_each_with_both_labels():
    labels, other, kept = torch.tensor([3, 7]), torch.tensor([7, 0]), torch.tensor(0.7)
    logits, each = torch.randn(2, 10), torch.randn(2, F, 10)
    found = video.clip_loss(logits, each, labels, other, kept, smoothing=0.0, frame_loss=2.5)

    def loss(y):
        clip = -logits.log_softmax(1)[[0, 1], y].mean()
        own = torch.stack([-each.log_softmax(2)[c, f, y[c]] for c in range(2) for f in range(F)]).mean()
        return clip + 2.5 * own

    assert found.item() == pytest.approx((0.7 * loss(labels) + 0.3 * loss(other)).item(), rel=1e-5)
    alone = video.clip_loss(logits, each, labels, other, kept, smoothing=0.0, frame_loss=0.0)
    assert alone.item() == pytest.approx(data.cutmix_loss(logits, labels, other, kept, 0.0).item())


def test_cutmix_gives_all_frames_of_a_clip_one_rectangle_of_one_other_clip(tmp_path, pretrained, monkeypatch):
    """As the network sees it in training: a clip's frames, all of one colour, hold the same foreign
    pixels."""
    seen, forward = [], video.FactorisedEncoder.forward

    def look(model, images, shown, trace=None):
        if model.training:
            seen.append(images)
        return forward(model, images, shown, trace)

    monkeypatch.setattr(video.FactorisedEncoder, "forward", look)
    images, labels = data.synthetic(400)
    plain = (25 * labels).to(torch.uint8)[:, None, None, None].expand_as(images)  # a colour per class
    monkeypatch.setattr(data, "load", lambda *_: (plain, labels))
    options = ["--cutmix", 1, "--no-repeats", "--epochs", 1, "--out", tmp_path]
    call("video.py", "--checkpoint", pretrained, *options, *TINY)
    mixed = 0
    for clip in torch.cat(seen):  # [F, 3, 32, 32]
        colours = clip.unique()
        assert len(colours) <= 2 and (clip == clip[:1, :1]).all()
        mixed += len(colours) - 1
    assert mixed > 0


@both
def test_the_loss_falls(kind, tmp_path, pretrained):
    name = f"video_{kind}_1"
    call("video.py", "--checkpoint", pretrained, "--model", kind, "--epochs", 6, "--out", tmp_path, *TINY)
    losses = vit.read_checkpoint(tmp_path / f"{name}.pt")["history"]["loss"]
    assert losses[-1] < 0.97 * losses[0]


def test_the_stage_its_figures_and_its_rows(tmp_path, pretrained):
    command = ["video.py", "--checkpoint", pretrained, "--epochs", 1, "--out", tmp_path, *TINY]
    for model, blocks in (("encoder", 1), ("encoder", 2), ("divided", 1)):
        call(*command, "--model", model, "--blocks", blocks)
    report_clips = "--clips 1 --no-balanced --no-repeats --frame-loss 0 --name video_report_1"
    call(*command, *report_clips.split())
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {"video_encoder_1", "video_encoder_2", "video_divided_1", "video_report_1"} == rows.keys()
    for row in rows.values():
        assert row["value"] == row["different"]["1"] and list(row["different"]) == ["1", "2", "4", "8", "16"]
    assert rows["video_report_1"]["report"] == 0.4404
    drawn = call("analysis.py", "figures", "--out", tmp_path, *TINY)
    assert "video.png" in drawn and "clips.png" in drawn, drawn
    assert "video_encoder_1" in call("analysis.py", "report", "--out", tmp_path, *TINY)
    assert "finished before" in call(*command)
    call("ssl.py", "probe", "--checkpoint", tmp_path / "video_divided_1.pt", "--out", tmp_path, *TINY)
    assert "made with another frames: 16, not 8" in call(*command, "--frames", 8, code=1)


def test_a_model_without_temporal_blocks_has_no_clips_to_show():
    """As when a student takes the mean of the frames instead: the stage still ends with its row."""
    model = small("encoder")
    model.blocks = nn.ModuleList()
    images, labels = torch.zeros(2 * F, 3, 32, 32, dtype=torch.uint8), torch.arange(2 * F) % 2
    assert video.clips_for_the_figure(model, images, labels, F) == {}


def test_a_run_that_was_stopped_goes_on_with_the_clips_it_would_have_had(tmp_path, pretrained):
    """Epoch 2 has other clips than epoch 1; a run of two epochs equals a run whose second epoch is done by
    a new process."""
    options = "--frames 4 --no-positions --cutmix 1 --epochs 2".split()
    command = ["video.py", "--checkpoint", pretrained, *options, *TINY]
    call(*command, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:

        def stop_after_saving(run, save=vit.Run.save, **measured):
            save(run, **measured)
            raise KeyboardInterrupt

        patch.setattr(vit.Run, "save", stop_after_saving)
        call(*command, "--out", tmp_path / "parts", code=130)
    assert "going on after epoch 1" in call(*command, "--out", tmp_path / "parts")
    whole, parts = (vit.read_checkpoint(tmp_path / p / "video_encoder_1.pt") for p in ("whole", "parts"))
    assert whole["history"] == parts["history"]
    assert all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"])
    assert "measured before" in call(*command, "--out", tmp_path / "parts")
    images, labels = data.load("synthetic", "train", limit=400)
    sampler = data.SameClassBatchSampler(labels, 4)
    first = video.clip_steps(sampler, labels.tolist(), 10, True)
    sampler.set_epoch(1)
    assert not torch.equal(first, video.clip_steps(sampler, labels.tolist(), 10, True))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--limit", 100], "fewer than one same-class batch of 16"),
        (["--blocks", 7], "has only 6 blocks"),
        (["--clips", 100], "fewer than one step"),
        (["--checkpoint", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    ],
)
def test_mistakes_get_one_clear_sentence(tmp_path, pretrained, more, message):
    assert message in call("video.py", "--checkpoint", pretrained, "--out", tmp_path, *TINY, *more, code=1)
