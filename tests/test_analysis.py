"""CKA against Gram matrices, and the measures of the similarity maps."""

import argparse
import json

import numpy as np
import pytest
import torch
from conftest import call

import analysis
import data


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


def streamed(*parts, debiased=False, batch=17):
    streaming = analysis.StreamingCKA()
    for batch_parts in zip(*(p.split(batch) for p in parts)):
        streaming.add(*batch_parts)
    return streaming.result(debiased)


@pytest.mark.parametrize("debiased", [False, True])
def test_streaming_cka_equals_brute_force(debiased):
    x = torch.randn(100, 20, dtype=torch.float64) + 3
    y = (x[:, :7] @ torch.randn(7, 9, dtype=torch.float64)).tanh()
    y += 0.3 * torch.randn(100, 9, dtype=torch.float64)
    found = streamed(x, y, debiased=debiased)
    assert found[0, 1].item() == pytest.approx(brute_force_cka(x, y, debiased).item(), abs=1e-10)
    assert debiased or analysis.linear_cka(x, y).item() == pytest.approx(found[0, 1].item(), abs=1e-10)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found, streamed(x, y, debiased=debiased, batch=100))


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_ignores_rotation_scale_and_shift_and_is_one_on_itself(debiased):
    x, y = torch.randn(80, 10, dtype=torch.float64), torch.randn(80, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    found = streamed(x, 5 * x @ rotation + 2, y, y - 7, debiased=debiased)
    assert found[0, 1].item() == pytest.approx(1) and found[0, 0].item() == pytest.approx(1)
    assert found[0, 2].item() == pytest.approx(found[1, 3].item())


def test_only_the_debiased_estimate_is_near_zero_for_independent_features():
    x, y = torch.randn(200, 100), torch.randn(200, 100)
    assert streamed(x, y)[0, 1] > 0.3
    assert abs(streamed(x, y, debiased=True)[0, 1]) < 0.05


def test_what_is_the_same_for_all_images_has_no_cka():
    found = streamed(torch.full((20, 4), 0.3), torch.randn(20, 4))
    assert found[0].isnan().all() and found[1, 1] == 1
    with pytest.raises(ValueError, match="at least 4"):
        streamed(torch.randn(3, 2))


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_mind_how_small_a_representation_is(debiased):
    x, y = torch.randn(80, 10, dtype=torch.float64), torch.randn(80, 6, dtype=torch.float64)
    found, tiny = streamed(x, y, debiased=debiased), streamed(1e-7 * x, y, debiased=debiased)
    torch.testing.assert_close(tiny, found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_one_nan_costs_its_own_row_and_column_only(debiased):
    x, y, z = (torch.randn(80, 5, dtype=torch.float64) for _ in range(3))
    broken = x.clone()
    broken[7, 2] = torch.nan
    found, whole = streamed(broken, y, z, debiased=debiased), streamed(x, y, z, debiased=debiased)
    assert found[0].isnan().all() and found[:, 0].isnan().all()
    torch.testing.assert_close(found[1:, 1:], whole[1:, 1:])


def test_fewer_keys_than_neighbours_asked_for_all_vote():
    queries, keys, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, 1, 1, 0, 2])
    guess = analysis.nearest_neighbours(queries, keys, labels, k=20)
    assert guess.tolist() == [1, 1, 1]


def test_the_moving_picture_needs_few_images(tmp_path):
    """15 images: classes of one or two, fewer than 20 neighbours."""
    few = "--data synthetic --limit 15 --device cpu --precision float32 --out".split() + [tmp_path]
    call("ssl.py", *"finetune --dim 16 --epochs 1 --batch 5 --name finetune --keep-epochs".split(), *few)
    assert "drew" in call("analysis.py", "movie", *few)


def test_token_similarity_is_the_cosine():
    tokens = torch.randn(2, 5, 8)
    found = analysis.token_similarity(tokens)
    expected = torch.cosine_similarity(tokens[1, 2], tokens[1, 4], dim=0)
    torch.testing.assert_close(found[1, 2, 4], expected)


def test_focus_at_its_two_extremes():
    flat = analysis.focus(torch.tensor([[0.0, 1.0] * 8]))  # half of the patches share the mass evenly
    sharp = analysis.focus(torch.eye(16)[:1])
    # log 8 / log 16
    assert flat["entropy"] == pytest.approx(0.75) and flat["best_quarter"] == pytest.approx(0.5)
    assert sharp["entropy"] == 0 and sharp["best_quarter"] == 1 and sharp["peak"] == 1


