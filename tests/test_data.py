"""Data on disk, augmentation and samplers against brute force."""

import collections
import errno
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
import torch

import data
import vit


@pytest.fixture(scope="module")
def batch():
    return data.synthetic(64)[0]


# -------------------------------------------------------------------------------------------------- patches


def test_patchify_cuts_row_by_row_and_unpatchify_undoes_it(batch):
    patches = data.patchify(batch, 8)
    assert patches.shape == (64, 16, 3, 8, 8)
    assert torch.equal(patches[5, 6], batch[5, :, 8:16, 16:24])  # patch 6: second row, third column
    assert torch.equal(data.unpatchify(patches), batch)


def test_patch_augment_does_to_each_patch_what_its_indices_say(batch):
    images = batch.float() / 255
    before = images.clone()
    augmented, masked, rotated, angle = data.patch_augment(images, torch.Generator().manual_seed(3))
    assert torch.equal(images, before), "the input was changed"
    assert set(angle.tolist()) == {0, 1, 2, 3}
    for i in range(len(images)):
        assert len({*masked[i].tolist(), *rotated[i].tolist()}) == 8  # disjoint, four each
        for p in range(16):
            y, x = p // 4 * 8, p % 4 * 8
            expected = images[i, :, y : y + 8, x : x + 8].numpy()
            if p in masked[i]:
                expected = np.zeros_like(expected)
            elif p in rotated[i]:
                expected = np.rot90(expected, int(angle[i]), axes=(1, 2))
            np.testing.assert_array_equal(augmented[i, :, y : y + 8, x : x + 8].numpy(), expected)


@pytest.mark.parametrize("shape", [(2, 3, 35, 35), (2, 3, 39, 32), (2, 3, 32, 40), (3, 32, 32)])
def test_images_that_are_no_whole_number_of_patches_are_refused(shape):
    with pytest.raises(ValueError, match="S a multiple of 8"):
        data.patchify(torch.zeros(shape), 8)


def test_patch_counts_and_sizes_are_parameters(batch):
    _, masked, turned, _ = data.patch_augment(batch, patch=4, masked=10, turned=1)
    assert masked.shape == (64, 10) and turned.shape == (64, 1) and masked.max() > 16
    alone, masked, turned, _ = data.patch_augment(batch, masked=0, turned=0)
    assert masked.shape == turned.shape == (64, 0) and torch.equal(alone, batch)
    with pytest.raises(ValueError, match="more than the 16"):
        data.patch_augment(batch, masked=9, turned=8)
    with pytest.raises(ValueError, match="S a multiple of 5"):
        data.patchify(batch, 5)


# ------------------------------------------------------------------------------------------------------------


def test_crop_flip_is_reflection_padding_then_a_crop_then_a_mirror(batch):
    for seed in range(5):
        out = data.crop_flip(batch, torch.Generator().manual_seed(seed))
        for i in range(8):
            padded = np.pad(batch[i].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect") / np.float32(255)
            crops = [padded[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5)]
            assert any(np.array_equal(out[i], c) or np.array_equal(out[i], c[:, :, ::-1]) for c in crops)


def test_cutmix_counts_each_class_by_the_pixels_that_it_has():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 32, 32)  # every pixel says whose it is
    mixed = 0
    for seed in range(8):
        x, y = data.cutmix(images, torch.arange(6), 6, torch.Generator().manual_seed(seed))
        share = torch.stack([(x == k).float().mean(dim=(1, 2, 3)) for k in range(6)], dim=1)  # [B, K]
        assert torch.allclose(y, share)
        mixed += not torch.equal(x, images)
    assert 1 < mixed < 7  # half of the batches, about


def test_resized_crop_of_the_whole_image_is_the_image_or_its_mirror(batch, monkeypatch):
    monkeypatch.setattr(data.math, "log", lambda _: 0.0)  # aspect ratio 1
    out = data.resized_crop_flip(batch, torch.Generator().manual_seed(0), scale=(1.0, 1.0))
    same = (out - batch / 255).abs().amax((1, 2, 3)) < 1e-3
    mirrored = (out - batch.flip(3) / 255).abs().amax((1, 2, 3)) < 1e-3
    assert (same | mirrored).all() and same.any() and mirrored.any()


