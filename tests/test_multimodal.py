"""Stage 3: cross-attention against torch's own, captions and embeddings against the libraries', the
commands."""

import argparse
import errno
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import call, run
from torch import nn

import analysis
import data
import multimodal
import video
import vit

D, E, F = 32, 24, 4  # width, width of the embedding, frames


@pytest.fixture(scope="module", autouse=True)
def libraries_speak_again():
    import logging

    yield
    logging.disable(logging.NOTSET)


def randomise(model):
    """No zeros: everything in the model matters."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval()


def small_fusion(**sees):
    return multimodal.Fusion(video.FactorisedEncoder(vit.ViT(dim=D, depth=2), 1, F), E, **sees)


def torch_attention(ours):
    """nn.MultiheadAttention with our weights."""
    theirs = nn.MultiheadAttention(D, ours.heads, batch_first=True).eval()
    theirs.in_proj_weight = nn.Parameter(torch.cat([ours.q.weight, ours.kv.weight]))
    theirs.in_proj_bias = nn.Parameter(torch.cat([ours.q.bias, ours.kv.bias]))
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    return theirs


# ------------------------------------------------------------------------------------------------------------


def test_cross_attention_equals_multihead_attention_with_padding():
    ours, x, text = randomise(multimodal.CrossAttention(D, 4)), torch.randn(3, 5, D), torch.randn(3, 7, D)
    real = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    out, weights = ours(x, text, real)
    options = {"key_padding_mask": ~real, "average_attn_weights": False}
    expected, expected_weights = torch_attention(ours)(x, text, text, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    text[~real] = 100.0
    torch.testing.assert_close(ours(x, text, real)[0], out)  # what stands in the padding is of no account


def test_one_key_makes_cross_attention_a_linear_map():
    """With a single text vector the weights are one whatever is asked, so they can't choose: every x gets
    proj(V text)."""
    ours, text = randomise(multimodal.CrossAttention(D, 4)), torch.randn(3, 1, D)
    out, weights = ours(torch.randn(3, 5, D), text)
    assert torch.equal(weights, torch.ones(3, 4, 5, 1))
    torch.testing.assert_close(out, ours.proj(ours.kv(text)[..., D:]).expand(-1, 5, -1))
    out.sum().backward()
    # queries and keys learn nothing
    assert ours.q.weight.grad.abs().max() < 1e-6 and ours.kv.weight.grad[:D].abs().max() < 1e-6
    assert ours.kv.weight.grad[D:].abs().max() > 0.1


def test_cross_block_equals_a_pre_norm_decoder_layer_without_self_attention():
    ours, x, text = randomise(multimodal.CrossBlock(D, 4)), torch.randn(3, 5, D), torch.randn(3, 7, D)
    theirs = nn.TransformerDecoderLayer(D, 4, 4 * D, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    nn.init.zeros_(theirs.self_attn.out_proj.weight)
    theirs.multihead_attn = torch_attention(ours.attn)
    theirs.norm2, theirs.norm3 = ours.norm1, ours.norm2
    theirs.linear1, theirs.linear2 = ours.mlp[0], ours.mlp[2]
    torch.testing.assert_close(ours(x, text), theirs(x, ours.norm_text(text)))


def test_fusion_starts_as_the_video_model_it_was_made_from():
    model, images = small_fusion().eval(), data.synthetic(6)[0].float() / 255
    shown = torch.zeros(6, F, dtype=torch.long)
    torch.testing.assert_close(model(images, torch.randn(6, 3, E)), model.video(images[:, None], shown)[0])


def test_the_temporal_cls_gets_the_same_whether_or_not_the_other_tokens_ask_too():
    model, images, text = randomise(small_fusion()), data.synthetic(6)[0].float() / 255, torch.randn(6, 3, E)
    tokens, _ = model.video.tokens(images[:, None], torch.zeros(6, F, dtype=torch.long))  # [6, 1 + F, D]
    all_ask = model.block(tokens, model.project(text))
    torch.testing.assert_close(model(images, text), model.video.head(model.video.norm(all_ask[:, 0])))


def test_the_controls_see_only_what_they_should():
    images, text = data.synthetic(6)[0].float() / 255, torch.randn(6, 3, E)
    both, text_only = randomise(small_fusion()), randomise(small_fusion(image=False))
    assert not torch.allclose(both(images, text), both(images, text.flip(0)))
    assert not torch.allclose(both(images, text), both(images.flip(0), text))
    torch.testing.assert_close(text_only(images, text), text_only(images.flip(0), text))
    assert not torch.allclose(text_only(images, text), text_only(images, text.flip(0)))
    image_only = randomise(small_fusion(text=False))
    assert torch.equal(image_only(images, text), image_only(images, text.flip(0)))
    assert not torch.allclose(image_only(images, text), image_only(images.flip(0), text))


def test_the_text_is_let_in_by_training():
    model, images, text = small_fusion(), data.synthetic(6)[0].float() / 255, torch.randn(6, 3, E)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # first the zero projection moves, then what lies before it
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images, text), torch.arange(6)).backward()
        optimizer.step()
    assert model.project.weight.grad.abs().max() > 0
    assert not torch.allclose(model(images, text), model(images, text.flip(0)))


# -------------------------------------------------------------------------------------------------- captions


def test_sentences_say_what_can_be_measured():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    images[0, 1] = 100  # dark green, and a small white square
    images[0, :, 12:20, 12:20] = 255
    images[1, 0:2] = 250  # yellow, and a large black square
    images[1, :, 4:28, 4:28] = 0
    images[2] = 200  # nothing but light grey
    found = multimodal.sentences(images, torch.tensor([3, 8, 0]), data.CLASSES)
    assert found == [
        "the cat on dark green far away",
        "the ship on bright yellow close up",
        "the airplane on bright grey far away",
    ]


@pytest.mark.parametrize(
    "caption, name",
    [
        ("a cat on dark green", "cat"),
        ("two blurry puppies and Dogs by a truck", "dog"),
        ("a jet in the sky", "airplane"),
        ("a catalogue", None),
        ("", None),
        ("an old CAR.", "automobile"),
        ("a bus", None),
        ("horses", "horse"),
    ],
)
def test_the_class_named_in_a_caption(caption, name):
    assert multimodal.named_class(caption, data.CLASSES) == (data.CLASSES.index(name) if name else -1)


def test_a_torn_last_line_is_dropped_and_another_file_is_refused(tmp_path):
    path = tmp_path / "captions.jsonl"
    about = {"captioner": "blip", "model": "b", "dataset": "cifar10"}
    whole = json.dumps({"image": "ab", "split": "train", "index": 0, "caption": "a \u00e9l\u00e9phant"})
    path.write_text(f'{json.dumps(about)}\n{whole}\n{{"image": "cd", "ind')
    assert multimodal.read_captions(path) == (about, {"ab": "a \u00e9l\u00e9phant"})
    for content in ("", "hello\n", '{"split": "train"}\n', json.dumps(about) + "\n[1]\n"):
        path.write_text(content)
        with pytest.raises(SystemExit, match="is not a caption file"):
            multimodal.read_captions(path)
    with pytest.raises(SystemExit, match="there is no caption file"):
        multimodal.read_captions(tmp_path / "nowhere")


def test_a_caption_file_from_an_editor_keeps_its_last_caption_and_may_have_blank_lines(tmp_path):
    path, about = tmp_path / "captions.jsonl", {"captioner": "blip", "model": "b", "dataset": "cifar10"}
    captions = {f"image {i}": f"caption {i}" for i in range(3)}
    multimodal.write_captions(path, about, captions)
    whole = path.read_text()
    for text in (whole, whole.removesuffix("\n"), whole.replace("\n", "\n\n"), whole.replace("\n", "\r\n")):
        path.write_text(text)
        assert multimodal.read_captions(path) == (about, captions)


def test_a_caption_file_is_written_every_few_seconds(finished, monkeypatch):
    """What is left to an accident is the last ten seconds' work."""
    hours = itertools.count(step=3600)
    written, write = [], multimodal.write_captions
    monkeypatch.setattr(multimodal.time, "perf_counter", lambda: next(hours))
    monkeypatch.setattr(multimodal, "load_blip", lambda *_: (None, None))
    monkeypatch.setattr(multimodal, "describe", lambda model, _, images, *__: ["a cat"] * len(images))
    monkeypatch.setattr(multimodal, "write_captions", lambda *a: (written.append(len(a[2])), write(*a)))
    stage("multimodal.py caption --captioner tiny --batch 80 --name often", finished)
    assert sorted(set(written)) == list(range(80, 3 * 320 + 1, 80))


