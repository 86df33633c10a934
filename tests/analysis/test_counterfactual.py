"""Counterfactuals: one thing changes and nothing else, and the measure agrees with systems that are known through."""

import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from torch.nn import functional as F

from fmfa.analysis.changes import (
    ALTERED,
    CAPTION,
    PICTURE,
    VISIBLE,
    WHOLE,
    changed_caption,
    changed_people,
    draw_counterfactuals,
    is_altered,
    picture_of,
)
from fmfa.analysis.counterfactual import COLUMNS, measure_counterfactual, score_counterfactuals
from fmfa.data.annotations import Dataset, read_dataset
from fmfa.data.images import fmfa_evaluation
from fmfa.errors import AnnotationError
from fmfa.models.outputs import Encoded
from fmfa.plots.alignment import counterfactual_strip, plot_counterfactual
from fmfa.simpedes.generate import generate, recipe
from fmfa.simpedes.people import ATTRIBUTES, COLOURS, SIDES, Person, population
from fmfa.simpedes.truth import Truth
from fmfa.simpedes.words import COLOUR_WORDS, HAIR_WORDS, TYPE_WORDS
from fmfa.systems import System, load_system

matplotlib.use("Agg")
SIZE = (96, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = generate(tmp_path_factory.mktemp("simpedes"), recipe("tiny"), workers=1, progress=False)
    return read_dataset(root, "SimPEDES")


@pytest.fixture(scope="module")
def found(data):
    return draw_counterfactuals(data, "test", 200, seed=3)


# --- what is changed


@pytest.mark.parametrize("domain", ["street", "station", "night"])
def test_an_unchanged_picture_is_the_stored_one_bit_by_bit(tmp_path, domain):
    counts = {"train": 0, "val": 0, "test": 8}
    sizes = {"height": 128, "width": 48} if domain == "station" else {}
    root = generate(tmp_path / domain, recipe("tiny", domain, 4, **counts, **sizes), workers=1, progress=False)
    size = (sizes.get("height", 96), sizes.get("width", 32))
    records = list(Truth(root).records("test"))
    assert len(records) == 32
    for record in records:
        stored = np.asarray(Image.open(root / "imgs" / record["file_path"]))
        shown = picture_of(Person(**record["attributes"]), record["camera"], record["seed"], size)
        np.testing.assert_array_equal(shown, stored)


def test_a_picture_of_another_renderer_is_refused(tmp_path):
    counts = {"train": 0, "val": 0, "test": 2}
    root = generate(tmp_path, recipe("tiny", **counts), workers=1, progress=False)
    for record in Truth(root).records("test"):
        path = root / "imgs" / record["file_path"]
        picture = np.array(Image.open(path))
        picture[0, 0, 0] ^= 1
        Image.fromarray(picture).save(path)
    with pytest.raises(AnnotationError, match="not what the renderer makes"):
        draw_counterfactuals(read_dataset(root, "SimPEDES"), "test", 5)


@pytest.mark.parametrize("season", ["warm", "cold"])
def test_changed_people_differ_in_one_attribute_and_what_comes_or_goes_with_it(season):
    rng = np.random.default_rng(0)
    seen = set()
    for _, _, person in population([5, 0], 40, 2, season):
        for name in ATTRIBUTES:
            for value, changed in changed_people(person, name, season, rng).items():
                assert getattr(changed, name) == value != getattr(person, name)
                for other in set(ATTRIBUTES) - {name}:
                    old, new = getattr(person, other), getattr(changed, other)
                    if old != new:
                        assert "none" in (old, new)
                        assert "none" in (value, getattr(person, name)) or other in (*SIDES, "pattern_colour")
                seen.add(name)
    assert seen == set(ATTRIBUTES)


def test_changed_pictures_no_longer_fit_the_words_and_visibly_so(data, found):
    pictures = [made for made in found if made.kind == PICTURE]
    pictures_known = data.truth.pictures("test")
    assert len(pictures) == 200
    for made in pictures:
        phrase = made.site.phrase
        picture = pictures_known.loc[phrase["image"]]
        assert made.site.attribute not in phrase["mistakes"]
        assert picture["attributes"][made.site.attribute] in phrase["told"][made.site.attribute]
        assert made.value not in phrase["told"][made.site.attribute]
        assert phrase["part"] == WHOLE or picture["visible"][phrase["part"]] >= VISIBLE
        stored = np.asarray(Image.open(data.images / phrase["image"])).astype(int)
        far = (np.abs(stored - made.changed).max(axis=2) >= ALTERED).sum()
        assert far >= VISIBLE * stored.shape[0] * stored.shape[1]


def test_a_changed_colour_leaves_far_pixels_alone(data, found):
    coloured = [m for m in found if m.kind == PICTURE and m.attribute in ("shoes_colour", "headwear_colour")]
    assert len(coloured) >= 8
    for made in coloured:
        stored = np.asarray(Image.open(data.images / made.site.phrase["image"]))
        rows = np.flatnonzero((stored != made.changed).any(axis=(1, 2)))
        assert rows.min() >= 60 if made.attribute == "shoes_colour" else rows.max() <= 40


def test_is_altered_counts_pixels_not_noise():
    picture = np.full((*SIZE, 3), 100, np.uint8)
    faint, small, enough = picture.copy(), picture.copy(), picture.copy()
    faint += ALTERED - 1
    small[0, :9, 1] -= ALTERED
    enough[0, :10, 1] -= ALTERED
    assert [is_altered(picture, other) for other in (picture, faint, small, enough)] == [False, False, False, True]


# --- changed captions


def test_changed_captions_tell_the_new_value_in_the_place_of_the_old(found):
    captions = [made for made in found if made.kind == CAPTION]
    assert len(captions) == 200
    for made in captions:
        old, new = made.site.phrase["caption"], made.changed
        assert old != new
        before, after = old.split(), new.split()
        if made.attribute in ("gender", "bag", "held"):
            continue  # pronouns, places and verbs follow: see the examples below
        kept = sum(word in after for word in before)
        assert kept >= len(before) - 4
        said = " ".join(word for word in after if word not in before).lower()
        lexicon = {"hair_colour": HAIR_WORDS}.get(made.attribute)
        lexicon = lexicon or (COLOUR_WORDS if made.attribute.endswith("_colour") else TYPE_WORDS.get(made.attribute))
        if lexicon and said:
            meant = {v for word, means in lexicon.items() if re.search(rf"\b{word}\b", new.lower()) for v in means}
            assert made.value in meant


def told(text, words, part, **values):
    start = text.index(words)
    return {"text": words, "part": part, "told": values, "mistakes": {}, "start": start, "end": start + len(words)}


@pytest.mark.parametrize(
    ("text", "words", "part", "attribute", "allowed", "values", "expected"),
    [
        ("A man in a navy blue jacket.", "navy blue jacket", "outer", "outer_colour", ["navy"], ["blue"],
         "A man in a bright blue jacket."),
        ("A man in a red jacket.", "red jacket", "outer", "outer_colour", ["red"], ["orange"],
         "A man in an orange jacket."),
        ("A man in an orange jacket.", "orange jacket", "outer", "outer_colour", ["orange"], ["navy"],
         "A man in a navy jacket."),
        ("A man in a black and white striped t-shirt.", "black and white striped t-shirt", "top", "pattern_colour",
         ["white"], ["yellow"], "A man in a black and yellow striped t-shirt."),
        ("A man in a white striped t-shirt.", "white striped t-shirt", "top", "top", ["t-shirt"], ["shirt"],
         "A man in a white striped button-up shirt."),  # "shirt" may mean a t-shirt too
        ("She wears a blue skirt.", "blue skirt", "lower", "lower", ["skirt"], ["shorts"], "She wears blue shorts."),
        ("She wears blue shorts.", "blue shorts", "lower", "lower", ["shorts"], ["skirt"], "She wears a blue skirt."),
        ("A slim man in his coat. He walks.", "slim man", "person", "gender", ["man"], ["woman"],
         "A slim woman in her coat. She walks."),
        ("A slim man.", "slim man", "person", "build", ["slim"], ["heavy"], "A heavy-set man."),
        ("He has a bald head.", "bald head", "hair", "hair_style", ["bald"], ["short"], None),
        ("She has long, black hair.", "long, black hair", "hair", "hair_style", ["long"], ["bun", "short"],
         "She has short, black hair."),
        ("She has a black ponytail.", "black ponytail", "hair", "hair_style", ["ponytail"], ["long", "bun"],
         "She has a black bun."),
        ("He is pulling a red suitcase in his left hand.", "red suitcase", "held", "held", ["suitcase"], ["cup"],
         "He is holding a red cup in his left hand."),
        ("He is holding a red cup in his left hand.", "red cup", "held", "held_side", ["left"], ["right"],
         "He is holding a red cup in his right hand."),
        ("She carries a red purse in her left hand.", "red purse", "bag", "bag", ["handbag"], ["none", "backpack"],
         "She carries a red backpack."),
        ("He has glasses.", "glasses", "glasses", "glasses", ["glasses"], ["none"], None),
        ("Glasses on her.", "Glasses", "glasses", "glasses", ["glasses"], ["sunglasses"], "Sunglasses on her."),
    ],
)  # fmt: skip
def test_changed_captions_by_example(text, words, part, attribute, allowed, values, expected):
    changed = changed_caption(text, told(text, words, part, **{attribute: allowed}), attribute, values)
    assert changed is None if expected is None else changed[1] == expected


# --- the draw


def test_the_draw_is_a_function_of_the_seed_and_attributes_take_turns(data, found):
    again = draw_counterfactuals(data, "test", 200, seed=3)
    assert [(m.kind, m.attribute, m.value, m.site.phrase["caption"]) for m in again] == [
        (m.kind, m.attribute, m.value, m.site.phrase["caption"]) for m in found
    ]
    assert all(np.array_equal(a.changed, b.changed) for a, b in zip(found, again, strict=True))
    other = draw_counterfactuals(data, "test", 20, seed=4)
    assert [m.site.phrase["caption"] for m in other] != [m.site.phrase["caption"] for m in found[: len(other)]]
    counts = pd.Series(
        [m.attribute for m in draw_counterfactuals(data, "test", 46) if m.kind == PICTURE]
    ).value_counts()
    assert counts.sum() == 46
    assert counts.max() <= 2
    asked = [(m.kind, m.attribute, m.site.phrase["image"]) for m in found]
    assert len(set(asked)) == len(asked)


def test_only_simpedes_has_counterfactuals(data, tmp_path):
    with pytest.raises(AnnotationError, match="holds no ground truth"):
        draw_counterfactuals(Dataset("own", tmp_path / "imgs", data.table), "test", 5)


# --- the measure, with systems that are known through


class Known(nn.Module):
    """A model whose embeddings are functions written in a test; captions come as positions in a list."""

    def __init__(self, of_picture, of_caption):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.of_picture, self.of_caption, self.texts = of_picture, of_caption, []

    def encode_image(self, pictures):
        embedding = torch.stack([self.of_picture(picture) for picture in pictures])
        return Encoded(embedding[:, None], embedding)

    def encode_text(self, ids):
        embedding = torch.stack([self.of_caption(self.texts[i]) for i in ids.flatten().tolist()])
        return Encoded(embedding[:, None], embedding)

    def tokenize(self, texts):
        self.texts += texts
        return torch.arange(len(self.texts) - len(texts), len(self.texts))[:, None]


def system(of_picture, of_caption):
    model = Known(of_picture, of_caption)
    return System(model, model.tokenize, fmfa_evaluation(SIZE))


def test_a_constant_system_ties_everywhere(data):
    constant = system(lambda _: torch.ones(3), lambda _: torch.ones(3))
    table = measure_counterfactual(constant, data, "test", 60)
    assert list(table.columns) == list(COLUMNS)
    assert (table[["right", "right_low", "right_high"]].dropna() == 0.5).all(axis=None)
    assert (table["shift"] == 0).all()
    assert table["effect"].isna().all()


_NAMES = list(COLOURS)
_RGB = torch.tensor([COLOURS[name] for name in _NAMES]) / 255


def shoe_colour(picture):
    """Similarity to every named colour of the few pixels of the feet, which nothing else reaches."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)))
    feet = (picture * std + mean)[:, 86:94, 8:24].flatten(1).T
    return torch.exp(-20 * torch.cdist(feet, _RGB)).mean(dim=0)


def told_shoe_colour(text):
    found = re.search(r"([\w -]+?) (?:leather shoes|sports shoes|shoes|sneakers|trainers|high boots|boots)\b", text)
    words = re.split(r"\b(?:in|a|an|and|on|has|wears|wearing|also|with)\b", found[1])[-1].strip() if found else ""
    allowed = COLOUR_WORDS.get(words, set())
    return torch.tensor([float(name in allowed) for name in _NAMES]) if allowed else torch.ones(len(_NAMES))


def test_a_system_that_reads_the_shoes_moves_right_for_their_colour_alone(data):
    table = measure_counterfactual(system(shoe_colour, told_shoe_colour), data, "test", 300)
    right = table.set_index(["kind", "attribute"])["right"]
    assert right[PICTURE, "shoes_colour"] >= 0.75
    assert right[CAPTION, "shoes_colour"] >= 0.75
    blind = [a for a in ATTRIBUTES if a not in ("shoes_colour", "shoes", "lower", "lower_colour", "held", "held_side")]
    for kind in (PICTURE, CAPTION):
        for attribute in blind:
            if (kind, attribute) in right:
                assert 0.3 <= right[kind, attribute] <= 0.7, (kind, attribute)
    blind_captions = [right[CAPTION, a] for a in ATTRIBUTES if (CAPTION, a) in right and a != "shoes_colour"]
    assert blind_captions == [0.5] * len(blind_captions)


def test_the_numbers_by_brute_force(data):
    tiny = load_system()
    found = draw_counterfactuals(data, "test", 40, seed=1)
    scores = score_counterfactuals(tiny, data, found)
    table = measure_counterfactual(tiny, data, "test", 40, seed=1).set_index(["kind", "attribute"])

    @torch.no_grad()
    def picture(pixels, folder):
        Image.fromarray(np.asarray(pixels)).save(folder / "x.png")
        return F.normalize(tiny.model.eval().encode_image(tiny.transform(folder / "x.png")[None]).embedding[0], dim=0)

    @torch.no_grad()
    def caption(text):
        return F.normalize(tiny.model.eval().encode_text(tiny.tokenizer([text])).embedding[0], dim=0)

    folder = data.images.parent
    shifts, pictures, captions = [], {}, {}
    for made in found:
        phrase = made.site.phrase
        image, text = picture(Image.open(data.images / phrase["image"]), folder), caption(made.site.phrase["caption"])
        pictures[phrase["image"]], captions[made.site.phrase["caption"]] = (
            (image, phrase["identity"]),
            (text, phrase["identity"]),
        )
        if made.kind == PICTURE:
            shifts.append(float(image @ text - picture(made.changed, folder) @ text))
        else:
            shifts.append(float(image @ text - image @ caption(made.changed)))
    np.testing.assert_allclose(scores.before - scores.after, shifts, atol=2e-6)
    unpaired = [float(a @ b) for a, i in pictures.values() for b, j in captions.values() if i != j]
    assert scores.spread == pytest.approx(np.std(unpaired), abs=2e-6)
    for kind in (PICTURE, CAPTION):
        mine = [s for s, made in zip(shifts, found, strict=True) if made.kind == kind]
        row = table.loc[(kind, "all")]
        assert row["pairs"] == len(mine) == 40
        assert row["shift"] == pytest.approx(np.mean(mine), abs=2e-6)
        assert row["right"] == pytest.approx(np.mean([s > 0 for s in mine]))
        assert row["effect"] == pytest.approx(np.mean(mine) / np.std(unpaired), rel=1e-4)
        assert row["right_low"] <= row["right"] <= row["right_high"]


# --- figures


def test_figures_show_every_attribute_and_person(data):
    tiny = load_system()
    table = measure_counterfactual(tiny, data, "test", 60)
    figure = plot_counterfactual(table)
    (axis,) = figure.axes
    assert {t.get_text() for t in axis.get_yticklabels()} == {a.replace("_", " ") for a in table["attribute"]}
    strip = counterfactual_strip(tiny, data, "test", seed=2)
    shown = [axis for axis in strip.axes if axis.images]
    assert sum("original" in axis.get_title() for axis in shown) == 4
    assert 8 <= len(shown) <= 16
    bold = "".join(t.get_text() for axis in strip.axes for t in axis.texts if t.get_weight() == "bold")
    assert len(bold.split()) >= 8
    plt.close("all")
