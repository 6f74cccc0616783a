"""Stage 3: cross-attention against torch's own, captions and embeddings against the libraries', the
commands."""

import errno
import json
import os

import numpy as np
import pytest
import torch
import transformers
from conftest import call, run
from torch import nn

import data
import multimodal
import video
import vit

D, E, F = 32, 24, 4  # width, width of the embedding, frames
NO_AUTOCAST = vit.contextlib.nullcontext()


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
    expected = video.static(model.video, (255 * images).byte())
    torch.testing.assert_close(model(images, torch.randn(6, 3, E)), expected)


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
    assert found == ["the cat on dark green", "the ship on bright yellow", "the airplane on bright grey"]


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


def test_the_bound_finds_what_a_caption_knows_and_the_logits_do_not():
    labels = torch.arange(600) % 10
    logits = 2 * nn.functional.one_hot(labels, 10) + torch.randn(600, 10)
    named = torch.where(torch.rand(600) < 0.6, labels, -1)
    value, without = multimodal.bound(
        logits[:300], named[:300], labels[:300], logits[300:], named[300:], labels[300:]
    )
    assert value > without + 0.1
    noise = torch.randint(-1, 10, (600,))
    value, _ = multimodal.bound(
        logits[:300], noise[:300], labels[:300], logits[300:], noise[300:], labels[300:]
    )
    assert abs(value - without) < 0.06


# ------------------------------------------------------------------------------------------------------------


def small_blip(encoder, classes, size):
    """The small BLIP with our encoder in it."""
    blip, processor = multimodal.small_blip(encoder.config, classes, size)
    multimodal.copy_encoder(encoder, blip.vision_model)
    return blip, processor


def test_the_small_blips_image_tower_is_our_encoder():
    encoder, images = randomise(vit.ViT(dim=D, depth=3)), data.synthetic(4)[0]
    blip, processor = small_blip(encoder, data.CLASSES, 32)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, vit.standardise(images.float() / 255))
    found = blip.eval().vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, encoder(images.float() / 255), rtol=1e-4, atol=1e-5)


def test_enlarged_images_get_positions_in_between():
    """The library can interpolate positions while it runs; ours, interpolated beforehand, give the same
    tokens."""
    encoder, images = randomise(vit.ViT(dim=D, depth=1)), data.synthetic(4)[0]
    plain, _ = small_blip(encoder, data.CLASSES, 32)
    enlarged, processor = small_blip(encoder, data.CLASSES, 48)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, 48, 48)
    found = enlarged.eval().vision_model(pixel_values=pixels).last_hidden_state  # [4, 1 + 36, D]
    expected = plain.eval().vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_small_blip_knows_every_word_of_its_sentences():
    images, labels = data.synthetic(300)
    _, processor = small_blip(vit.ViT(dim=D, depth=1), data.SHAPES, 32)
    truth = multimodal.sentences(images, labels, data.SHAPES)
    ids = processor.tokenizer(truth, return_tensors="pt")["input_ids"]
    ids[:, 0] = processor.tokenizer.bos_token_id  # what BLIP's decoder starts from
    assert processor.tokenizer.unk_token_id not in ids and ids.shape[1] == 2 + len(truth[0].split())
    assert processor.batch_decode(ids, skip_special_tokens=True) == truth


def test_words_are_spelled_as_written_and_cut_where_clip_cuts():
    model, tokenizer = multimodal.small_clip(32)
    captions = ["un été", "a cat " * 20]
    found = multimodal.embed_words(randomise(model), tokenizer, captions)
    assert found[0][0] == "<start> un é té <end>"  # not Ã©
    long = found[1][0].split()
    assert len(long) == 16 and long[-1] == "<end>"


def test_the_last_words_vector_is_clips_own_for_the_caption():
    model, tokenizer = multimodal.small_clip(32)
    captions = ["the cat on dark green far away", "a dog"]
    found = multimodal.embed_words(randomise(model), tokenizer, captions)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(captions), normalize=True)
    torch.testing.assert_close(torch.stack([states[-1] for _, states in found]), expected)
    assert [len(states) for _, states in found] == [len(words.split()) for words, _ in found]


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
    stage("multimodal.py embed --captions OUT/captions_tiny.json", out)
    fuse = f"multimodal.py fuse {FAST} --captions OUT/captions_tiny.json"
    stage(f"{fuse} --control none image_only text_only shuffled", out)
    stage(f"{fuse} --control image_only --split test", out)
    stage(f"{fuse} --text tokens", out)
    return out


def rows(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "rows").glob("*.json")}


