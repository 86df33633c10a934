"""Token-to-patch supervision and EFA's oracle, against loops and in the model."""

import math

import pytest
import torch
from torch.nn import functional as F
from toy_clip import batch, retriever

from fmfa.errors import ConfigError
from fmfa.losses.grounding import grounding_hits, grounding_loss, phrase_targets, token_patch_cosine
from fmfa.models.objectives import Objectives


def maps_and_parts(rows=4, size=(48, 16), length=12, seed=0):
    """Random part maps in coarse blocks (parts 0 to 3, -1 for none) and parts of tokens."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, 4, (rows, 1, size[0] // 4, size[1] // 4), generator=generator).float()
    maps = F.interpolate(coarse, size, mode="nearest")[:, 0].to(torch.int8)
    return maps, torch.randint(-1, 5, (rows, length), generator=generator)  # part 4 is in no picture


def truthful(size=4, seed=0):
    maps, parts = maps_and_parts(size, seed=seed)
    return batch(size, seed=seed) | {"part_maps": maps, "token_parts": parts}


def target_of_token(picture, part, patch, stride):
    """Share of each patch's pixels, counted one by one, divided by their sum."""
    rows, columns = ((side - p) // s + 1 for side, p, s in zip(picture.shape, patch, stride))
    shares = [
        sum(
            picture[r * stride[0] + y, c * stride[1] + x].item() == part
            for y in range(patch[0])
            for x in range(patch[1])
        )
        for r in range(rows)
        for c in range(columns)
    ]
    return [share / sum(shares) if part >= 0 and sum(shares) else 0.0 for share in shares]


@pytest.mark.parametrize(("patch", "stride"), [((8, 8), (8, 8)), ((8, 8), (5, 3)), ((16, 4), (16, 4))])
def test_targets_against_counting(patch, stride):
    maps, parts = maps_and_parts(2, (32, 16), 6)
    found = phrase_targets(maps, parts, patch=patch, stride=stride)
    assert found.dtype == torch.float32
    for i in range(2):
        for token in range(6):
            expected = target_of_token(maps[i], parts[i, token].item(), patch, stride)
            assert found[i, token].tolist() == pytest.approx(expected, abs=1e-6)
    assert (parts == 4).any()
    assert not found[parts == 4].any()
    assert not found[parts == -1].any()
    assert not phrase_targets(maps, torch.full_like(parts, -1), patch=patch, stride=stride).any()


def loss_by_loops(text, patches, target, temperature):
    value = 0.0
    for i in range(len(text)):
        for t in range(text.shape[1]):
            scores = [float(F.cosine_similarity(text[i, t], p, dim=0)) / temperature for p in patches[i]]
            log_sum = math.log(sum(math.exp(score) for score in scores))
            value -= sum(q * (score - log_sum) for q, score in zip(target[i, t].tolist(), scores))
    return value


def test_loss_and_hits_against_loops():
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    patches = torch.randn(3, 8, 6, generator=generator, dtype=torch.float64)
    maps, parts = maps_and_parts(3, (32, 16), 5)
    target = phrase_targets(maps, parts, patch=(8, 8), stride=(8, 8)).double()
    cosine = token_patch_cosine(text, patches)
    found = grounding_loss(cosine, target, temperature=0.3)
    assert found.item() == pytest.approx(loss_by_loops(text, patches, target, 0.3), rel=1e-12)
    hits = []
    for i in range(3):
        for t in range(5):
            shares = target[i, t].tolist()
            if any(shares):
                best = max(range(8), key=lambda n: cosine[i, t, n].item())
                hits.append(shares[best] >= max(shares) / 2)
    assert grounding_hits(cosine, target).tolist() == hits
    assert 0 < sum(hits) < len(hits)


def test_only_tokens_with_a_visible_part_get_a_gradient():
    generator = torch.Generator().manual_seed(2)
    text, patches = (torch.randn(2, n, 6, generator=generator).requires_grad_() for n in (5, 8))
    maps, parts = maps_and_parts(2, (32, 16), 5, seed=2)
    target = phrase_targets(maps, parts, patch=(8, 8), stride=(8, 8))
    grounding_loss(token_patch_cosine(text, patches), target, temperature=0.1).backward()
    spoken = target.any(dim=2)
    assert spoken.any()
    assert not spoken.all()
    assert torch.equal(text.grad.abs().sum(dim=2) > 0, spoken)
    assert torch.isfinite(patches.grad).all()


def test_a_perfect_map_reaches_the_entropy_of_its_target():
    target = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]], dtype=torch.float64)
    perfect = target.clamp(min=1e-30).log() * 0.07
    entropy = -(0.5 * math.log(0.5) + 0.5 * math.log(0.25))
    assert grounding_loss(perfect, target, temperature=0.07).item() == pytest.approx(entropy, rel=1e-9)
    assert grounding_hits(perfect, target).tolist() == [True]
    wrong = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]], dtype=torch.float64)
    assert grounding_hits(wrong, target).tolist() == [False]


