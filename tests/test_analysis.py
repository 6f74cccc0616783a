"""CKA against Gram matrices, the measures of the similarity maps, the pictures and the table."""

import json

import pytest
import torch
from conftest import call, load

import analysis
import vit

draw, table = load("results/draw.py"), load("results/table.py")


def brute_force_cka(x, y, debiased):
    """Straight from the papers, with n x n Gram matrices (Kornblith et al. 2019, eq. 3; Song et al. 2012,
    eq. 5)."""
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(k, l):
        if not debiased:
            return (centre @ k @ centre @ l).trace() / (n - 1) ** 2
        k, l = k - k.diag().diag(), l - l.diag().diag()
        middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return ((k @ l).trace() + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    k, l = x @ x.T, y @ y.T
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


both = pytest.mark.parametrize("debiased", [False, True])


@both
def test_cka_equals_brute_force(debiased):
    x = torch.randn(100, 20, dtype=torch.float64) + 3
    y = (x[:, :7] @ torch.randn(7, 9, dtype=torch.float64)).tanh()
    y += 0.3 * torch.randn(100, 9, dtype=torch.float64)
    found = analysis.linear_cka(x, y, debiased).item()
    assert found == pytest.approx(brute_force_cka(x, y, debiased).item(), abs=1e-10)
    assert found == pytest.approx(analysis.linear_cka(y, x, debiased).item(), abs=1e-12)


@both
def test_cka_ignores_rotation_scale_and_shift_and_is_one_on_itself(debiased):
    x, y = torch.randn(80, 10, dtype=torch.float64), torch.randn(80, 6, dtype=torch.float64)
    turned = 5 * x @ torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q + 2
    assert analysis.linear_cka(x, turned, debiased).item() == pytest.approx(1)
    expected = analysis.linear_cka(x, y, debiased).item()
    assert analysis.linear_cka(turned, y - 7, debiased).item() == pytest.approx(expected)


@both
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1, 1e3, 1e6])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_cka_does_not_mind_how_large_features_are(debiased, scale, kind):
    """A product of two large sums, before the root is taken, overflows float32."""
    x, y = torch.randn(300, 10), torch.randn(300, 6)
    big = (scale * x).to(kind)
    if not big.isfinite().all() or (kind is torch.float16 and scale < 1e-3):
        pytest.skip("float16 does not hold such numbers")
    assert analysis.linear_cka(big, big, debiased).item() == pytest.approx(1)
    expected = analysis.linear_cka(x, y, debiased).item()
    assert analysis.linear_cka(big, y, debiased).item() == pytest.approx(expected, abs=1e-3)


def test_raw_pixels_are_as_alike_to_themselves_as_anything():
    x = torch.randint(256, (2000, 3072)).float()
    assert analysis.linear_cka(x, x).item() == pytest.approx(1)


def test_only_the_debiased_estimate_is_near_zero_for_independent_features():
    x, y = torch.randn(200, 100), torch.randn(200, 100)
    assert analysis.linear_cka(x, y) > 0.3
    assert abs(analysis.linear_cka(x, y, debiased=True)) < 0.05


@both
def test_what_is_the_same_for_all_images_has_no_cka(debiased):
    assert analysis.linear_cka(torch.full((20, 4), 0.3), torch.randn(20, 4), debiased).isnan()
    with pytest.raises(ValueError, match="at least 4"):
        analysis.linear_cka(torch.randn(3, 2), torch.randn(3, 2))


def test_cls_along_the_encoder_is_its_residual_stream():
    encoder, images = vit.ViT(dim=16, depth=2).eval(), torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    places = analysis.cls_along(encoder, images)  # [5, 5, D]
    with torch.no_grad():
        x = encoder.embed(images / 255)
        torch.testing.assert_close(places[:, 0], x[:, 0])
        x = x + encoder.blocks[0].attn(encoder.blocks[0].norm1(x))[0]
        torch.testing.assert_close(places[:, 1], x[:, 0])
        torch.testing.assert_close(encoder.norm(places[:, -1]), encoder(images / 255)[:, 0])