def test_the_whole_stage_leaves_its_rows_and_pictures(finished):
    found = rows(finished)
    kinds = ("", "_image_only", "_text_only", "_shuffled", "_tokens")
    expected = {f"fusion_tiny{kind}_validation" for kind in kinds} | {"captions_tiny_validation"}
    expected |= {"fusion_tiny_image_only", "fusion_tiny_bound"}  # of the test split
    assert expected <= found.keys() and all(found[name]["captioner"] == "tiny" for name in expected)
    drawn = stage("results/draw.py", finished)
    assert "captions: drawn" in drawn and "words: drawn" in drawn
    text = stage("results/table.py", finished)
    assert "fusion_tiny_tokens" in text and "70.13" not in text  # that was with BLIP's captions
    stored = np.load(finished / "rows/fusion_tiny_tokens_validation.npz")
    # between <start> and <end>
    assert [" ".join(w.split()[1:-1]) for w in stored["words"]] == stored["captions"].tolist()
    for sentence, weights in zip(stored["words"], stored["weights"]):
        assert weights.sum() == pytest.approx(1, abs=1e-5) and (weights[len(sentence.split()) :] == 0).all()
    assert vit.load_encoder(finished / "fusion_tiny.pt").config["dim"] == D  # as of any stage


def test_fusion_reads_every_images_own_caption_or_with_shuffled_anothers(finished):
    captions = multimodal.read_captions(finished / "captions_tiny.json")["captions"]["validation"]
    own, shuffled = (np.load(finished / f"rows/fusion_tiny{k}_validation.npz") for k in ("", "_shuffled"))
    assert own["captions"].tolist() == [captions[i] for i in own["shown"]]
    others = captions[1:] + captions[:1]
    assert shuffled["captions"].tolist() == [others[i] for i in shuffled["shown"]]


def test_frozen_blocks_of_the_small_blips_stay_those_of_the_encoder(finished):
    towers = [vit.read_checkpoint(finished / f"tiny_blip_{fold}.pt")["model"] for fold in (0, 1)]
    start = vit.load_encoder(finished / "m.pt").state_dict()
    for i in range(6):
        ours = start[f"blocks.{i}.attn.qkv.weight"]
        theirs = [tower[f"vision_model.encoder.layers.{i}.self_attn.qkv.weight"] for tower in towers]
        assert all(torch.equal(ours, weight) == (i < 4) for weight in theirs)


def test_a_captioner_has_not_seen_the_labels_of_the_images_it_captions(tmp_path, monkeypatch):
    """Other labels for the images of fold 0 change nothing in the captioner of fold 0, and everything in
    that of fold 1."""
    encoder = vit.ViT(dim=D, depth=1)
    state = {"config": encoder.config, "epoch": 1, "recipe": {"stage": "pretrain"}}
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


def test_an_image_is_captioned_by_the_small_blip_of_its_fold(finished, monkeypatch):
    """Never by one that has seen its label."""
    state = [vit.read_checkpoint(finished / f"tiny_blip_{fold}.pt")["model"] for fold in (0, 1)]

    def describe(model, processor, images, autocast):
        own = model.state_dict()
        fold = [all(torch.equal(v, own[k]) for k, v in weights.items()) for weights in state].index(True)
        return [f"fold {fold}"] * len(images)

    monkeypatch.setattr(multimodal, "describe", describe)
    stage("multimodal.py caption --captioner tiny --name by --batch 33", finished)
    captions = multimodal.read_captions(finished / "by.json")["captions"]
    assert all(captions[split] == [f"fold {i % 2}" for i in range(320)] for split in multimodal.SPLITS)


def test_captions_are_the_same_after_a_stop(finished):
    path = finished / "captions_tiny.json"
    before = path.read_bytes()
    found = json.loads(before)
    del found["captions"]["validation"][70:], found["captions"]["test"][:]
    path.write_text(json.dumps(found))
    fuse = f"multimodal.py fuse {FAST} --captions OUT/captions_tiny.json --name other"
    assert "is not finished" in stage(fuse, finished, code=1)
    stage("multimodal.py caption --captioner tiny --batch 100", finished)
    assert path.read_bytes() == before


def test_captions_of_other_images_or_in_another_order_are_refused(finished):
    """README invites bringing captions from another machine, where the same images may stand otherwise."""
    found = multimodal.read_captions(finished / "captions_tiny.json")
    images = data.load("synthetic", "validation", limit=320)[0]
    assert len(multimodal.captions_of(found, "validation", images, "f")) == 320
    for others in (images.flip(0), images ^ 1, images[:300]):
        with pytest.raises(
            SystemExit, match="f was made of other validation images, of these in another order"
        ):
            multimodal.captions_of(found, "validation", others, "f")


def test_small_blips_of_other_training_images_are_not_taken_for_ones_that_have_not_seen_them(finished):
    train = vit.hash_of(*data.load("synthetic", "train", limit=320))
    assert len(multimodal.load_small_blips(finished, data.SHAPES, train)[0]) == 2
    with pytest.raises(SystemExit, match="not finished, or of other images"):
        multimodal.load_small_blips(finished, data.SHAPES, "another")