# --- in the model


def test_the_models_loss_is_the_mean_over_phrase_tokens():
    data = truthful()
    model = retriever(Objectives(grounding=2, grounding_tau=0.1))
    output = model(data)
    assert list(output.losses) == ["grounding"]
    text = model.encode_text(data["caption_ids"]).tokens.detach()
    patches = model.encode_image(data["images"]).tokens[:, 1:].detach()
    length = text.shape[1]
    target = phrase_targets(data["part_maps"], data["token_parts"][:, :length], patch=(8, 8), stride=(8, 8))
    expected = loss_by_loops(text, patches, target, 0.1) / int(target.any(dim=2).sum())
    assert output.losses["grounding"].item() == pytest.approx(2 * expected, rel=1e-5)
    assert 0 <= output.stats["grounding_hit"] <= 1
    output.losses["grounding"].backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_batch_without_phrases_trains():
    data = truthful()
    data["token_parts"].fill_(-1)
    output = retriever(Objectives(grounding=1))(data)
    output.losses["grounding"].backward()
    assert output.losses["grounding"].item() == 0
    assert float(output.stats["grounding_hit"]) == 0


def test_efas_oracle_reads_the_truth_and_plain_efa_does_not():
    data, other = truthful(), truthful()
    other["part_maps"] = maps_and_parts(seed=9)[0]
    oracle, plain = (retriever(Objectives(efa=1, efa_oracle=flag)) for flag in (True, False))
    assert oracle(data).losses["efa"].item() != pytest.approx(oracle(other).losses["efa"].item(), rel=1e-6)
    assert plain(data).losses["efa"].item() == plain(other).losses["efa"].item() == plain(batch()).losses["efa"].item()
    unspoken = dict(data, token_parts=torch.full_like(data["token_parts"], -1))
    assert oracle(unspoken).losses["efa"].item() == plain(data).losses["efa"].item()


def test_training_on_the_truth_finds_it():
    data = truthful(2, seed=3)
    model = retriever(Objectives(grounding=1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    seen = []
    for _ in range(25):
        output = model(data)
        output.losses["grounding"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((output.losses["grounding"].item(), float(output.stats["grounding_hit"])))
    assert seen[-1][0] < seen[0][0] - 0.2
    assert seen[-1][1] > seen[0][1] + 0.2


@pytest.mark.parametrize("wanted", [{"grounding": 1}, {"efa": 1, "efa_oracle": True}])
def test_truth_that_the_batch_lacks_is_named(wanted):
    assert Objectives(**wanted).needs_parts
    assert not Objectives(efa=1, sdm=1).needs_parts
    with pytest.raises(ConfigError, match="lacks part_maps, token_parts"):
        retriever(Objectives(**wanted))(batch())


def test_wrong_oracle_objectives_are_errors():
    with pytest.raises(ConfigError, match=r"grounding_tau: should be greater than 0, found 0\.0"):
        Objectives(grounding_tau=0.0)
    with pytest.raises(ConfigError, match=r"grounding: should be greater than or equal to 0, found -1\.0"):
        Objectives(grounding=-1.0)
