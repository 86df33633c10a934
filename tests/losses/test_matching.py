import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa.errors import ConfigError
from fmfa.losses import matching as losses

FIXTURE = Path(__file__).parents[1] / "fixtures" / "fmfa_narrow.npz"


def batch(seed=0, rows=7, width=5, identities=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, width, generator=generator, dtype=dtype) for _ in range(2))
    return image, text, torch.randint(identities, (rows,), generator=generator)


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def softmax(values):
    exponentials = [math.exp(v - max(values)) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def row_divergence(values, positive, epsilon=1e-8):
    p = softmax(values)
    q = [(1 / sum(positive) if same else 0) for same in positive]
    return sum(p[j] * (math.log(p[j]) - math.log(q[j] + epsilon)) for j in range(len(p)))


def both_directions(image, text):
    """Yield (anchors, candidates) of text-to-image and of image-to-text."""
    yield text, image
    yield image, text


def test_itc_against_a_double_loop():
    image, text, _ = batch()
    expected = 0.0
    for anchors, candidates in both_directions(image, text):
        for i, anchor in enumerate(anchors):
            p = softmax([50 * cosine(anchor, c) for c in candidates])
            expected -= math.log(p[i]) / len(anchors) / 2
    assert losses.itc(image, text, scale=50).item() == pytest.approx(expected, rel=1e-12)


def test_sdm_against_a_double_loop():
    image, text, identity = batch(1)
    expected = 0.0
    for anchors, candidates in both_directions(image, text):
        for i, anchor in enumerate(anchors):
            values = [20 * cosine(anchor, c) for c in candidates]
            expected += row_divergence(values, [int(y == identity[i]) for y in identity]) / len(anchors)
    assert losses.sdm(image, text, identity, scale=20).item() == pytest.approx(expected, rel=1e-12)


def test_cmpm_against_a_double_loop():
    image, text, identity = batch(2)
    expected = 0.0
    for anchors, candidates in both_directions(image, text):
        for i, anchor in enumerate(anchors):
            p = softmax([float(anchor @ c) / math.sqrt(float(c @ c)) for c in candidates])
            positive = [float(y == identity[i]) for y in identity]
            for j, same in enumerate(positive):
                target = same / math.sqrt(sum(positive))  # the released code's L2 norm, not the sum
                expected += p[j] * (math.log(p[j]) - math.log(target + 1e-8)) / len(anchors)
    assert losses.cmpm(image, text, identity).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("form", "alpha", "offset"), [("paper", 10.0, 1.0), ("paper", 1.0, 0.0), ("released", 0.1, 1.0)]
)
def test_asdm_against_a_double_loop(form, alpha, offset):
    image, text, identity = batch(3, rows=9)
    expected = 0.0
    for anchors, candidates in both_directions(image, text):
        for i, anchor in enumerate(anchors):
            raw = [cosine(anchor, c) for c in candidates]
            values = [50 * value for value in raw]
            positive = [int(y == identity[i]) for y in identity]
            if form == "paper":
                p = softmax(values)
                weight = offset + alpha * (max(p) - p[i])
            else:
                best, first = raw.index(max(raw)), positive.index(1)
                weight = 1 if best == first else 1 + alpha * (raw[best] - raw[first])
            expected += weight * row_divergence(values, positive) / len(anchors)
    ours = losses.asdm(image, text, identity, scale=50, alpha=alpha, form=form, offset=offset)
    assert ours.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", losses.ASDM_FORMS)
def test_asdm_gradient_flows_through_the_weights(form):
    image, text, identity = (t[:4] for t in batch(4))
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.asdm(x, text, identity, scale=5, alpha=2, form=form), (image,))
    with_weights = torch.autograd.grad(losses.asdm(image, text, identity, form=form), image)[0]
    weighted = sum(
        (losses.asdm_weights(rows, identity, form=form).detach() * losses._divergence(rows, identity, 50, 1e-8)).mean()
        for similarity in [losses.cosine_similarity(text, image)]
        for rows in (similarity, similarity.T)
    )
    as_constants = torch.autograd.grad(weighted, image)[0]
    assert not torch.allclose(with_weights, as_constants)
    without = losses.asdm(image, text, identity, form=form, gradient=False)
    torch.testing.assert_close(without, losses.asdm(image, text, identity, form=form))
    torch.testing.assert_close(torch.autograd.grad(without, image)[0], as_constants)