def test_the_real_models_way_with_small_ones(finished, tmp_path, monkeypatch):
    """BLIP from a folder, by the library's own loading: every step, row and picture says blip. Weights that
    are missing are refused: the library would fill them in at random."""
    images, labels = data.load("synthetic", "train", limit=320)
    models, _ = multimodal.load_small_blips(finished, data.SHAPES, vit.hash_of(images, labels))
    for part in models[0]:
        part.save_pretrained(tmp_path / "blip")
    stage("multimodal.py caption --captioner blip --blip OUT/blip", tmp_path)
    monkeypatch.setattr(multimodal, "load_blip", None)  # once they are there, BLIP is not asked again
    stage("multimodal.py caption --captioner blip --blip OUT/blip", tmp_path)
    monkeypatch.undo()
    for name in ("tiny_clip.pt", "video_2.pt"):
        os.link(finished / name, tmp_path / name)
    found = multimodal.read_captions(tmp_path / "captions_blip.json")
    assert (
        found["captioner"] == "blip" and [len(found["captions"][s]) for s in multimodal.SPLITS] == [320] * 3
    )
    stage("multimodal.py embed --captions OUT/captions_blip.json --clip tiny", tmp_path)
    stage(f"multimodal.py fuse {FAST} --captions OUT/captions_blip.json --control none image_only", tmp_path)
    assert {"captions_blip_validation", "fusion_blip_validation"} < rows(tmp_path).keys()
    assert "70.13 %" in stage("results/table.py", tmp_path)
    state = models[0][0].state_dict()
    kept = {
        key: value for key, value in state.items() if not key.startswith("text_decoder.bert.encoder.layer.1")
    }
    models[0][0].save_pretrained(tmp_path / "blip", state_dict=kept)
    with pytest.raises(SystemExit, match="is no BLIP captioner: it has no weights for text_decoder"):
        multimodal.load_blip(str(tmp_path / "blip"))


def test_without_a_network_the_commands_that_fetch_are_named(finished, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    few = ["--out", tmp_path, *FEW.split()]
    text = run("multimodal.py", "caption", "--captioner", "blip", *few, code=multimodal.NO_BLIP, env=offline)
    assert "hf download Salesforce/blip-image-captioning-base" in text, text
    assert len(text.strip().splitlines()) == 2, text  # the machine, and why not
    captions = ["--captions", finished / "captions_tiny.json"]
    text = run("multimodal.py", "embed", *captions, "--clip", "ViT-B-32", *few, code=1, env=offline)
    assert "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in text, text


def test_a_full_disk_that_stops_blip_is_no_blip_that_can_not_be_had(monkeypatch):
    """run_all.sh would go on with the small captioner, and train everything after it on other captions."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.BlipProcessor, "from_pretrained", full)
    with pytest.raises(SystemExit) as ended:
        multimodal.load_blip("any")
    assert "No space left" in str(ended.value) and ended.value.code != multimodal.NO_BLIP


def test_a_caption_is_no_longer_than_the_captioner_has_positions():
    """The small BLIP has fewer than the 20 that others may use."""
    blip, processor = small_blip(vit.ViT(dim=D, depth=1), data.SHAPES, 32)
    # no word is likelier than another, so sentences don't end
    nn.init.zeros_(blip.text_decoder.cls.predictions.decoder.weight)
    assert len(multimodal.describe(blip.eval(), processor, data.synthetic(5)[0], NO_AUTOCAST)) == 5


def test_another_clip_makes_another_fusion_run(finished):
    """A finished run neither goes on with embeddings that it has never seen nor passes for one that has."""
    stored = finished / "captions_tiny_clip.pt"
    before = stored.read_bytes()
    line = f"multimodal.py fuse {FAST} --captions OUT/captions_tiny.json"
    assert "finished before" in stage(line, finished)
    torch.save(torch.load(stored, weights_only=True) | {"clip": "another CLIP"}, stored)
    assert "made with another clip: 'tiny" in stage(line, finished, code=1)
    stored.write_bytes(before)


def test_mistakes_are_one_sentence(finished, tmp_path):
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({"captioner": "blip"}))
    assert "there is no checkpoint" in stage("multimodal.py caption --captioner tiny", tmp_path, code=1)
    fuse = "multimodal.py fuse --captions OUT/captions_tiny.json"
    for line, sentence in [
        ("multimodal.py tiny --checkpoint OUT/m.pt --folds 1", "at least 2"),
        ("multimodal.py tiny --checkpoint OUT/m.pt --enlarge 50", "not a whole number of 8-pixel patches"),
        ("multimodal.py tiny --checkpoint OUT/video_2.pt", "trained on labels"),
        (f"{fuse} --checkpoint OUT/m.pt", "no factorised encoder"),
        (f"{fuse} --control none shuffled --name mine", "--name is for one --control"),
        (f"multimodal.py fuse --captions {foreign}", "is missing or no caption file"),
        ("multimodal.py fuse --captions OUT/nowhere.json", "is missing or no caption file"),
        ("ssl.py probe --checkpoint OUT/tiny_blip_0.pt", "another library"),
    ]:
        assert sentence in stage(line, finished, code=1)
    elsewhere = f"multimodal.py fuse --captions {finished}/captions_tiny.json"
    assert "multimodal.py embed" in stage(elsewhere, tmp_path, code=1)