def test_nearest_neighbours_vote():
    queries, keys, labels = torch.randn(30, 6), torch.randn(200, 6), torch.randint(10, (200,))
    for query, found in zip(queries, analysis.nearest_neighbours(queries, keys, labels, k=15)):
        cosines = torch.cosine_similarity(query[None], keys)
        votes = labels[cosines.argsort(descending=True)[:15]].tolist()
        assert votes.count(found.item()) == max(map(votes.count, votes))


def test_colour_map_ends_are_viridis():
    found = analysis.colour(np.array([0.0, 1.0, 0.5]))
    assert found.tolist() == [[68, 1, 84], [253, 231, 37], [33, 144, 141]]


def results(folder, **row):
    """A results.json with one row."""
    usual = {"value": 0.5, "split": "test", "images": "a", "code": "b", "precision": "float32"}
    usual |= {"command": f"python ssl.py probe --out {folder.name} --split test --seed 0"}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"rows": {"m_probe": usual | row}}))


def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(tmp_path):
    results(tmp_path / "run", value=0.1)
    for seed, value in ((1, 0.2), (2, 0.3)):
        command = f"python ssl.py probe --out run-seed{seed} --split test --seed {seed}"
        results(tmp_path / f"run-seed{seed}", value=value, command=command)
    results(tmp_path / "run-seed1-backup", value=0.9)
    results(
        tmp_path / "run-seed3", command="python ssl.py probe --out run-seed3 --split test --seed 3 --stem"
    )
    for seed, other in enumerate([{"images": "c"}, {"code": "c"}, {"precision": "bfloat16"}], start=4):
        command = f"python ssl.py probe --out run-seed{seed} --split test --seed {seed}"
        results(tmp_path / f"run-seed{seed}", command=command, **other)
    args = argparse.Namespace(out=tmp_path / "run", split="test")
    assert analysis.over_seeds(args, "m_probe") == [0.1, 0.2, 0.3]


def test_a_mixture_of_machines_is_said_to_be_one():
    rows = {"a": {"precision": "float32", "seed": 0}, "b": {"precision": "bfloat16", "seed": 0}}
    assert analysis.values_of(rows, "seed") == "0"
    assert "float32, or bfloat16 (A MIXTURE" in analysis.values_of(rows, "precision")


@pytest.mark.parametrize("system", [True, False])
def test_letters_are_drawn_or_spelled_but_never_boxes(system, monkeypatch):
    if not system:
        monkeypatch.setattr(analysis, "FONTS", ["no such font.ttf"])
    analysis.legible.cache_clear()
    for words, plain in [("Bär", "Bar"), ("señal, été", "senal, ete"), ("Straße", "Strasse"), ("кот", "???")]:
        shown, font = analysis.legible(words, 13)
        assert not analysis.lacks(font, shown) and shown in (words, plain)
        assert system or shown == plain
    analysis.legible.cache_clear()


def test_with_very_few_images_every_angle_still_has_its_example(monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: data.synthetic(2))
    args = argparse.Namespace(data="synthetic", seed=0)
    assert analysis.task_examples(args, 8)[-1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_arrays_of_different_images_are_not_compared_in_a_figure(tmp_path):
    rows = {"maps": "a", "maps_before": "a", "maps_after": "b"}
    rows = {name: {"value": 0, "split": "test", "images": images} for name, images in rows.items()}
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "maps.npz").touch()
    args = argparse.Namespace(out=tmp_path, split="test")
    assert analysis.missing(args, ["maps.npz", "maps_before"]) == []
    assert "the same images" in analysis.missing(args, ["maps.npz", "maps_after"])[0]


def test_a_figure_says_what_it_needs_and_a_fault_in_it_is_not_hidden(tmp_path, monkeypatch):
    few = "--data synthetic --limit 30 --device cpu --out".split() + [tmp_path]
    drawn = call("analysis.py", "figures", *few)
    assert "maps: not drawn, as it needs maps.npz, maps_before, maps_after" in drawn
    assert "captions: not drawn, as it needs fusion_tiny.npz, fusion_tiny_image_only.npz" in drawn

    def broken(_):
        raise KeyError("a bug")

    monkeypatch.setitem(analysis.FIGURES, "patches", (broken, []))
    with pytest.raises(KeyError, match="a bug"):
        call("analysis.py", "figures", *few)
