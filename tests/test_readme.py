"""What the pages people read promise: every number is in results.json, every command exists with these
options."""

import codeop
import importlib
import json
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT, call, load
from PIL import Image

import analysis
import data
import vit

publish = load("results/publish.py")

PAGES = [ROOT / "README.md", ROOT / "results" / "report.md"]
RUNS = json.loads((ROOT / "results" / "results.json").read_text())
SCRIPTS = ["ssl.py", "video.py", "multimodal.py", "analysis.py"]


def commands() -> list[str]:
    """Every command line for a script with `vit.command`: on the pages, in docstrings, in the published
    rows."""
    texts = [page.read_text() for page in PAGES] + [
        (ROOT / name).read_text() for name in [*SCRIPTS, "vit.py", "data.py"]
    ]
    found = [
        line
        for text in texts
        for line in re.findall(r"^ +(?:python|torchrun .*?) (\w+\.py .*?)(?:  +#.*)?$", text, re.MULTILINE)
    ]
    found += [
        row["command"].split(" ", 1)[1] for results in RUNS.values() for row in results["rows"].values()
    ]
    return sorted({line for line in found if line.split()[0] in SCRIPTS})


def test_the_pages_numbers_are_those_of_results_json():
    template = (ROOT / "results" / "report.template.md").read_text()
    assert len(publish.PLACEHOLDER.findall(template)) > 100
    assert PAGES[1].read_text() == publish.filled(template, RUNS), "python results/publish.py writes it anew"
    assert "{" not in PAGES[1].read_text(), "a placeholder that publish.py does not know"
    assert publish.short_table(RUNS) in PAGES[0].read_text(), "python results/publish.py writes it anew"