@pytest.mark.parametrize("fault", ["a decoder layer is missing", "no captioner at all"])
def test_a_captioner_with_weights_missing_is_refused(finished, tmp_path, fault):
    """The library would fill them in at random, and the captions would be nonsense."""
    import safetensors.torch

    folder = tmp_path / "blip"
    shutil.copytree(finished / "tiny_blip_0", folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    part = "text_decoder.bert.encoder.layer.1" if "layer" in fault else "text_decoder"
    kept = {key: value for key, value in state.items() if not key.startswith(part)}
    assert len(kept) < len(state)
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="is no BLIP captioner: it has no weights for text_decoder"):
        multimodal.load_blip(str(folder), None, torch.device("cpu"))


def test_words_are_spelled_as_written_and_cut_where_clip_cuts(tmp_path):
    small_clip(tmp_path)
    captions = ["un été", "a cat " * 20]
    found = multimodal.embed_words(*multimodal.load_clip(f"local-dir:{tmp_path}", None), captions)
    assert found["un été"][0] == "<start> un é té <end>"  # not Ã©
    long = found[captions[1]][0].split()
    assert len(long) == 16 and long[-1] == "<end>"


# ------------------------------------------------------------------------------------------------------------


def test_a_small_blip_can_not_start_from_an_encoder_with_a_stem(tmp_path):
    stage(f"ssl.py pretrain --task m --dim {D} --stem {FAST}", tmp_path)
    assert "made with --stem" in stage(f"multimodal.py tiny --checkpoint OUT/m.pt {FAST}", tmp_path, code=1)