# ------------------------------------------------------------------------------------------------------------


def test_token_similarity_is_the_cosine():
    tokens = torch.randn(2, 5, 8)
    expected = torch.cosine_similarity(tokens[1, 2], tokens[1, 4], dim=0)
    torch.testing.assert_close(analysis.token_similarity(tokens)[1, 2, 4], expected)


def test_focus_at_its_extremes():
    flat = analysis.focus(torch.tensor([[0.0, 1.0] * 8]))  # half of the patches share the mass evenly
    sharp = analysis.focus(torch.eye(16)[:1])
    # log 8 / log 16
    assert flat["entropy"] == pytest.approx(0.75) and flat["best_quarter"] == pytest.approx(0.5)
    assert sharp["entropy"] == 0 and sharp["best_quarter"] == 1
    middle = torch.zeros(1, 16)
    middle[:, [5, 6, 9, 10]] = 0.5
    assert analysis.focus(middle)["centre"] == 0.5 and flat["centre"] == pytest.approx(0)


@pytest.mark.parametrize("k", [15, 300])
def test_nearest_neighbours_vote_all_of_them_where_there_are_fewer(k):
    queries, keys, labels = torch.randn(30, 6), torch.randn(200, 6), torch.randint(10, (200,))
    for query, found in zip(queries, draw.nearest_neighbours(queries, keys, labels, k=k)):
        cosines = torch.cosine_similarity(query[None], keys)
        votes = labels[cosines.argsort(descending=True)[:k]].tolist()
        assert votes.count(found.item()) == max(map(votes.count, votes))


def test_a_picture_says_that_its_stage_has_not_run_and_a_fault_in_it_is_not_hidden(tmp_path, monkeypatch):
    few = "--data synthetic --limit 30 --out".split() + [tmp_path]
    assert call("results/draw.py", *few).count(": not drawn (its stage has not run") == len(draw.PICTURES)

    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setitem(draw.PICTURES, "maps", (broken, []))
    with pytest.raises(KeyError, match="a bug"):
        call("results/draw.py", *few)


def test_the_film_needs_few_images(tmp_path):
    """15 images: classes of one or two, fewer than 20 neighbours."""
    few = "--data synthetic --limit 15 --device cpu --precision float32 --out".split() + [tmp_path]
    call("ssl.py", *"finetune --dim 16 --epochs 2 --batch 5 --name finetune --keep-epochs".split(), *few)
    assert "learning.gif: 2 frames" in call("results/draw.py", *few)


# -------------------------------------------------------------------------------------------------- the table


def write_row(folder, name, value, seed=0, **more):
    usual = {"value": value, "split": "test", "images": "a", "code": "b"}
    usual |= {"precision": "float32", "limit": None}
    usual |= {"command": f"python ssl.py probe --out runs/{folder.name} --split test --seed {seed}"}
    usual |= {"seed": seed, "provenance": "CIFAR-10", "device": "cpu", "torch": "2"}
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    (folder / "rows" / f"{name}.json").write_text(json.dumps(usual | more))


def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(tmp_path):
    write_row(tmp_path / "run", "m_probe", 0.1)
    write_row(tmp_path / "run-seed1", "m_probe", 0.2, seed=1)
    write_row(tmp_path / "run-seed2", "m_probe", 0.3, seed=2)
    write_row(tmp_path / "run-seed1-backup", "m_probe", 0.9, seed=1)
    others = [{"images": "c"}, {"code": "c"}, {"precision": "bfloat16"}, {"command": "python x"}]
    for seed, other in enumerate(others, start=3):
        write_row(tmp_path / f"run-seed{seed}", "m_probe", 0.9, seed=seed, **other)
    runs = table.runs_of(tmp_path / "run")
    assert [rows["m_probe"]["value"] for rows in runs if rows] == [0.1, 0.2, 0.3]
    assert table.number(runs, "m_probe") == "20.00 ± 10.00 %"