@pytest.mark.parametrize("page", ["README.md", "results/report.template.md"])
def test_no_result_on_the_page_is_typed_by_hand(page):
    typed = publish.PLACEHOLDER.sub("", publish.BLOCK.sub("", (ROOT / page).read_text()))
    assert re.findall(r"\d+\.\d+ ?%|0\.\d{3,}|\d+(?:\.\d+)? (?:points|images/s)", typed) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    headings = {
        f: {
            re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
            for h in re.findall(r"^#+ (.*)$", f.read_text(), re.MULTILINE)
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
    assert {p.stem for p in pictures} <= {*analysis.FIGURES, "learning"}
    assert sum(p.stat().st_size for p in pictures) < 3e6
    assert (ROOT / "results" / "figures" / "learning.gif").stat().st_size < 5e5


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_that_is_shown_parses(script, stage1, monkeypatch):
    """With all its options and values, as the script's own parser sees it; running them is what the other
    tests do."""
    module, parsers = stage1 if script == "ssl.py" else importlib.import_module(script[:-3]), []
    monkeypatch.setattr(vit, "command", lambda parser, source: parsers.append(parser))
    module.main()
    mine = [line for line in commands() if line.split()[0] == script]
    assert mine
    for line in mine:
        assert parsers[0].parse_args(shlex.split(line)[1:]).run, line


def test_the_command_that_needs_no_options():
    assert "all, with CLS and positions" in call("vit.py")


def test_readmes_recipe_for_images_of_ones_own_works(tmp_path, monkeypatch):
    """Its two pieces, put where README says, into a copy of data.py."""
    function, lines = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)[:2]
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
    (tmp_path / "photos/.ipynb_checkpoints").mkdir()  # strangers
    (tmp_path / "photos/ring/.DS_Store").write_bytes(b"x")
    (tmp_path / "photos/ring/notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    mine = load(tmp_path / "data_with_photos.py")
    splits = [mine.load("photos", split) for split in ("train", "validation", "test")]
    assert [len(x) for x, _ in splits] == [48, 6, 6] and mine.source("photos").classes == sorted(data.SHAPES)
    found = torch.cat([x for x, _ in splits]).flatten(1)
    assert {*map(tuple, found.tolist())} == {*map(tuple, images.flatten(1).tolist())}


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
    call("video.py", "--checkpoint", tmp_path / "m.pt", "--clips", 2, *train)
    call("multimodal.py", "tiny", "--checkpoint", tmp_path / "m.pt", "--batch", 50, *train)
    call("multimodal.py", "caption", "--captioner", "tiny", *common)
    captions = ["--captions", tmp_path / "captions_tiny.jsonl"]
    call("multimodal.py", "embed", *captions, "--data", "any", "--out", tmp_path)
    call("multimodal.py", "fuse", *captions, "--blocks", 1, "--batch", 50, *train)
    before = ["--before", tmp_path / "m.pt"]
    drawn = call("analysis.py", "maps", "cka", "figures", *before, *common)
    for name in ("patches", "reconstruction", "maps", "tokens", "cka", "clips"):
        assert f"drew {tmp_path}/figures/{name}.png" in drawn
    assert Image.open(tmp_path / "figures" / "patches.png").height > 4 * 6 * 40
    monkeypatch.setattr(data, "source", usual)
    other = ["--data", "synthetic", "--limit", 200, "--out", tmp_path / "other", "--device", "cpu"]
    said = call("ssl.py", "finetune", "--checkpoint", tmp_path / "m.pt", *other, code=1)
    assert "reads images of 48x48 pixels, not 32x32" in said
    said = call("analysis.py", "maps", *before, "--after", tmp_path / "finetune.pt", *other, code=1)
    assert "reads images of 48x48 pixels, not 32x32" in said


def test_readmes_recipe_for_captions_of_ones_own_works(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    recipe = next(block for block in blocks if "captions_mine" in block)
    monkeypatch.chdir(tmp_path)
    small = 'data.load("synthetic", split, limit=30)'
    exec(recipe.replace('data.load("data", split)', small), {})
    header, captions = load("multimodal.py").read_captions("captions_mine.jsonl")
    assert header["captioner"] == "mine" and len(captions) == 90
    images, _ = data.load("synthetic", "test", limit=30)
    found = load("multimodal.py").captions_of(captions, images, "test", "captions_mine.jsonl")
    assert found == ["a photo of something"] * 30


def test_readmes_python_can_be_pasted_into_a_repl():
    """Which ends a loop at an empty line, and takes no other statement right after one."""
    for block in re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL):
        if "def " in block or block.startswith("    "):
            continue  # for a file
        waiting = []
        for line in [*block.splitlines(), ""]:
            waiting.append(line)
            if line == "" or len(waiting) == 1:
                done = codeop.compile_command("\n".join(waiting))
                waiting = [] if done else waiting
            elif codeop.compile_command("\n".join(waiting)):
                waiting = []
        assert not waiting


def test_readmes_python_runs(tmp_path, monkeypatch):
    """As it stands, but for where the images and the checkpoints are."""
    small = [
        "--data",
        "synthetic",
        "--limit",
        64,
        "--batch",
        32,
        "--dim",
        16,
        "--epochs",
        1,
        "--device",
        "cpu",
    ]
    for name in ("m_joint", "finetune"):
        call("ssl.py", "finetune", *small, "--name", name, "--out", tmp_path)
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    compare = next(block for block in blocks if "StreamingCKA" in block)
    compare = compare.replace("runs/cifar10-laptop", str(tmp_path))
    found = {}
    exec(
        compare.replace('data.load("data", "validation")', 'data.load("synthetic", "test", limit=300)'), found
    )
    assert found["cka"].result().shape == (12, 12) and found["cka"].n == 300
    load_stage1 = next(block for block in blocks if "importlib" in block)
    exec(load_stage1, found)
    assert found["stage1"].info_nce


RESULTS = {
    "cifar10-laptop": {
        "seed": 0,
        "rows": {
            "m_probe": {"value": 0.5, "seconds": 90, "training": {"angle": 0.25}},
            "cka_after": {"value": 0.5, "blocks": [0.1, 0.2]},
        },
    },
    "cifar10-laptop-seed1": {
        "seed": 1,
        "rows": {"m_probe": {"value": 0.6, "seconds": 30}, "cka_after": {"value": 0.3}},
    },
    "cifar10-full": {
        "seed": 0,
        "seconds": 600,
        "rows": {"m_probe": {"value": 0.8, "command": "python x.py"}},
    },
}


@pytest.mark.parametrize(
    "placeholder, text",
    [
        ("{laptop m_probe}", "55.00 ± 7.07 %"),
        ("{full m_probe}", "80.00 %"),
        ("{report m_infonce_probe}", "38.51 %"),
        ("{report m_probe}", "not measured"),
        ("{report fusion_blip}", "70.13 %"),
        ("{full finetune}", "not measured"),
        ("{laptop m_probe seconds}", "1.5 min"),
        ("{laptop m_probe training.angle}", "25.00 %"),
        ("{laptop cka_after}", "0.4000 ± 0.1414"),
        ("{laptop cka_after blocks.1}", "0.2000"),
        ("{laptop m_probe - cka_after}", "+15.00 ± 21.21"),
        ("{full m_probe - cka_after}", "not measured"),
        ("{laptop: seed}", "0, 1"),
        ("{full: seconds}", "10 min"),
        ("{laptop: seconds}", "not measured"),
        ("{full m_probe command}", "python x.py"),
    ],
)
def test_a_placeholder_gets_the_number_it_asks_for(placeholder, text):
    assert publish.filled(f"a {placeholder} b", RESULTS) == f"a {text} b"


def test_a_section_is_left_out_where_its_row_is_not_there():
    page = "a\n<!-- needs laptop {} -->\nb {{laptop m_probe}}\n<!-- end -->\nc\n"
    assert publish.filled(page.format("no_such_row"), RESULTS) == "a\nc\n"
    assert publish.filled(page.format("m_probe"), RESULTS).startswith("a\nb 5")


def test_a_row_says_which_commit_made_it(monkeypatch):
    known = {"newer": {"vit.py": "1", "ssl.py": "3"}, "older": {"vit.py": "1", "ssl.py": "2"}}
    monkeypatch.setattr(publish, "commits", lambda: known)

    def said(*rows: dict) -> list[str]:
        results = {"rows": {str(i): {"code": code} for i, code in enumerate(rows)}}
        publish.note_commits(results)
        return [row["commit"] for row in results["rows"].values()]

    # of one commit, as the first row is of the older only
    assert said({"vit.py": "1", "ssl.py": "2"}, {"vit.py": "1"}) == ["older", "older"]
    # of several
    assert said({"vit.py": "1", "ssl.py": "2"}, {"ssl.py": "3"}) == ["older", "newer"]
    assert said({"vit.py": "1", "ssl.py": "edited"}) == ["none: edited files"]


def test_publishing_brings_results_pictures_and_pages_up_to_date(tmp_path):
    for name, results in RESULTS.items():
        (tmp_path / "runs" / name / "figures").mkdir(parents=True)
        (tmp_path / "runs" / name / "results.json").write_text(json.dumps(results | {"dataset": "cifar10"}))
        (tmp_path / "runs" / name / "figures" / "cka.png").write_text(name)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "report.template.md").write_text("{full m_probe} {full finetune}")
    (tmp_path / "README.md").write_text("before\n<!-- results: x -->\nold\n<!-- end of results -->\nafter")
    runs = [tmp_path / "runs" / name for name in sorted(RESULTS)]
    call("results/publish.py", "--out", tmp_path / "results", "--runs", *runs)
    assert (tmp_path / "results" / "report.md").read_text() == "80.00 % not measured"
    assert (tmp_path / "results" / "figures" / "cka.png").read_text() == "cifar10-full"
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- results") and readme.endswith("of results -->\nafter")
    assert "55.00 ± 7.07 %" in readme and "old" not in readme
    assert json.loads((tmp_path / "results" / "results.json").read_text()).keys() == RESULTS.keys()
    synthetic = json.dumps({"dataset": "synthetic", "rows": {}})
    (tmp_path / "runs" / "cifar10-full" / "results.json").write_text(synthetic)
    text = call("results/publish.py", "--out", tmp_path / "results", "--runs", *runs, code=1)
    assert "not to be published" in text
