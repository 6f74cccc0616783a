"""What README promises: every command parses, every link leads somewhere, every recipe works."""

import importlib
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT, call, load
from PIL import Image

import data
import vit

PAGES = [ROOT / "README.md", ROOT / "results" / "report.md"]
SCRIPTS = ["ssl.py", "video.py", "multimodal.py", "analysis.py"]
README = PAGES[0].read_text()


def commands() -> set[str]:
    """Every command line for a script with `vit.command`: in README, in docstrings, in run_all.sh."""
    texts = [README, *((ROOT / name).read_text() for name in [*SCRIPTS, "vit.py", "data.py"])]
    found = {
        line for text in texts for line in re.findall(r"^ +python (\w+\.py .*?)(?:  +#.*)?$", text, re.M)
    }
    script = (ROOT / "run_all.sh").read_text().replace("\\\n", " ")
    for line in re.findall(r'^ *stage ".*?"\s+(?:\$train|python) (\w+\.py .*)$', script, re.M):
        line = line.split(" ||")[0].replace("$out/{infonce,m,m_alone}.pt", "a.pt b.pt")
        line = line.replace("$captions", "c.json").replace("$cutmix", "--cutmix")
        found.add(re.sub(r"\$\w+", "1", line))
    return {line for line in found if line.split()[0] in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_that_is_shown_parses(script, stage1, monkeypatch):
    """With all its options and values, as the script's own parser sees it; running them is what the other
    tests do."""
    module, parsers = stage1 if script == "ssl.py" else importlib.import_module(script[:-3]), []
    monkeypatch.setattr(vit, "command", parsers.append)
    module.main()
    mine = [line for line in commands() if line.split()[0] == script]
    assert mine
    for line in mine:
        assert parsers[0].parse_args(shlex.split(line)[1:]).run, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    headings = {
        f: {
            re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
            for h in re.findall(r"^#+ (.*)$", f.read_text(), re.M)
        }
        for f in PAGES
    }
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            assert (page.parent / path).exists(), link
            assert not anchor or anchor in headings[(page.parent / path).resolve()], link


def test_pictures_are_small():
    pictures = list((ROOT / "results" / "figures").iterdir())
    assert sum(p.stat().st_size for p in pictures) < 3e6
    assert (ROOT / "results" / "figures" / "learning.gif").stat().st_size < 5e5


# -------------------------------------------------------------------------------- images of one's own


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """README's two pieces, put where it says, into a copy of data.py; 60 pictures in folders by class."""
    function, lines = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    code = (ROOT / "data.py").read_text()
    head, docstring, rest = re.match(
        r"(.*?)(def source.*?\n    \"\"\".*?\"\"\"\n)(.*)", code, re.DOTALL
    ).groups()
    (tmp_path / "data_with_photos.py").write_text(head + function + "\n\n" + docstring + lines + rest)
    images, labels = data.synthetic(60)
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        folder = tmp_path / "photos" / data.SHAPES[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = image.permute(1, 2, 0).numpy()
        if i % 2:  # a camera held sideways: the picture lies on its side, and the file says so
            note = Image.Exif()
            note[0x0112] = 6
            Image.fromarray(np.rot90(pixels).copy()).save(folder / f"{i}.png", exif=note)
        else:
            Image.fromarray(pixels).save(folder / f"{i}.PNG")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos", load(tmp_path / "data_with_photos.py"), images


def test_readmes_recipe_for_images_of_ones_own_works(photos):
    folder, mine, images = photos
    (folder / ".ipynb_checkpoints").mkdir()  # strangers
    (folder / "ring/.DS_Store").write_bytes(b"x")
    (folder / "ring/notes.txt").write_text("x")
    splits = [mine.load("photos", split) for split in ("train", "validation", "test")]
    assert [len(x) for x, _ in splits] == [48, 6, 6] and mine.source("photos").classes == sorted(data.SHAPES)
    found = torch.cat([x for x, _ in splits]).flatten(1)
    assert {*map(tuple, found.tolist())} == {*map(tuple, images.flatten(1).tolist())}


@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_photos_that_would_turn_white_or_show_hidden_colours_are_refused(photos, mode):
    folder, mine, _ = photos
    Image.new(mode, (32, 32)).save(folder / "ring/odd.png")
    with pytest.raises(SystemExit, match=f"odd.png is {mode}, neither RGB nor grey"):
        for split in ("train", "validation", "test"):
            mine.load("photos", split)


def test_images_of_another_size_need_no_other_change(tmp_path, monkeypatch):
    """Every stage and every picture, on 48x48; an encoder for these refuses others with a sentence."""

    def read(split, limit):
        return data.synthetic(limit, seed=len(split), size=48)

    usual = data.source
    monkeypatch.setattr(data, "source", lambda _: data.Source("mine", data.SHAPES, "larger shapes", read))
    common = ["--data", "any", "--limit", 200, "--out", tmp_path, "--device", "cpu"]
    train = [*common, "--epochs", 1]
    call("ssl.py", "pretrain", "--task", "m", "--dim", 32, "--batch", 50, *train)
    call("ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", "--batch", 50, *train)
    call("video.py", "--checkpoint", tmp_path / "m.pt", "--clips", 2, "--name", "video_2", *train)
    call("multimodal.py", "tiny", "--checkpoint", tmp_path / "m.pt", "--batch", 50, *train)
    call("multimodal.py", "caption", "--captioner", "tiny", *common)
    captions = ["--captions", tmp_path / "captions_tiny.json"]
    call("multimodal.py", "embed", *captions, *common)
    call("multimodal.py", "fuse", *captions, "--batch", 50, *train)
    call("analysis.py", "maps", "cka", *common)
    assert call("results/draw.py", *common).count(": drawn") >= 3
    assert Image.open(tmp_path / "figures" / "patches.png").height > 4 * 150
    monkeypatch.setattr(data, "source", usual)
    other = ["--data", "synthetic", "--limit", 200, "--out", tmp_path / "other", "--device", "cpu"]
    for line in (["ssl.py", "finetune", "--checkpoint"], ["analysis.py", "maps", "--before"]):
        assert "reads images of 48x48 pixels, not 32x32" in call(*line, tmp_path / "m.pt", *other, code=1)
