"""What the heads of ID and of IRR ask of the features that they share with the other losses."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fmfa.data.images import resolve_image
from fmfa.losses.matching import identity_loss
from fmfa.models.clip import ClipRetriever, identity_classifier
from fmfa.models.outputs import Encoded
from fmfa.simpedes.words import COLOUR_WORDS
from fmfa.systems import System


def train_identity_head(images: Tensor, texts: Tensor) -> nn.Linear:
    """Train ID's classifier alone, with one class per row, for 200 steps of Adam at learning rate 0.05.

    Args:
        images: [B, D], embeddings of one picture of each person.
        texts: [B, D], embeddings of a caption of the same people.

    Returns:
        The classifier, D to B.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = identity_classifier(images.shape[1], len(images))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        identity_loss(classifier(images), classifier(texts), torch.arange(len(images))).backward()
        optimizer.step()
    return classifier


@torch.no_grad()
def encode_pairs(system: System, images: Path, names: Iterable[str], captions: Sequence[str]) -> tuple[Tensor, Encoded]:
    """Image tokens [P, 1+N, D] and encoded captions of pairs; the pictures lie at `names` below the folder `images`."""
    pictures = torch.stack([system.transform(resolve_image(images, name)) for name in names])
    return system.model.encode_image(pictures).tokens, system.model.encode_text(system.tokenizer(list(captions)))


@torch.no_grad()
def guess_word(system: System, image: Tensor, captions: Sequence[str], pair: int, word: str) -> pd.DataFrame:
    """Probabilities that IRR gives to every token in the place of one masked word of a caption.

    Args:
        system: a two-stream system trained with IRR.
        image: [P, 1+N, D], image tokens of the pairs.
        captions: of the P pairs.
        pair: whose caption is completed: with its own picture, the mean of all, and that of the pair before it.
        word: one of the caption's tokens; the first occurrence is masked.

    Returns:
        One row per token of the vocabulary (index `token`), one column per picture, the likeliest of the own picture
        first.

    Raises:
        ValueError: the word is not a token of the caption.
    """
    ids = system.tokenizer([captions[pair]])
    place = torch.tensor([[system.tokenizer.decode(ids[0].tolist()).index(word)]])
    masked = ids.scatter(1, place, system.tokenizer.mask_id)
    model = system.model
    assert isinstance(model, ClipRetriever)
    assert model.irr is not None
    text = model.encode_text(masked, positions=ids.shape[1]).tokens
    pictures = torch.stack([image[pair], image.mean(dim=0), image[pair - 1]])
    logits = model.irr(text.expand(3, -1, -1), pictures, place.expand(3, -1))[:, 0]
    index = pd.Index(system.tokenizer.decode(range(model.clip.vocab_size)), name="token")
    table = pd.DataFrame(
        logits.softmax(dim=1).T.double().numpy(), index, ["own picture", "mean picture", "another's picture"]
    )
    return table.sort_values("own picture", ascending=False)


def colour_words(system: System, caption: str) -> list[str]:
    """The colours in a caption that are single tokens, in order."""
    ids = system.tokenizer([caption])[0].tolist()
    return [token for token in system.tokenizer.decode(ids) if token in COLOUR_WORDS]


def guess_colours(system: System, image: Tensor, captions: Sequence[str]) -> pd.DataFrame:
    """Probability of the true word in the place of each caption's first colour; arguments as in `guess_word`.

    Returns:
        One row per caption that names a colour (index: the colour), columns as in `guess_word`.
    """
    first = {pair: words[0] for pair, caption in enumerate(captions) if (words := colour_words(system, caption))}
    return pd.DataFrame([guess_word(system, image, captions, *place).loc[place[1]] for place in first.items()])
