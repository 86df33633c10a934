import pytest
import torch
from toy_training import TINY_CLIP, TOKENIZER

from fmfa.data.pairs import mask_tokens
from fmfa.losses.matching import asdm
from fmfa.models.clip import ClipRetriever
from fmfa.models.objectives import objectives
from fmfa.models.plain import plain_losses

ROUNDING = 2e-5  # of float32, relative to the largest value of each gradient

CAPTIONS = ["a person in red", "someone with a very large bag and long trousers", "", "a woman", "a man in a coat"]


def toy_batch(identities=3):
    draw = torch.Generator().manual_seed(4)
    ids = TOKENIZER(CAPTIONS)
    masked, labels = mask_tokens(ids, TOKENIZER, draw, 0.4)
    images = torch.randn(len(ids), 3, 32, 16, generator=draw)
    people = torch.arange(len(ids)) % identities
    return {"images": images, "caption_ids": ids, "masked_ids": masked, "masked_labels": labels, "labels": people}


@pytest.mark.parametrize("changes", [{}, {"asdm_gradient": False, "asdm_offset": 0.5, "sdm_epsilon": 0.01}])
@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("method", ["clip", "irra", "fmfa"])
def test_losses_and_gradients_are_those_of_the_released_arithmetic(method, preset, changes):
    model = ClipRetriever(TINY_CLIP, objectives(method, preset, irr_depth=2, **changes), identities=3, seed=1)
    batch, gradients = toy_batch(), []
    found = model(batch).losses, plain_losses(model, batch)
    assert found[0].keys() == found[1].keys()
    for name, loss in found[0].items():
        torch.testing.assert_close(loss, found[1][name], rtol=ROUNDING, atol=ROUNDING)
    for losses in found:
        model.zero_grad()
        sum(losses.values()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(g.abs().max()) for g in gradients[1].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=ROUNDING * largest, msg=name)


def test_the_forms_of_asdm_are_those_of_the_objectives():
    changes = {"asdm_offset": 0.5, "asdm_alpha": 3.0, "sdm_epsilon": 0.01, "tau": 0.1}
    model = ClipRetriever(TINY_CLIP, objectives("fmfa", id=0, irr=0, efa=0, **changes), seed=1)
    batch = toy_batch()
    image, text = model.encode_image(batch["images"]).embedding, model.encode_text(batch["caption_ids"]).embedding
    expected = asdm(image, text, batch["labels"], scale=10, alpha=3.0, offset=0.5, epsilon=0.01)
    torch.testing.assert_close(model(batch).losses["asdm"], expected, rtol=ROUNDING, atol=ROUNDING)
