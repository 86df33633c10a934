from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fmfa import metrics
from fmfa.errors import ConfigError
from fmfa.metrics import chance_metrics, feature_metrics, rank_metrics

FIXTURES = Path(__file__).parent / "fixtures"


def naive(scores, query, gallery):
    """First rank, average precision and INP of each query, from a sorted list; ties put misses first."""
    rows = []
    for row, identity in zip(np.asarray(scores), query):
        order = sorted(range(len(row)), key=lambda item: (-row[item], gallery[item] == identity))
        hits = [rank for rank, item in enumerate(order, 1) if gallery[item] == identity]
        precisions = [(count + 1) / rank for count, rank in enumerate(hits)]
        rows.append((hits[0], np.mean(precisions), len(hits) / hits[-1]) if hits else (0, np.nan, np.nan))
    return [np.array(column) for column in zip(*rows)]


def agrees(found, expected):
    np.testing.assert_array_equal(found.first_rank, expected[0])
    np.testing.assert_allclose(found.average_precision, expected[1], rtol=1e-12)
    np.testing.assert_allclose(found.inverse_negative_penalty, expected[2], rtol=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 9),
    gallery=st.integers(1, 14),
    identities=st.integers(1, 6),
    levels=st.sampled_from([1, 2, 5, 1000]),
)
def test_counting_agrees_with_sorting_ties_and_unanswerable_queries_included(
    seed, queries, gallery, identities, levels
):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (queries, gallery)) / 4 - 1
    query, items = rng.integers(0, identities, queries), rng.integers(0, identities, gallery)
    found = rank_metrics(torch.from_numpy(scores), query, items)
    agrees(found, naive(scores, query, items))
    assert found.unanswerable == sum(identity not in items for identity in query)
    backwards = rank_metrics(scores.T, items, query)
    agrees(backwards, naive(scores.T, items, query))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 3, 512, 4096]),
    apart=st.sampled_from([0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1.0]),
    identities=st.sampled_from([1, 5, 40]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_near_ties_of_features_rank_as_their_rounded_cosines(seed, size, apart, identities, dtype):
    rng = np.random.default_rng(seed)
    query, gallery = rng.normal(size=(11, size)), rng.normal(size=(30, size))
    gallery = np.concatenate([gallery, gallery * rng.uniform(0.1, 9, (30, 1)) + apart * rng.normal(size=gallery.shape)])
    if seed % 5 == 0:
        gallery = gallery[:1] + apart * gallery  # all pictures are as good as one
    query, gallery = torch.from_numpy(query).to(dtype), torch.from_numpy(gallery).to(dtype)
    wanted, items = rng.integers(0, identities, 11), rng.integers(0, identities, 60)
    unit = [F.normalize(side.double(), dim=1) for side in (query, gallery)]
    agrees(feature_metrics(query, gallery, wanted, items), naive((unit[0] @ unit[1].T).float(), wanted, items))


def test_only_scores_near_a_relevant_one_are_taken_again(monkeypatch):
    again = []
    exact = metrics._NearCounts._exact
    monkeypatch.setattr(metrics._NearCounts, "_exact", lambda *given: again.append(len(given[2])) or exact(*given))
    rng = np.random.default_rng(0)
    identity = np.arange(900) % 300
    feature_metrics(rng.normal(size=(900, 512)), rng.normal(size=(900, 512)), identity, identity)
    assert 900 * 6 <= sum(again) < 900 * 10  # each relevant one twice, of 900 pictures
    again.clear()
    feature_metrics(np.ones((900, 8)), np.ones((900, 8)), identity, identity)
    assert sum(again) == 900 * 3


@pytest.mark.parametrize("chunk", [1, 60, 61, 7 * 60, 10**6])
def test_chunks_of_any_size_give_the_same(monkeypatch, chunk):
    rng = np.random.default_rng(1)
    query, gallery = rng.normal(size=(23, 5)), rng.normal(size=(60, 5))
    gallery[30:] = gallery[:30]  # exact ties, half of them between different identities
    query_identity, gallery_identity = rng.integers(0, 8, 23), rng.integers(0, 8, 60)
    expected = feature_metrics(query, gallery, query_identity, gallery_identity)
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", chunk)
    found = feature_metrics(query, gallery, query_identity, gallery_identity)
    for name, values in expected.per_query().items():
        np.testing.assert_array_equal(found.per_query()[name], values)


def test_features_and_their_cosine_rank_alike_whatever_their_length():
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (30, 40))
    query_identity, gallery_identity = torch.arange(30) % 7, torch.arange(40) % 7
    unit = [side / side.norm(dim=1, keepdim=True) for side in (query, gallery)]
    expected = rank_metrics(unit[0] @ unit[1].T, query_identity, gallery_identity)
    lengths = torch.rand(40, 1, generator=generator) * 100 + 0.01
    found = feature_metrics(query * 3, gallery * lengths, query_identity, gallery_identity)
    agrees(found, (expected.first_rank, expected.average_precision, expected.inverse_negative_penalty))


def test_constant_scores_earn_nothing():
    identity = np.repeat(np.arange(50), 2)
    assert rank_metrics(np.zeros((100, 100)), identity, identity).summary["R@1"] == 0


def test_parallel_features_tie_exactly():
    rng = np.random.default_rng(2)
    query, item = rng.normal(size=(200, 1, 7)), rng.normal(size=(200, 1, 7))
    for one, best in zip(query, item):  # the same direction in two lengths, one right and one wrong
        gallery = best * rng.uniform(0.1, 10, (2, 1))
        assert feature_metrics(one, gallery, [1], [1, 2]).first_rank == 2