def test_asdm_without_strength_is_sdm():
    image, text, identity = batch(5)
    for form in losses.ASDM_FORMS:
        torch.testing.assert_close(
            losses.asdm(image, text, identity, alpha=0.0, form=form), losses.sdm(image, text, identity)
        )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from(losses.ASDM_FORMS))
def test_asdm_weights_are_at_least_one(seed, rows, form):
    image, text, identity = batch(seed, rows)
    weights = losses.asdm_weights(losses.cosine_similarity(text, image), identity, form=form)
    assert (weights >= 1).all()


def test_a_perfectly_ranked_row_with_several_positives_still_weighs_more_than_one_in_the_papers_form():
    identity = torch.arange(4).repeat_interleave(4)
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.rand(16, 16, generator=generator, dtype=torch.float64)
    similarity = torch.where(identity[:, None] == identity[None, :], 0.8, 0.1) + noise
    weights = losses.asdm_weights(similarity, identity, scale=50, alpha=10)
    own_is_best = similarity.argmax(dim=1) == torch.arange(16)
    assert (weights[~own_is_best] > 1).all()
    assert (~own_is_best).sum() > 8
    torch.testing.assert_close(weights[own_is_best], torch.ones_like(weights[own_is_best]))
    assert weights.mean() > 1.1
    # alone in the batch, the same ranking costs nothing
    alone = losses.asdm_weights(similarity[::4, ::4], identity[::4], scale=50, alpha=10)
    torch.testing.assert_close(alone, torch.ones_like(alone))


def test_released_weights_stay_within_their_bound():
    image, text, identity = batch(6, rows=30, identities=6)
    weights = losses.asdm_weights(losses.cosine_similarity(text, image), identity, alpha=0.1, form="released")
    assert 1.0 < weights.max() <= 1.2


def test_identity_and_masked_token_losses():
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    label = torch.tensor([0, 2, 1, 2])
    terms = [-math.log(softmax(rows[i].tolist())[label[i]]) for rows in (image, text) for i in range(4)]
    assert losses.identity_loss(image, text, label).item() == pytest.approx(sum(terms) / 8, rel=1e-12)
    assert losses.masked_token_loss(image, label).item() == pytest.approx(sum(terms[:4]), rel=1e-12)


def test_no_masked_position_gives_zero_with_a_gradient():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = losses.masked_token_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 5)


def test_half_precision_is_compared_in_float32():
    image, text, identity = batch(7, dtype=torch.bfloat16)
    for loss in (losses.sdm, losses.asdm):
        value = loss(image, text, identity)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(image.float(), text.float(), identity))


def test_unknown_form_is_an_error():
    image, text, identity = batch()
    with pytest.raises(ConfigError, match="asdm_form is 'newest', expected one of paper, released"):
        losses.asdm(image, text, identity, form="newest")


@pytest.mark.parametrize("case", range(4))
def test_released_numbers_in_float64(case):
    arrays = np.load(FIXTURE)
    image, text, identity = (torch.from_numpy(arrays[f"batchloss/{case}/{key}"]) for key in ("image", "text", "pid"))
    ours = {
        "sdm": losses.sdm(image, text, identity),
        "asdm": losses.asdm(image, text, identity, alpha=0.1, form="released"),
        "itc": losses.itc(image, text),
        "cmpm": losses.cmpm(image, text, identity),
    }
    for name, value in ours.items():
        assert value.item() == pytest.approx(float(arrays[f"batchloss/{case}/{name}"]), rel=1e-7), name


def test_pair_similarities_are_means_over_pairs():
    image, text, identity = batch(seed=5)
    kinds = {"cosine_matched": [], "cosine_unmatched": []}
    for i, j in itertools.product(range(len(text)), repeat=2):
        kinds["cosine_matched" if identity[i] == identity[j] else "cosine_unmatched"].append(cosine(text[i], image[j]))
    expected = {name: sum(values) / len(values) for name, values in kinds.items()}
    found = losses.pair_similarities(text, image, identity)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    assert losses.pair_similarities(text, image, torch.zeros(len(text)))["cosine_unmatched"] == 0
