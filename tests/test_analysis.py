"""CKA against Gram matrices, and the measures of the similarity maps."""

import numpy as np
import pytest
import torch
from conftest import call

import analysis


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