def test_a_full_disk_where_a_small_blip_is_written_is_one_sentence(finished, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.BlipForConditionalGeneration, "save_pretrained", full)
    text = stage(f"multimodal.py tiny --checkpoint OUT/m.pt --frozen 4 {FAST}", finished, code=1)
    assert "can't write" in text and "No space left" in text


def test_frozen_blocks_of_the_small_blips_stay_those_of_the_encoder(finished):
    towers = [vit.read_checkpoint(finished / f"tiny_blip_{fold}.pt")["model"] for fold in (0, 1)]
    start = vit.load_encoder(finished / "m.pt").state_dict()
    for i in range(6):
        ours = start[f"blocks.{i}.attn.qkv.weight"]
        theirs = [tower[f"vision_model.encoder.layers.{i}.self_attn.qkv.weight"] for tower in towers]
        assert all(torch.equal(ours, weight) == (i < 4) for weight in theirs)


def test_the_small_blips_image_tower_is_our_encoder():
    encoder, images = randomise(vit.ViT(dim=D, depth=3)), data.synthetic(4)[0]
    blip, processor = multimodal.small_blip(encoder, data.CLASSES, 32)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, vit.standardise(images.float() / 255))
    found = blip.eval().vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, encoder(images.float() / 255), rtol=1e-4, atol=1e-5)


