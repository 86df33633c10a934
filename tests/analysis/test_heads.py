"""The heads of ID and IRR: the guesses are the head's own, and do not depend on anything but the chosen word."""

import pytest
import torch

from fmfa.analysis.heads import colour_words, guess_colours, guess_word, train_identity_head
from fmfa.models.clip import CrossModalHead
from fmfa.systems import load_system

CAPTIONS = ["A man in a red coat and blue jeans.", "He walks away.", "A woman with a black bag."]


@pytest.fixture(scope="module")
def system():
    system = load_system()
    torch.manual_seed(0)
    system.model.irr = CrossModalHead(96, system.model.clip.vocab_size).eval()
    return system


@pytest.fixture(scope="module")
def image():
    return torch.randn(3, 49, 96, generator=torch.Generator().manual_seed(0))


def test_guesses_are_those_of_the_head_on_the_masked_caption(system, image):
    table = guess_word(system, image, CAPTIONS, 0, "blue")
    assert table.index.name == "token"
    assert len(table) == system.tokenizer.vocab_size
    assert table["own picture"].is_monotonic_decreasing
    ids = system.tokenizer([CAPTIONS[0]])
    place = system.tokenizer.decode(ids[0].tolist()).index("blue")
    chosen = torch.arange(ids.shape[1])[None] == place
    with torch.no_grad():
        text = system.model.encode_text(torch.where(chosen, system.tokenizer.mask_id, ids), positions=ids.shape[1])
        for name, tokens in (
            ("own picture", image[0]),
            ("mean picture", image.mean(0)),
            ("another's picture", image[2]),
        ):
            expected = system.model.irr(text.tokens, tokens[None], torch.tensor([[place]]))[0, 0].softmax(0)
            assert table.loc["blue", name] == pytest.approx(expected[ids[0, place]].item(), rel=1e-4)
            assert table[name].sum() == pytest.approx(1, abs=1e-4)


def test_a_word_that_is_not_in_the_caption_is_refused(system, image):
    with pytest.raises(ValueError, match="green"):
        guess_word(system, image, CAPTIONS, 0, "green")


def test_first_colours_are_guessed_where_there_are_some(system, image):
    assert colour_words(system, CAPTIONS[0]) == ["red", "blue"]
    assert list(guess_colours(system, image, CAPTIONS).index) == ["red", "black"]


def test_a_classifier_tells_its_people_apart_and_leaves_the_global_generator_alone():
    image, text = torch.eye(4), torch.eye(4) + 0.1
    before = torch.get_rng_state()
    classifier = train_identity_head(image, text)
    assert torch.equal(before, torch.get_rng_state())
    assert classifier(image).argmax(1).tolist() == classifier(text).argmax(1).tolist() == [0, 1, 2, 3]