@pytest.mark.parametrize("case", range(3))
def test_released_irra_metrics(case):
    with np.load(FIXTURES / "fmfa_narrow.npz") as file:
        data = {key.split("/")[-1]: file[key] for key in file.files if key.startswith(f"rank/{case}/")}
    found = rank_metrics(data["similarity"], data["query_pid"], data["gallery_pid"])
    np.testing.assert_allclose(100 * found.cmc(10), data["cmc"], rtol=1e-6)
    np.testing.assert_allclose(100 * found.summary["mAP"], data["mAP"], rtol=1e-6)
    np.testing.assert_allclose(100 * found.summary["mINP"], data["mINP"], rtol=1e-6)
    np.testing.assert_allclose(found.summary["R@5"], found.cmc(10)[4], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "protocol", "step"),
    [
        ("metric_cuhk_{}", "ivt", 2),
        ("metric_icfg_{}", "ivt", 1),
        ("metric_cuhk_standardAP_{}(unused in reference)", "standard", 2),
    ],
)
def test_released_ivt_metrics(name, protocol, step):
    with np.load(FIXTURES / "ivt_small.npz") as file:
        text, image, identity = (file[f"units/metric_{key}"] for key in ("txt", "img", "pid"))
        cmc, mean_precision = (file["units/" + name.format(key)] for key in ("cmc", "mAP"))
    found = feature_metrics(text, image, identity, identity, protocol=protocol, gallery_step=step)
    np.testing.assert_allclose(found.cmc(len(cmc)), cmc, rtol=1e-6)
    np.testing.assert_allclose(found.summary["mAP"], mean_precision, rtol=1e-6)
    similarity = torch.from_numpy(text).double() @ torch.from_numpy(image).double().T
    unnormalised = rank_metrics(similarity, identity, identity, protocol=protocol, gallery_step=step)
    assert unnormalised.gallery_size == found.gallery_size == -(-len(identity) // step)


def test_unanswerable_queries_are_left_out_or_count_as_misses():
    scores, query, gallery = np.array([[3.0, 2, 1], [3, 2, 1]]), np.array([7, 9]), np.array([8, 7, 8])
    standard = rank_metrics(scores, query, gallery)
    assert standard.unanswerable == 1
    assert standard.summary["mAP"] == 0.5
    np.testing.assert_array_equal(standard.cmc(3), [0, 1, 1])
    np.testing.assert_array_equal(standard.recall(5), [1, np.nan])
    ivt = rank_metrics(scores, query, gallery, protocol="ivt")
    np.testing.assert_array_equal(ivt.cmc(3), [0, 0.5, 0.5])
    assert ivt.summary["mAP"] == (0.0 + 1 / 2) / 2 / 2
    none = rank_metrics(scores, query + 100, gallery)
    assert none.unanswerable == 2
    assert none.summary["R@1"] == 0


@pytest.mark.parametrize("protocol", ["standard", "ivt"])
def test_chance_is_the_mean_over_every_order_of_a_small_gallery(protocol):
    gallery = np.array([0, 0, 0, 1, 2, 2])
    query = np.array([0, 1, 2, 5])
    orders = np.array(list(permutations(range(6))))
    summed: dict[str, float] = {}
    for identity in query:
        result = rank_metrics(orders, np.full(len(orders), identity), gallery, protocol=protocol)
        for name, value in result.summary.items():
            summed[name] = summed.get(name, 0.0) + value
    answered = len(query) if protocol == "ivt" else 3
    found = chance_metrics(query, gallery, protocol=protocol)
    assert found == pytest.approx({name: value / answered for name, value in summed.items()}, rel=1e-12)


def test_chance_agrees_with_random_rankings():
    rng = np.random.default_rng(4)
    gallery, query = rng.integers(0, 60, 300), rng.integers(0, 60, 6000)
    found = rank_metrics(rng.random((6000, 300), dtype=np.float32), query, gallery)
    expected = chance_metrics(query, gallery)
    for name, values in found.per_query().items():
        error = np.nanstd(values) / np.sqrt(len(query))
        assert abs(np.nanmean(values) - expected[name]) < 4 * error, name


def test_bad_input_is_named():
    scores, identity = np.ones((2, 3)), np.arange(3)
    with pytest.raises(ValueError, match=r"3 query and 3 gallery identities for scores of shape \(2, 3\)"):
        rank_metrics(scores, identity, identity)
    with pytest.raises(ValueError, match="not a finite number"):
        rank_metrics(np.array([[1.0, np.nan, 0]]), identity[:1], identity)
    with pytest.raises(ValueError, match="not a finite number"):
        feature_metrics(np.array([[1.0, np.inf]]), np.ones((3, 2)), identity[:1], identity)
    with pytest.raises(ValueError, match="gallery is empty"):
        rank_metrics(np.ones((2, 0)), identity[:2], identity[:0])
    with pytest.raises(ConfigError, match="'oxford'; known are standard, ivt"):
        rank_metrics(scores, identity[:2], identity, protocol="oxford")
    with pytest.raises(ValueError, match="No query has a relevant"):
        chance_metrics(identity + 10, identity)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same():
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(500, 16, generator=generator), torch.randn(400, 16, generator=generator)
    identities = torch.arange(500) % 90, torch.arange(400) % 90
    here, there = (feature_metrics(query.to(d), gallery.to(d), *identities) for d in ("cpu", "cuda"))
    for name, values in here.per_query().items():
        np.testing.assert_allclose(there.per_query()[name], values, rtol=1e-14)  # sums in another order
    np.testing.assert_array_equal(there.first_rank, here.first_rank)