def test_enlarged_images_get_positions_in_between():
    """The library can interpolate positions while it runs; ours, interpolated beforehand, give the same
    tokens."""
    encoder, images = randomise(vit.ViT(dim=D, depth=1)), data.synthetic(4)[0]
    plain, _ = multimodal.small_blip(encoder, data.CLASSES, 32)
    enlarged, processor = multimodal.small_blip(encoder, data.CLASSES, 48)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, 48, 48)
    found = enlarged.eval().vision_model(pixel_values=pixels).last_hidden_state  # [4, 1 + 36, D]
    expected = plain.eval().vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_small_blip_knows_every_word_of_its_sentences():
    images, labels = data.synthetic(300)
    _, processor = multimodal.small_blip(vit.ViT(dim=D, depth=1), data.SHAPES, 32)
    truth = multimodal.sentences(images, labels, data.SHAPES)
    ids = processor.tokenizer(truth, return_tensors="pt")["input_ids"]
    ids[:, 0] = processor.tokenizer.bos_token_id  # what BLIP's decoder starts from
    assert processor.tokenizer.unk_token_id not in ids and ids.shape[1] == 2 + len(truth[0].split())
    assert processor.batch_decode(ids, skip_special_tokens=True) == truth


def small_clip(folder):
    """A small open_clip model as a folder that open_clip itself can load."""
    import open_clip

    model = randomise(open_clip.CLIP(**multimodal.small_clip(32)))
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": multimodal.small_clip(32)}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model


def test_an_open_clip_checkpoint_is_loaded_from_a_folder_and_from_a_file(tmp_path):
    import open_clip

    saved = small_clip(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(multimodal.small_clip(32)))
    open_clip.add_model_config(tmp_path / "small.json")
    kinds = [(f"local-dir:{tmp_path}", None), ("small", str(tmp_path / "open_clip_pytorch_model.bin"))]
    for name, weights in kinds:
        model, tokenizer = multimodal.load_clip(name, weights)
        tokens = tokenizer(["a cat", "two dogs on a red boat"])
        torch.testing.assert_close(model.encode_text(tokens), saved.encode_text(tokens))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"not weights")
    for name, weights in [*kinds, ("no such model", None)]:
        with pytest.raises(SystemExit, match="can't load the CLIP"):
            multimodal.load_clip(name, weights)


def test_a_clip_with_weights_missing_is_refused(tmp_path):
    state = small_clip(tmp_path).state_dict()
    del state["transformer.resblocks.1.attn.in_proj_weight"]
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(SystemExit, match="can't load the CLIP"):
        multimodal.load_clip(f"local-dir:{tmp_path}", None)


