import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmfa.errors import ConfigError
from fmfa.losses import efa


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def caption_mask(batch, length, seed=0):
    ends = torch.randint(1, length, (batch,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) <= ends[:, None]


def sparse_row(row, sigma, keep):
    low, high = min(row), max(row)
    if low == high:
        return [1 / len(row)] * len(row)
    scaled = [(value - low) / (high - low) for value in row]
    kept = [value if (value >= sigma if keep == ">=" else value > sigma) else 0.0 for value in scaled]
    return [value / sum(kept) for value in kept]


def full_pooling(x, joint, token_mask=None, joint_mask=None, sharpness=1.0):
    """The naive [B, B, N, L] version."""
    every = torch.einsum("ind,jld->ijnl", F.normalize(x, dim=-1), F.normalize(joint, dim=-1))
    if joint_mask is not None:
        every = every.masked_fill(~joint_mask[None, :, None, :], -math.inf)
    best = every.max(dim=-1).values * sharpness
    if token_mask is not None:
        best = best.masked_fill(~token_mask[:, None, :], -math.inf)
    return best.logsumexp(dim=-1) / sharpness


@pytest.mark.parametrize("keep", efa.KEEPS)
@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.9])
def test_sparsify_against_a_loop(sigma, keep):
    similarity = tokens(3, 4, 6)
    similarity[1, 2] = 5.0
    ours = efa.sparsify(similarity, sigma=sigma, keep=keep)
    for i in range(3):
        for j in range(4):
            expected = sparse_row(similarity[i, j].tolist(), sigma or 1 / 6, keep)
            assert ours[i, j].tolist() == pytest.approx(expected, abs=1e-14)


def test_the_threshold_itself_is_kept_by_the_paper_and_dropped_by_the_released_code():
    row = torch.tensor([[0.0, 0.25, 1.0, 0.5]], dtype=torch.float64)  # 1/N = 0.25
    assert efa.sparsify(row, keep=">=")[0, 1] > 0
    assert efa.sparsify(row, keep=">")[0, 1] == 0


@pytest.mark.parametrize("keep", efa.KEEPS)
@pytest.mark.parametrize("patches", [1, 5])
def test_equal_scores_get_uniform_weights_and_a_finite_gradient(patches, keep):
    similarity = torch.full((2, 3, patches), 7.0, requires_grad=True)
    weight = efa.sparsify(similarity, keep=keep)
    torch.testing.assert_close(weight, torch.full_like(weight, 1 / patches))
    weight.square().sum().backward()
    assert torch.isfinite(similarity.grad).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.99), st.sampled_from(efa.KEEPS), st.integers(1, 9))
def test_weights_are_a_distribution(seed, sigma, keep, patches):
    weight = efa.sparsify(tokens(4, patches, seed=seed), sigma=sigma, keep=keep)
    assert (weight >= 0).all()
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(4, dtype=torch.float64))


def test_joint_embeddings_use_the_pairs_own_patches():
    text, patches = tokens(2, 3, 4, seed=1), tokens(2, 5, 4, seed=2)
    joint = efa.group_patches(text, patches)
    for i in range(2):
        for t in range(3):
            weights = sparse_row([float(text[i, t] @ p) for p in patches[i]], 1 / 5, ">=")
            expected = sum(w * p for w, p in zip(weights, patches[i], strict=True))
            torch.testing.assert_close(joint[i, t], expected)


def test_given_weights_take_the_place_of_a_tokens_own_and_rows_of_zeros_do_not():
    text, patches = tokens(2, 3, 4, seed=1), tokens(2, 5, 4, seed=2)
    given = torch.zeros(2, 3, 5)
    given[0, 1], given[1, 2] = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    joint, own = efa.group_patches(text, patches, given=given), efa.group_patches(text, patches)
    torch.testing.assert_close(joint[0, 1], (patches[0, 1] + patches[0, 2]) / 2)
    torch.testing.assert_close(joint[1, 2], patches[1, 4])
    left = ~given.any(dim=2)
    assert torch.equal(joint[left], own[left])
    assert torch.equal(efa.group_patches(text, patches, given=torch.zeros(2, 3, 5)), own)


