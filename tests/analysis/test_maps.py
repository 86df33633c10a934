"""Grounding: scores against brute force and known maps, maps against their formulas, relevance against differences."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_training import TINY_CLIP, TOKENIZER

from fmfa.analysis.grounding import (
    COLUMNS,
    average_precision,
    draw_phrases,
    grounding_table,
    mass_inside,
    measure_grounding,
    part_masks,
    phrase_scores,
    pointing_game,
    prior_coverage,
)
from fmfa.analysis.maps import (
    ATTENTION,
    GRADIENT,
    SPARSE,
    TOKEN_PATCH,
    PatchGrid,
    gradient_relevance,
    patch_grid,
    phrase_maps,
    token_maps,
    true_patches,
)
from fmfa.data.annotations import Dataset
from fmfa.errors import AnnotationError, ConfigError
from fmfa.losses.efa import sparsify
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtConfig, IvtRetriever
from fmfa.models.objectives import Objectives
from fmfa.simpedes.canvas import PARTS
from fmfa.simpedes.truth import Truth
from fmfa.systems import System


def small_clip(**objectives):
    return ClipRetriever(TINY_CLIP, Objectives(**objectives) if objectives else None, seed=1).eval()


def small_ivt():
    sizes = {"width": 16, "depth": 2, "heads": 2, "image_size": (32, 16), "patch": 8, "stride": 6}
    return IvtRetriever(IvtConfig(**sizes, vocab_size=30, positions=12), seed=1).eval()


# --- scores


def naive_scores(values, true):
    """Pointing game by drawing the tie at random, mass by a loop, average precision by its definition."""
    best = [n for n, v in enumerate(values) if v == max(values)]
    hit = np.mean([true[n] for n in best])
    mass = sum(v for v, t in zip(values, true) if t) / sum(values)
    previous, ap = 0.0, 0.0
    for threshold in sorted(set(values), reverse=True):
        taken = [t for v, t in zip(values, true) if v >= threshold]
        recall = sum(taken) / sum(true)
        ap += (recall - previous) * sum(taken) / len(taken)
        previous = recall
    return hit, mass, ap


def test_scores_equal_their_definitions_ties_included():
    draw = np.random.default_rng(0)
    maps = draw.integers(0, 5, (60, 12)).astype(float)
    maps[:, 0] += 1  # no map of zeros
    true = draw.random((60, 12)) < 0.3
    true[np.arange(60), draw.integers(0, 12, 60)] = True
    expected = np.array([naive_scores(v, t) for v, t in zip(maps, true)])
    found = np.stack([pointing_game(maps, true), mass_inside(maps, true), average_precision(maps, true)], axis=1)
    np.testing.assert_allclose(found, expected)


def test_scores_of_a_map_made_by_hand():
    maps = np.array([[0.0, 4.0, 3.0, 2.0, 1.0]])
    true = np.array([[False, False, True, False, True]])
    assert pointing_game(maps, true) == [0]
    assert mass_inside(maps, true) == [pytest.approx(0.4)]
    assert average_precision(maps, true) == [pytest.approx((1 / 2 + 2 / 4) / 2)]


def test_a_flat_map_scores_the_share_of_the_part():
    true = np.array([[True, False, False, False], [True, True, False, False]])
    for value in (0.0, 2.5):
        maps = np.full((2, 4), value)
        np.testing.assert_allclose(pointing_game(maps, true), [0.25, 0.5])
        np.testing.assert_allclose(mass_inside(maps, true), [0.25, 0.5])


def phrases_of(identity, part="bag", visibility="2 to 8 %"):
    return pd.DataFrame({"identity": identity, "part": part, "visibility": visibility})


def test_the_part_itself_scores_everything_and_noise_scores_chance():
    draw = np.random.default_rng(1)
    count, patches = 3000, 24
    true = draw.random((count, patches)) < 0.2
    true[:, 0] |= ~true.any(axis=1)
    maps = {"part": true.astype(float), "noise": draw.random((count, patches))}
    phrases = phrases_of(draw.integers(0, 300, count))
    table = grounding_table(phrases, phrase_scores(maps, true, draw.random((count, patches))))
    total = table[(table["part"] == "all") & (table["visibility"] == "all")].set_index("map")
    assert total.loc["part", ["hit", "hit_low", "hit_high", "mass", "ap"]].tolist() == [1, 1, 1, 1, 1]
    noise = total.loc["noise"]
    assert noise["hit_low"] < noise["chance_hit"] < noise["hit_high"]
    assert noise["hit_high"] - noise["hit_low"] < 0.05
    assert noise["mass"] == pytest.approx(noise["chance_hit"], abs=0.01)
    assert noise["ap"] == pytest.approx(noise["chance_ap"], abs=0.01)
    assert noise["prior_hit"] == pytest.approx(noise["chance_hit"], abs=0.03)  # the prior was noise as well


def test_the_table_has_a_row_for_each_part_and_bin_and_their_means():
    phrases = phrases_of([1, 1, 2, 3], ["bag", "bag", "hair", "bag"], ["small", "large", "small", "large"])
    true = np.array([[True, False]] * 4)
    maps = {"m": np.array([[2.0, 1], [1, 2], [1, 2], [3, 0]])}
    table = grounding_table(phrases, phrase_scores(maps, true, np.ones((4, 2))))
    assert list(table.columns) == list(COLUMNS)
    rows = table.set_index(["part", "visibility"])
    assert rows["phrases"].to_dict() == {
        ("all", "all"): 4,
        ("bag", "all"): 3,
        ("hair", "all"): 1,
        ("all", "small"): 2,
        ("all", "large"): 2,
    }
    assert rows.loc[("bag", "all"), "hit"] == pytest.approx(2 / 3)
    assert rows.loc[("all", "small"), "hit"] == 0.5
    assert rows.loc[("all", "all"), "mass"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3 + 1) / 4)
    assert np.isnan(rows.loc[("hair", "all"), "hit_low"])  # one identity says nothing about others


# --- patches


def test_coverage_counts_pixels_of_overlapping_patches():
    grid = PatchGrid((13, 9), (4, 3), (3, 2))
    mask = np.random.default_rng(2).random((2, 13, 9)) < 0.4
    assert grid.shape == (4, 4)
    expected = [
        [m[3 * r : 3 * r + 4, 2 * c : 2 * c + 3].mean() for r in range(grid.shape[0]) for c in range(grid.shape[1])]
        for m in mask
    ]
    np.testing.assert_allclose(grid.coverage(mask), expected, rtol=1e-6)


def test_coverage_of_another_picture_size_is_that_of_the_resized_picture():
    mask = np.zeros((1, 64, 32))
    mask[:, :16, 16:] = 1  # the upper right of 4 x 2 blocks
    covered = PatchGrid((32, 16), (8, 8), (8, 8)).coverage(mask).reshape(4, 2)
    assert covered[0, 1] > 0.9
    assert covered[0, 0] < 0.1
    assert covered[2:].max() == 0


def test_true_patches_of_large_small_and_absent_parts():
    coverage = np.array([[1.0, 0.25, 0.24, 0], [0.08, 0.04, 0.039, 0], [0.3, 0.16, 0.14, 0.0], [0, 0, 0, 0]])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(true_patches(coverage), np.array(expected, bool))


def test_the_grid_of_a_model_is_that_of_its_tokens():
    for model in (small_clip(), small_ivt()):
        grid, pictures = patch_grid(model), torch.zeros(1, 3, *model.config["image_size"])
        assert model.encode_image(pictures).tokens.shape[1] == 1 + np.prod(grid.shape)
    with pytest.raises(ConfigError, match="Linear has no known patches"):
        patch_grid(nn.Linear(2, 2))


# --- phrases


def test_phrases_are_the_words_of_their_captions_and_have_their_part(tiny):
    phrases = draw_phrases(tiny, "test", 10_000)
    truth = {r["file_path"]: r for r in Truth(tiny.images.parent).records("test")}
    assert all(r.caption[r.start : r.end] == r.phrase for r in phrases.itertuples())
    assert set(phrases["part"]) <= set(PARTS)
    masks = part_masks(tiny, "test", phrases)
    assert masks.any(axis=(1, 2)).all()
    for row, mask in zip(phrases.itertuples(), masks):
        record = truth[row.image]
        assert record["id"] == row.identity
        assert mask.mean() == pytest.approx(row.visible, abs=0.01)  # measured on the finer canvas
        phrase = [p for c in record["captions"] if c["text"] == row.caption for p in c["phrases"]]
        assert any(p["text"] == row.phrase and p["part"] == row.part and not p["mistakes"] for p in phrase)
    assert (phrases["visible"] < 0.02).equals(phrases["visibility"] == "under 2 %")
    assert (phrases["visible"] >= 0.08).equals(phrases["visibility"] == "8 % and more")


def test_the_draw_depends_on_the_seed_alone(tiny):
    first, again, other = (draw_phrases(tiny, "test", 30, seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert len(first) == 30
    assert not first.equals(other)


def test_no_ground_truth_is_said(tmp_path, tiny):
    other = Dataset("mine", tmp_path / "imgs", tiny.table)
    with pytest.raises(AnnotationError, match="no ground truth"):
        draw_phrases(other, "test", 5)


def test_the_prior_is_the_mean_place_in_training(tiny):
    grid = PatchGrid((96, 32), (8, 8), (8, 8))
    maps = Truth(tiny.images.parent).parts("train").values()
    expected = np.mean([grid.coverage((m == PARTS.index("bag"))[None])[0] for m in maps], axis=0)
    np.testing.assert_allclose(prior_coverage(tiny, grid)["bag"], expected, atol=1e-6)


# --- maps


def test_token_maps_equal_a_loop():
    model = small_clip(irr=1.0, irr_depth=1)
    draw = torch.Generator().manual_seed(0)
    seen, read = torch.randn(2, 9, 64, generator=draw), torch.randn(2, 5, 64, generator=draw)
    chosen = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    maps = token_maps(model, seen, read, chosen)
    rows = torch.stack([read[0, t] @ seen[0, 1:].T for t in (1, 2)])
    torch.testing.assert_close(maps[TOKEN_PATCH][0], rows.mean(0) - rows.mean(0).min(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps[SPARSE][0], sparsify(rows).mean(0))
    head, heads = model.irr, model.irr.heads
    query, memory = head.ln_pre_t(read[0]), head.ln_pre_i(seen[0])
    wq, wk, _ = head.cross_attn.in_proj_weight.chunk(3)
    bq, bk, _ = head.cross_attn.in_proj_bias.chunk(3)
    q, k = ((x @ w.T + b).unflatten(1, (heads, -1)) for x, w, b in ((query, wq, bq), (memory, wk, bk)))
    weights = torch.stack([(q[:, h] @ k[:, h].T / 64**0.5 * heads**0.5).softmax(dim=1) for h in range(heads)])
    torch.testing.assert_close(maps[ATTENTION][0], weights.mean(0)[1:3, 1:].mean(0), atol=1e-5, rtol=1e-4)
    assert all(not m[1].any() for m in maps.values())  # a phrase that the tokenizer cut off


def test_sparse_map_takes_the_threshold_that_the_model_was_trained_with():
    draw = torch.Generator().manual_seed(0)
    seen, read = torch.randn(1, 9, 64, generator=draw), torch.randn(1, 5, 64, generator=draw)
    chosen = torch.ones(1, 5, dtype=torch.bool)
    plain, strict = (
        token_maps(small_clip(**o), seen, read, chosen)[SPARSE] for o in ({}, {"efa": 1, "efa_sigma": 0.9})
    )
    assert (strict > 0).sum() < (plain > 0).sum()


@pytest.mark.parametrize("make", [small_clip, small_ivt])
def test_relevance_is_the_derivative_when_a_patch_is_scaled(make):
    model = make().double()
    if isinstance(model, ClipRetriever):  # tokens cannot be ids of a tokenizer that the small IVT lacks
        ids = TOKENIZER(["a red bag", "black shoes"])
        convolution = model.clip.visual.conv1
    else:
        ids = torch.tensor([[1, 5, 7, 0], [1, 9, 3, 4]])
        convolution = model.encoder_vl.patch_embed.proj
    pictures = torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = gradient_relevance(model, pictures, ids)
    assert not convolution._forward_hooks
    assert all(p.grad is None for p in model.parameters())

    def similarity(patch, factor):
        def scale(module, given, output):
            flat = output.flatten(2).clone()
            flat[:, :, patch] *= factor
            return flat.view_as(output)

        handle = convolution.register_forward_hook(scale)
        with torch.no_grad():
            value = F.cosine_similarity(model.encode_image(pictures).embedding, model.encode_text(ids).embedding)
        handle.remove()
        return value

    step = 1e-5
    expected = [(similarity(n, 1 + step) - similarity(n, 1 - step)) / (2 * step) for n in range(found.shape[1])]
    torch.testing.assert_close(found, torch.stack(expected, dim=1), atol=1e-9, rtol=1e-5)
    assert found.abs().max() > 1e-4


def test_maps_of_phrases_do_not_depend_on_the_batch_and_leave_the_model_alone(tiny, shipped, monkeypatch):
    phrases = draw_phrases(tiny, "test", 7)
    shipped.model.train()
    together = phrase_maps(shipped, tiny.images, phrases)
    monkeypatch.setattr("fmfa.analysis.maps.BATCH_SIZE", 2)
    apart = phrase_maps(shipped, tiny.images, phrases)
    assert shipped.model.training
    shipped.model.eval()
    assert set(together) == {TOKEN_PATCH, SPARSE, GRADIENT}
    for name, maps in together.items():
        assert maps.shape == (7, 48)
        assert (maps >= 0).all()
        np.testing.assert_allclose(maps, apart[name], rtol=1e-3, atol=1e-5)


def test_a_phrase_is_read_at_its_own_place(tiny, shipped):
    phrases = draw_phrases(tiny, "test", 40, 1)
    row = phrases.iloc[[0]]
    maps = phrase_maps(shipped, tiny.images, row)
    caption, picture = row["caption"].item(), shipped.transform(tiny.images / row["image"].item())
    start, end = row["start"].item(), row["end"].item()
    spans = enumerate(shipped.tokenizer.offsets(caption))
    places = [n for n, span in spans if span and span[0] >= start and span[1] <= end]
    pieces = shipped.tokenizer.decode(shipped.tokenizer([caption])[0, places])
    assert "".join(pieces) == row["phrase"].item().lower().replace(" ", "")
    with torch.no_grad():
        read = shipped.model.encode_text(shipped.tokenizer([caption])).tokens[0, places]
        seen = shipped.model.encode_image(picture[None]).tokens[0, 1:]
    expected = (read @ seen.T).mean(0)
    np.testing.assert_allclose(maps[TOKEN_PATCH][0], expected - expected.min(), atol=1e-4)


# --- the whole


def test_grounding_of_the_shipped_weights_on_real_pictures(tiny, shipped):
    table = measure_grounding(shipped, tiny, "test", phrases=120)
    assert list(table.columns) == list(COLUMNS)
    total = table[(table["part"] == "all") & (table["visibility"] == "all")].set_index("map")
    assert set(total.index) == {TOKEN_PATCH, SPARSE, GRADIENT}
    assert (total["phrases"] == 120).all()
    assert total.loc[GRADIENT, "hit_low"] > total.loc[GRADIENT, "chance_hit"]
    assert total["prior_hit"].iloc[0] > 0.5  # people stand upright in the middle
    for (_, visibility), rows in table.groupby(["map", "visibility"]):
        if visibility == "all":
            assert rows["phrases"].sum() == 2 * 120
    pd.testing.assert_frame_equal(table, measure_grounding(shipped, tiny, "test", phrases=120))


def test_grounding_of_ivt_has_the_maps_that_it_can_have(tiny, shipped):
    sizes = {"width": 16, "depth": 1, "heads": 2, "image_size": (96, 32), "patch": 8, "stride": 8}
    model = IvtRetriever(IvtConfig(**sizes, vocab_size=shipped.tokenizer.vocab_size, positions=64)).eval()
    table = measure_grounding(System(model, shipped.tokenizer, shipped.transform), tiny, "test", phrases=30)
    assert set(table["map"]) == {TOKEN_PATCH, SPARSE, GRADIENT}
    assert table["hit"].between(0, 1).all()