def test_resized_crop_stays_inside_the_image():
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(64, 3, 32, 32)  # values grow from left to right
    out = data.resized_crop_flip(ramp, torch.Generator().manual_seed(0))
    # input pixels per output pixel = width share of the crop
    steps = out.diff(dim=3).mean((1, 2, 3)).abs() * 255 / 8
    assert steps.min() > 0.35 and steps.max() <= 1.001  # sqrt(0.2 * 3/4) = 0.39


def test_colour_jitter_without_strength_changes_only_the_grey_ones(batch):
    images = batch.float() / 255
    out = data.colour_jitter(images, torch.Generator().manual_seed(0), strength=0)
    grey = (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2])[:, None].expand_as(images)
    unchanged = (out - images).abs().amax((1, 2, 3)) < 1e-3
    greyed = (out - grey).abs().amax((1, 2, 3)) < 2e-3
    assert (unchanged | greyed).all() and 4 <= greyed.sum() <= 24  # about 20 % of 64


def test_augmentation_repeats_with_its_generator(batch):
    for function in (data.crop_flip, data.contrastive_view):
        a, b = (function(batch, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(a, b) and a.min() >= 0 and a.max() <= 1


# -------------------------------------------------------------------------------------------------- samplers


def test_same_class_batches():
    labels = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    sampler = data.SameClassBatchSampler(labels, 16, seed=5)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        batches = list(torch.utils.data.DataLoader(torch.arange(200), batch_sampler=sampler))
        assert len(batches) == len(sampler) == sum(n // 16 for n in labels.bincount().tolist())
        assert all(len(b) == 16 and len(labels[b].unique()) == 1 for b in batches)
        assert {labels[b[0]].item() for b in batches} == {0, 1, 2}
        used = collections.Counter(torch.cat(batches).tolist())
        assert max(used.values()) == 1
        epochs.append(torch.cat(batches))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


def test_every_epoch_is_another_though_nobody_calls_set_epoch():
    """Lightning, for one, does not call it for batch samplers."""
    sampler = data.SameClassBatchSampler([0] * 40 + [1] * 40, 8)
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    sampler.set_epoch(1)  # as who resumes does
    assert list(sampler) == epochs[1] and list(sampler) == epochs[2]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_the_sampler_takes_lists_arrays_and_tensors(kind):
    labels = [0, 1] * 20
    sampler = data.SameClassBatchSampler(kind(labels), 4)
    assert list(sampler) == list(data.SameClassBatchSampler(torch.tensor(labels), 4))


def test_a_class_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="only 3 images"):
        data.SameClassBatchSampler(torch.tensor([0] * 20 + [1] * 3), 16)


def test_shuffled_batches_cover_all_but_a_rest():
    batches = list(data.shuffled_batches(10, 3, torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [3, 3, 3] and len(set(torch.cat(batches).tolist())) == 9


# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive():
    """A small stand-in for the official archive: right names and sizes, label = record number mod 10."""
    record = np.zeros((10_000, data.RECORD), dtype=np.uint8)
    record[:, 0] = np.arange(10_000) % 10
    record[:, 1:] = (np.arange(10_000) % 251)[:, None]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name in [*data.FILES, "../outside.txt", "readme.html"]:
            info = tarfile.TarInfo(f"{data.FOLDER}/{name}")
            content = record.tobytes() if name in data.FILES else b"no"
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def server():
    """An HTTP server on this machine; set `.content`, and `.cut` to break off in the middle."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.server.content
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.server.cut else body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.content, server.cut = b"", False
        server.url = f"http://127.0.0.1:{server.server_port}/c.tar.gz"
        yield server
        server.shutdown()


def test_fetch_checks_and_unpacks_only_known_names(tmp_path, archive, server):
    server.content = archive
    data.fetch(tmp_path / "d", server.url, hashlib.sha256(archive).hexdigest())
    assert [p.name for p in (tmp_path / "d").iterdir()] == [data.FOLDER]
    assert {p.name for p in (tmp_path / "d" / data.FOLDER).iterdir()} == {*data.FILES, "provenance.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert "SHA-256 checked" in data.source(str(tmp_path / "d")).provenance

    train, validation, test = (data.load(str(tmp_path / "d"), s) for s in ("train", "validation", "test"))
    assert [len(s[1]) for s in (train, validation, test)] == [45_000, 5_000, 10_000]
    assert test[1].tolist() == [i % 10 for i in range(10_000)] and (test[0][7] == 7).all()
    again = data.load(str(tmp_path / "d"), "validation")
    assert torch.equal(again[0], validation[0])  # always the same ones are held out


def test_a_wrong_or_broken_file_is_told_and_not_kept(tmp_path, archive, server):
    for server.content, server.cut in ((b"<html>please log in</html>", False), (archive, True)):
        with pytest.raises(SystemExit, match="is not the file, or a part of it"):
            data.fetch(tmp_path, server.url, hashlib.sha256(archive).hexdigest())
        assert list(tmp_path.iterdir()) == []


def test_no_network_has_an_exit_code_of_its_own_and_a_full_disk_another(tmp_path, monkeypatch, capsys):
    """run_all.sh goes on with drawn shapes after the first only."""
    with pytest.raises(SystemExit) as ended:
        data.fetch(tmp_path, "http://127.0.0.1:9/", "")
    assert ended.value.code == data.NO_NETWORK
    said = capsys.readouterr().err
    assert "can't download" in said and "Connection refused" in said and "--data synthetic" in said

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(SystemExit, match="can't fetch CIFAR-10 into .*No space left.*350 MB must be free"):
        data.fetch(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "short", "no such label"])
def test_damaged_files_get_one_sentence(tmp_path, damage):
    (tmp_path / data.FOLDER).mkdir()
    if damage == "short":
        (tmp_path / data.FOLDER / "test_batch.bin").write_bytes(bytes(10_000 * data.RECORD - 1))
    if damage == "no such label":  # training would otherwise end in an IndexError, somewhere
        records = np.zeros((10_000, data.RECORD), dtype=np.uint8)
        records[77, 0] = 10
        records.tofile(tmp_path / data.FOLDER / "test_batch.bin")
    with pytest.raises(SystemExit, match="test_batch.bin is missing or damaged; delete .* fetches CIFAR-10"):
        data.load(str(tmp_path), "test")


def test_the_bin_files_are_found_under_another_name(tmp_path):
    elsewhere = tmp_path / "my images"
    elsewhere.mkdir()
    (elsewhere / "test_batch.bin").touch()
    assert data.find(str(elsewhere)) == elsewhere


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_a_note_on_provenance_may_have_any_letters(tmp_path, encoding):
    (tmp_path / data.FOLDER).mkdir()
    (tmp_path / data.FOLDER / "provenance.txt").write_bytes("copie de l'été\r\n".encode(encoding))
    expected = "copie de l'\ufffdt\ufffd" if encoding == "latin-1" else "copie de l'été"
    assert data.source(str(tmp_path)).provenance == expected


def test_synthetic_is_repeatable_balanced_and_too_hard_for_a_linear_layer_on_pixels():
    images, labels = data.load("synthetic", "train", limit=5_000)
    assert torch.equal(images, data.load("synthetic", "train", limit=5_000)[0])
    assert labels.bincount().tolist() == [500] * 10
    test, truth = data.load("synthetic", "test", limit=2_000)
    assert not torch.equal(test[:10], images[:10])
    layer = vit.fit_linear(images.flatten(1) / 255, labels, decay=1e-3)
    assert vit.accuracy(layer(test.flatten(1) / 255), truth) < 0.60