def test_a_mixture_and_few_images_are_said_by_the_rows(tmp_path):
    """Whatever options are typed when the table is made."""
    write_row(tmp_path, "m_probe", 0.1)
    write_row(tmp_path, "finetune", 0.1, device="cuda", limit=500)
    text = call("results/table.py", "--out", tmp_path, "--split", "test")
    assert "cuda, cpu (A MIXTURE" in text and "THESE NUMBERS MEAN NOTHING" in text and "torch: 2" in text


@pytest.fixture
def published(tmp_path):
    """A project with two seeds of laptop, one of full, and pages to be filled in."""
    laptop, second, full = (tmp_path / f"runs/cifar10-{name}" for name in ("laptop", "laptop-seed1", "full"))
    write_row(laptop, "m_probe", 0.5, training={"train": 0.25}, feature="mean")
    write_row(laptop, "pixels_probe", 0.4)
    write_row(laptop, "cka_after", 0.5, debiased=0.2)
    write_row(second, "m_probe", 0.6, seed=1, training={"train": 0.35}, feature="cls")
    write_row(second, "pixels_probe", 0.4, seed=1)
    write_row(full, "m_probe", 0.8)
    (laptop / "commands.txt").write_text("# commit abc\npython ssl.py probe --device cuda --out x\n")
    (laptop / "figures").mkdir()
    (laptop / "figures/cka.png").write_bytes(b"png")
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- end -->\nafter")
    return tmp_path


@pytest.mark.parametrize(
    "placeholder, text",
    [
        ("{laptop m_probe}", "55.00 ± 7.07 %"),
        ("{full m_probe}", "80.00 %"),
        ("{laptop m_probe:feature}", "mean, cls"),  # as each seed chose
        ("{report m_probe}", "38.51 %"),
        ("{full finetune}", "not measured"),
        ("{laptop m_probe:training.train}", "30.00 ± 7.07 %"),
        ("{laptop cka_after}", "0.5000"),
        ("{laptop cka_after:debiased}", "0.2000"),
        ("{laptop m_probe - pixels_probe}", "+15.00 ± 7.07"),
        ("{full m_probe - pixels_probe}", "not measured"),
    ],
)
def test_a_placeholder_gets_the_number_it_asks_for(published, placeholder, text):
    profiles = {name: table.runs_of(published / f"runs/cifar10-{name}") for name in ("laptop", "full")}
    assert table.filled(f"a {placeholder} b", profiles) == f"a {text} b"


def test_a_star_marks_what_the_seeds_luck_does_not_explain():
    """Three differences of standard deviation 1: Student's t wants 4.30 / sqrt(3) = 2.48 of their mean."""
    for mean, text in ((2.4, "+240.00 ± 100.00"), (2.6, "+260.00 ± 100.00 *"), (-2.6, "-260.00 ± 100.00 *")):
        runs = [{"a": {"value": mean + x}, "b": {"value": 0.0, "other": {"x": mean + x}}} for x in (-1, 0, 1)]
        assert table.difference(runs, "a", "b") == text
        assert table.difference(runs, "b:other.x", "b") == text
    assert table.difference(runs[:1], "a", "b") == "-360.00"  # of one seed nothing can be said


def test_publishing_brings_results_pictures_and_pages_up_to_date(published):
    (published / "results/report.template.md").write_text("{full m_probe}\n{table}\n{commands}")
    table.publish(published)
    page, readme = ((published / name).read_text() for name in ("results/report.md", "README.md"))
    assert page.startswith("80.00 %\n| row |") and "    python ssl.py probe --out x" in page
    assert readme.startswith("before\n<!-- results -->\n| row |") and readme.endswith("\n<!-- end -->\nafter")
    line = next(line for line in readme.splitlines() if "m_probe |" in line)
    assert "38.51 % | 55.00 ± 7.07 % |" in line and "| 80.00 % |" in line and "old" not in readme
    assert (published / "results/figures/cka.png").read_bytes() == b"png"
    assert json.loads((published / "results/results.json").read_text()).keys() == {"laptop", "full"}