def test_full_pooling_against_loops():
    x, joint = tokens(2, 3, 4, seed=3), tokens(2, 5, 4, seed=4)
    ours = full_pooling(x, joint, sharpness=2.0)
    for i in range(2):
        for j in range(2):
            best = [max(float(F.cosine_similarity(a, b, dim=0)) for b in joint[j]) for a in x[i]]
            expected = math.log(sum(math.exp(2 * value) for value in best)) / 2
            assert ours[i, j].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunk", [0, 1, 3, 4, 7, 100])  # 3 and 4 leave an uneven last chunk of 7 rows
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_equals_full_forward_and_backward(chunk, masked):
    x, joint = tokens(7, 6, 8, seed=5).requires_grad_(), tokens(7, 5, 8, seed=6).requires_grad_()
    masks = (caption_mask(7, 6), caption_mask(7, 5, seed=1)) if masked else (None, None)
    weight = tokens(7, 7, seed=7)
    full = full_pooling(x, joint, *masks, sharpness=1.5)
    expected = torch.autograd.grad((full * weight).sum(), (x, joint))
    ours = efa.pooled_similarity(x, joint, token_mask=masks[0], joint_mask=masks[1], sharpness=1.5, chunk=chunk)
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), (x, joint)), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            efa.pooled_similarity(x, joint, token_mask=masks[0], joint_mask=masks[1], sharpness=1.5, chunk=chunk),
            full,
        )


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes, in the backward pass too."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_the_whole_tensor_is_never_made_nor_kept():
    batch, length, patches, width = 12, 9, 10, 4
    text, image = tokens(batch, length, width, seed=8).requires_grad_(), tokens(batch, patches, width, seed=9)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        joint = efa.group_patches(text, image)
        pooled = efa.pooled_similarity(image, joint, chunk=2)
        pooled.sum().backward()
    one_chunk = 2 * batch * patches * length
    assert one_chunk <= largest.elements < batch * batch * patches * length / 4
    # the place of each best cosine is kept, [B * N, B], and no cosine
    assert max(kept) == batch * patches * batch


def reference_cost(similarity, identity, margin, cost):
    size = len(similarity)
    if cost == "released":
        similarity = similarity / similarity.norm(dim=1, keepdim=True)
        result = 0.0
        for j in range(size):
            gaps = [[], []]
            for i in range(size):
                value = float(similarity[i, j])
                gaps[0].append(0.0 if i == j else value - float(similarity[i, i]) + margin)
                gaps[1].append(0.0 if i == j else value - float(similarity[j, j]) + margin)
            result += sum(math.log(sum(math.exp(gap) for gap in column)) for column in gaps) / size
        return result
    if cost == "literal":
        sums = [0.0, 0.0]
        for anchor in range(size):
            for k in range(size):
                if identity[k] != identity[anchor]:
                    sums[0] += math.exp(float(similarity[anchor, k] - similarity[anchor, anchor]) + margin)
                    sums[1] += math.exp(float(similarity[k, anchor] - similarity[anchor, anchor]) + margin)
        return sum(math.log(each) for each in sums if each) / size
    result = 0.0
    for anchor in range(size):
        others = [k for k in range(size) if identity[k] != identity[anchor]]
        if others:
            own = float(similarity[anchor, anchor])
            result += math.log(sum(math.exp(float(similarity[anchor, k]) - own + margin) for k in others)) / size
            result += math.log(sum(math.exp(float(similarity[k, anchor]) - own + margin) for k in others)) / size
    return result


@pytest.mark.parametrize("cost", efa.COSTS)
@pytest.mark.parametrize("identity", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2], [3, 3, 3, 3, 3]])
def test_ranking_cost_against_a_double_loop(identity, cost):
    similarity = tokens(5, 5, seed=10).requires_grad_()
    ours = efa.ranking_cost(similarity, torch.tensor(identity), margin=0.2, cost=cost)
    assert ours.item() == pytest.approx(reference_cost(similarity.detach(), identity, 0.2, cost), rel=1e-12)
    ours.backward()
    assert torch.isfinite(similarity.grad).all()


@pytest.mark.parametrize("cost", efa.COSTS)
def test_whole_loss_chunked_equals_full(cost):
    text, image = tokens(5, 6, 8, seed=11).requires_grad_(), tokens(5, 7, 8, seed=12).requires_grad_()
    identity, mask = torch.tensor([0, 1, 1, 2, 3]), caption_mask(5, 6, seed=2)
    margins = {"margin_text": 0.2, "margin_image": 0.8}
    joint = efa.group_patches(text, image)
    expected = efa.ranking_cost(full_pooling(text, joint, mask, mask), identity, margin=0.2, cost=cost)
    expected = expected + efa.ranking_cost(full_pooling(image, joint, None, mask), identity, margin=0.8, cost=cost)
    ours = sum(efa.efa(text, image, joint, identity, text_mask=mask, cost=cost, chunk=2, **margins))
    torch.testing.assert_close(ours, expected)
    for a, b in zip(
        *(torch.autograd.grad(loss, (text, image), retain_graph=True) for loss in (ours, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_padding_does_not_count_when_it_is_masked():
    text, image, mask = tokens(4, 6, 8, seed=13), tokens(4, 7, 8, seed=14), caption_mask(4, 6, seed=3)
    other = torch.where(mask[:, :, None], text, 3.0)
    results = []
    for variant in (text, other):
        joint = efa.group_patches(variant, image)
        results.append(torch.stack(efa.efa(variant, image, joint, torch.arange(4), text_mask=mask)))
    torch.testing.assert_close(*results)
    unmasked = torch.stack(efa.efa(other, image, efa.group_patches(other, image), torch.arange(4)))
    assert not torch.allclose(unmasked, results[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: efa.sparsify(s, sigma=1.0), "efa_sigma is 1.0"),
        (lambda s: efa.sparsify(s, keep="="), "efa_keep is '='"),
        (lambda s: efa.ranking_cost(s, torch.arange(3), margin=0.1, cost="other"), "efa_cost is 'other'"),
    ],
)
def test_unknown_forms_are_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call(torch.zeros(3, 3))