def test_a_text_tower_that_is_built_otherwise_is_refused(tmp_path):
    import open_clip

    config = multimodal.small_clip(32) | {
        "text_cfg": multimodal.small_clip(32)["text_cfg"] | {"proj_bias": True}
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config | {"custom_text": True}}))
    torch.save(open_clip.CustomTextCLIP(**config).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(SystemExit, match="built otherwise"):
        multimodal.load_clip(f"local-dir:{tmp_path}", None)


def test_the_last_word_is_clips_own_embedding_and_no_word_knows_a_later_one(tmp_path):
    small_clip(tmp_path)
    model, tokenizer = multimodal.load_clip(f"local-dir:{tmp_path}", None)
    captions = ["a cat", "a cat on dark green", "two dogs"]
    found = multimodal.embed_words(model, tokenizer, captions)
    words, states = zip(*found.values())
    assert words[0] == "<start> a cat <end>" and list(found) == captions
    assert [len(s) for s in states] == [len(w.split()) for w in words] == [4, 7, 4]
    last = torch.stack([s[-1] for s in states])
    torch.testing.assert_close(last, model.encode_text(tokenizer(captions), normalize=True))
    torch.testing.assert_close(states[0][:3], states[1][:3])  # <start> a cat


# ------------------------------------------------------------------------------------------------------------

FEW = "--data synthetic --limit 320 --device cpu --precision float32"
FAST = "--epochs 1 --batch 32"


def stage(line, out, code=0):
    """What `python LINE` prints, OUT in it standing for the folder `out`, with a few synthetic images."""
    return call(*f"{line} --out OUT {FEW}".replace("OUT", str(out)).split(), code=code)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole stage on a few images: its folder."""
    out = tmp_path_factory.mktemp("language")
    stage(f"ssl.py pretrain --task m --dim {D} {FAST}", out)
    stage(f"video.py --checkpoint OUT/m.pt --blocks 2 --frames {F} --clips 2 --epochs 1", out)
    stage(f"multimodal.py tiny --checkpoint OUT/m.pt --frozen 4 {FAST}", out)
    stage("multimodal.py caption --captioner tiny --batch 100", out)
    stage("multimodal.py caption --captioner tiny --batch 100 --seen", out)
    stage("multimodal.py embed --captions OUT/captions_tiny.jsonl", out)
    stage("multimodal.py embed --captions OUT/captions_tiny_seen.jsonl", out)
    fuse = f"multimodal.py fuse {FAST} --captions"
    stage(f"{fuse} OUT/captions_tiny.jsonl --control none image_only text_only shuffled", out)
    stage(f"{fuse} OUT/captions_tiny.jsonl --text tokens", out)
    stage(f"{fuse} OUT/captions_tiny_seen.jsonl", out)
    return out


def test_the_whole_stage_leaves_its_rows_and_figures(finished):
    rows = vit.read_results(finished)["rows"]
    expected = {f"{name}_validation" for name in analysis.language_rows("tiny")}
    assert expected - rows.keys() == {"fusion_tiny_1_validation"}
    ours = [row for name, row in rows.items() if name.startswith(("fusion", "captions"))]
    assert all(row["captioner"] == "tiny" for row in ours)
    drawn = stage("analysis.py figures", finished)
    assert all(f"figures/{name}.png" in drawn for name in ("captions", "words", "controls"))
    table = stage("analysis.py report", finished)
    assert "fusion_tiny_tokens" in table and "70.13" not in table  # that was with BLIP's captions
    stored = np.load(finished / "fusion_tiny_tokens_validation.npz")
    # between <start> and <end>
    assert [" ".join(w.split()[1:-1]) for w in stored["words"]] == stored["captions"].tolist()
    for sentence, weights in zip(stored["words"], stored["weights"]):
        assert weights.sum() == pytest.approx(1, abs=1e-5) and (weights[len(sentence.split()) :] == 0).all()
    assert vit.load_encoder(finished / "fusion_tiny.pt").config["dim"] == D  # as of any stage


def test_the_real_models_way_with_small_ones_from_folders(finished, tmp_path):
    """BLIP and CLIP by name or folder, whatever their size: every step, row and picture says blip."""
    tiny = f"{finished}/tiny_blip_0"
    stage(f"multimodal.py caption --captioner blip --blip {tiny}", tmp_path)
    header, captions = multimodal.read_captions(tmp_path / "captions_blip.jsonl")
    assert (header["captioner"], header["model"]) == ("blip", tiny) and len(captions) == 3 * 320
    clip = f"local-dir:{finished}/tiny_clip"
    stage(f"multimodal.py embed --captions OUT/captions_blip.jsonl --clip {clip}", tmp_path)
    fuse = f"multimodal.py fuse {FAST} --captions OUT/captions_blip.jsonl --control none image_only"
    stage(f"{fuse} --checkpoint {finished}/video_encoder_2.pt", tmp_path)
    rows = vit.read_results(tmp_path)["rows"]
    names = ("captions_blip", "fusion_blip", "fusion_blip_image_only")
    assert rows.keys() == {f"{name}_validation" for name in names}
    row = rows["fusion_blip_validation"]
    assert row["report"] == multimodal.REPORTED["fusion_blip"] and "tiny_clip" in row["clip"]
    assert "figures/captions.png" in stage("analysis.py figures", tmp_path)
    assert "70.13 %" in stage("analysis.py report", tmp_path)


def test_captions_are_the_same_after_a_kill(finished):
    path = finished / "captions_tiny.jsonl"
    before, raw = multimodal.read_captions(path), path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])  # mid-line, mid-batch
    stage("multimodal.py caption --captioner tiny --batch 100", finished)
    assert multimodal.read_captions(path) == before and len(path.read_bytes()) == len(raw)


def test_every_caption_is_embedded_once_and_new_ones_are_added(finished):
    assert " 0 to embed" in stage("multimodal.py embed --captions OUT/captions_tiny.jsonl", finished)
    clip, before = multimodal.read_embeddings(finished / "captions_tiny_clip.pt")
    # brought in from another machine, under the same name
    more = finished / "elsewhere" / "captions_tiny.jsonl"
    more.parent.mkdir()
    line = b'{"image": "0", "split": "train", "index": 999, "caption": "a brand new caption"}\n'
    more.write_bytes((finished / "captions_tiny.jsonl").read_bytes() + line)
    assert " 1 to embed" in stage(f"multimodal.py embed --captions {more}", finished)
    same, after = multimodal.read_embeddings(finished / "captions_tiny_clip.pt")
    assert same == clip and list(after) == [*before, "a brand new caption"]
    assert all(after[c][0] == before[c][0] and torch.equal(after[c][1], before[c][1]) for c in before)


def test_a_captioner_has_not_seen_the_labels_of_the_images_it_captions(tmp_path, monkeypatch):
    """Other labels for the images of fold 0 change nothing in the captioner of fold 0, and everything in
    that of fold 1."""
    encoder = vit.ViT(dim=D, depth=1)
    state = {"config": encoder.config, "epoch": 1, "settings": {"stage": "pretrain"}}
    state["model"] = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    images, labels = data.synthetic(128)
    weights = []
    for change in (0, 1):
        other = torch.where(torch.arange(128) % 2 == 0, (labels + change) % 10, labels)
        monkeypatch.setattr(data, "load", lambda *_, other=other: (images, other))
        out = tmp_path / str(change)
        stage(f"multimodal.py tiny --checkpoint {tmp_path}/m.pt --enlarge 32 {FAST}", out)
        weights.append([vit.read_checkpoint(out / f"tiny_blip_{fold}.pt")["model"] for fold in (0, 1)])
    same = [all(torch.equal(v, b[k]) for k, v in a.items()) for a, b in zip(*weights)]
    assert same == [True, False]


def test_without_a_network_the_commands_that_fetch_are_named(finished, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    few = ["--out", tmp_path, *FEW.split()]
    text = run("multimodal.py", "caption", "--captioner", "blip", *few, code=multimodal.NO_BLIP, env=offline)
    assert "hf download Salesforce/blip-image-captioning-base" in text, text
    assert len(text.strip().splitlines()) == 2, text  # the machine, and why not
    captions = ["--captions", finished / "captions_tiny.jsonl"]
    text = run("multimodal.py", "embed", *captions, "--clip", "ViT-B-32", *few, code=1, env=offline)
    assert "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in text, text
    assert len(text.strip().splitlines()) == 3, text


def test_an_image_is_captioned_by_the_small_blip_of_its_fold(finished, monkeypatch):
    """Never by one that has seen its label, except with --seen."""
    for stranger in ("tiny_blip_10", "tiny_blip_2"):  # left behind by a run with more folds
        (finished / stranger).mkdir(exist_ok=True)
        (finished / stranger / "config.json").touch()
    monkeypatch.setattr(multimodal, "load_blip", lambda name, *_: (pathlib.Path(name).name, None))
    monkeypatch.setattr(multimodal, "describe", lambda model, _, images, *__: [model] * len(images))
    for seen, option in enumerate(["", "--seen"]):
        stage(f"multimodal.py caption --captioner tiny {option} --name by_{seen}", finished)
        _, captions = multimodal.read_captions(finished / f"by_{seen}.jsonl")
        for split in multimodal.SPLITS:
            keys = data.image_keys(data.load("synthetic", split, limit=320)[0])
            assert [captions[key] for key in keys] == [f"tiny_blip_{(i + seen) % 2}" for i in range(320)]
    state = torch.load(finished / "tiny_blip_1.pt", weights_only=True)
    # left behind by a run with more folds
    torch.save(state | {"settings": state["settings"] | {"folds": 3}}, finished / "tiny_blip_1.pt")
    line, sentence = "multimodal.py caption --captioner tiny", "tiny_blip_1 is not trained yet"
    assert sentence in stage(line, finished, code=1)
    torch.save(state, finished / "tiny_blip_1.pt")
    weights = finished / "tiny_blip_1" / "model.safetensors"
    weights.rename(finished / "elsewhere.safetensors")  # as if `tiny` had been stopped
    assert sentence in stage(line, finished, code=1)
    (finished / "elsewhere.safetensors").rename(weights)


def test_fusion_reads_every_images_own_caption_or_with_shuffled_anothers(finished):
    _, captions = multimodal.read_captions(finished / "captions_tiny.jsonl")
    keys = {
        split: data.image_keys(data.load("synthetic", split, limit=320)[0]) for split in multimodal.SPLITS
    }
    own = [captions[key] for key in keys["train"]]
    _, embedded = multimodal.read_embeddings(finished / "captions_tiny_clip.pt")
    args = argparse.Namespace(text="tokens", split="validation", data="synthetic", limit=320, captions="f")
    train = multimodal.load_captioned(args, captions, embedded, torch.device("cpu"))["train"]
    index = torch.tensor([7, 0, 49, 7])
    states, is_word = train.text(index)
    for state, words, i in zip(states, is_word, index.tolist()):
        torch.testing.assert_close(state[words], embedded[own[i]][1].float())
    del captions[keys["train"][7]]
    with pytest.raises(SystemExit, match="f has no caption for 1 of 320 train images"):
        multimodal.load_captioned(args, captions, embedded, torch.device("cpu"))
    shown = np.load(finished / "fusion_tiny_shuffled_validation.npz")
    validation = [captions[key] for key in keys["validation"]]
    others = validation[1:] + validation[:1]
    assert shown["captions"].tolist() == [others[i] for i in shown["shown"]]
    same = np.load(finished / "fusion_tiny_validation.npz")
    assert same["captions"].tolist() == [validation[i] for i in same["shown"]]


def test_captions_follow_their_images_into_another_order(finished):
    """README invites bringing captions from another machine, where the same images may stand otherwise."""
    path = finished / "captions_tiny.jsonl"
    _, captions = multimodal.read_captions(path)
    images = data.load("synthetic", "test", limit=320)[0]
    there = multimodal.captions_of(captions, images, "test", path)
    order = torch.randperm(320)
    here = multimodal.captions_of(captions, images[order], "test", path)
    assert here == [there[i] for i in order] and len(set(data.image_keys(images))) == 320
    with pytest.raises(SystemExit, match="no caption for 1 of 320 test images: it was made of other images"):
        multimodal.captions_of(captions, torch.cat([images[:319], images[:1] ^ 1]), "test", path)


def test_small_blips_of_other_training_images_are_not_taken_for_ones_that_have_not_seen_them(finished):
    images, labels = data.load("synthetic", "train", limit=320)
    assert len(multimodal.small_blips(finished, images, labels)) == 2
    with pytest.raises(SystemExit, match="was made with another images"):
        multimodal.small_blips(finished, images.flip(0), labels.flip(0))


@pytest.mark.parametrize(
    "text, line",
    [
        (":\n401 Client Error: the token has expired\nSee ...", "401 Client Error: the token has expired"),
        ("", "OSError"),
    ],
)
def test_of_a_librarys_error_the_first_line_that_says_something_is_shown(text, line):
    assert multimodal.first_line(OSError(text)) == line


def test_a_captioner_that_cannot_be_had_costs_no_captions(finished, tmp_path):
    before = (finished / "captions_tiny.jsonl").read_bytes()
    (tmp_path / "captions_blip.jsonl").write_bytes(before)
    line = "multimodal.py caption --captioner blip --blip OUT/no/such --fresh"
    assert "can't load the captioner" in stage(line, tmp_path, code=multimodal.NO_BLIP)
    assert (tmp_path / "captions_blip.jsonl").read_bytes() == before


def test_a_caption_is_no_longer_than_the_captioner_has_positions(finished):
    """The small BLIP has fewer than the 20 that others may use."""
    blip, processor = multimodal.load_blip(finished / "tiny_blip_0", None, torch.device("cpu"))
    # no word is likelier than another, so sentences don't end
    nn.init.zeros_(blip.text_decoder.cls.predictions.decoder.weight)
    machine = vit.set_up("cpu", "float32")
    assert len(multimodal.describe(blip, processor, data.synthetic(5)[0], machine)) == 5


def test_another_clip_makes_another_fusion_run(finished):
    """A finished run neither goes on with embeddings that it has never seen nor passes for one that has."""
    stored = finished / "captions_tiny_clip.pt"
    before = stored.read_bytes()
    line = f"multimodal.py fuse {FAST} --captions OUT/captions_tiny.jsonl"
    stage(line, finished)
    assert "measured before" in stage(line, finished)
    torch.save(torch.load(stored, weights_only=True) | {"clip": "another CLIP"}, stored)
    assert "made with another clip: 'tiny_clip" in stage(line, finished, code=1)
    stored.write_bytes(before)


def test_mistakes_are_one_sentence(finished, tmp_path):
    foreign = tmp_path / "captions_tiny.jsonl"
    foreign.write_text('{"captioner": "blip", "model": "b", "dataset": "cifar10"}\n')
    sentence = "is not trained yet; `python multimodal.py tiny"
    assert sentence in stage("multimodal.py caption --captioner tiny", tmp_path, code=1)
    embed = "multimodal.py embed --captions OUT/captions_tiny.jsonl"
    fuse = "multimodal.py fuse --captions OUT/captions_tiny.jsonl"
    for line, sentence in [
        (
            "multimodal.py caption --captioner blip --name captions_tiny",
            "another captioner: 'tiny', not 'blip'",
        ),
        ("multimodal.py caption --captioner blip --seen", "--seen is for the small captioner"),
        (f"{embed} --clip local-dir:{tmp_path}", "multimodal.py tiny --checkpoint ENCODER.pt` trains one"),
        (f"{embed} --clip ViT-B-32 --clip-weights no/such/file", "name a file with --clip-weights"),
        ("multimodal.py tiny --checkpoint OUT/m.pt --folds 1", "at least 2"),
        ("multimodal.py tiny --checkpoint OUT/m.pt --enlarge 50", "not a whole number of 8-pixel patches"),
        ("multimodal.py tiny --checkpoint OUT/video_encoder_2.pt", "trained on labels"),
        (f"{fuse} --blocks 1", "there is no checkpoint"),
        (f"{fuse} --checkpoint OUT/m.pt", "no factorised encoder"),
        (f"{fuse} --control none shuffled --name mine", "--name is for one --control"),
        (f"multimodal.py fuse --captions {foreign}", "has no caption for 320 of 320 train images"),
        (f"multimodal.py fuse --captions {foreign}x", "there is no caption file"),
        ("ssl.py probe --checkpoint OUT/tiny_blip_0.pt", "another library"),
    ]:
        assert sentence in stage(line, finished, code=1)
    elsewhere = f"multimodal.py fuse --captions {finished}/captions_tiny.jsonl"
    assert "multimodal.py embed" in stage(elsewhere, tmp_path, code=1)
