"""True part maps and phrase parts in training batches: the same geometry as the picture, the same words."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fmfa.data.annotations import read_dataset
from fmfa.data.images import CLIP_MEAN, CLIP_STD, fmfa_evaluation, fmfa_training, ivt_training
from fmfa.data.pairs import PairDataset
from fmfa.data.part_maps import PartMaps
from fmfa.errors import AnnotationError, ConfigError
from fmfa.simpedes.canvas import PARTS
from fmfa.simpedes.generate import generate, recipe
from fmfa.simpedes.truth import Truth
from fmfa.text.bytepair import small_tokenizer
from fmfa.text.levels import swap_sides, swapped_span
from fmfa.training.batches import TableBatches
from fmfa.training.config import TrainConfig

SIZE, GREY = (96, 32), 15  # grey levels between parts in pictures that show their own part map
TOKENIZER = small_tokenizer()


@pytest.fixture(scope="module")
def simpedes(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts") / "simpedes"
    small = replace(recipe("tiny"), train=8, val=2, test=2)
    return read_dataset(generate(root, small, workers=1, progress=False), "SimPEDES")


@pytest.fixture(scope="module")
def truth(simpedes):
    return {
        (record["file_path"], caption["text"]): caption["phrases"]
        for record in Truth(simpedes.images.parent).records("train")
        for caption in record["captions"]
    }


@pytest.fixture(scope="module")
def telling(simpedes, tmp_path_factory):
    """The pictures replaced by their part maps, so that a picture says what its map has to be."""
    folder = tmp_path_factory.mktemp("telling")
    for name, parts in Truth(simpedes.images.parent).parts("train").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        grey = (parts + 1) * np.uint8(GREY)
        Image.fromarray(np.stack([grey] * 3, axis=-1)).save(folder / name)
    return folder


def pairs(simpedes, *, images=None, parts=True, transform=None, **options):
    table = simpedes.split("train")
    known = PartMaps(table, simpedes.truth, TOKENIZER) if parts else None
    options = {"seed": 4, "flip": "swap"} | options
    return PairDataset(
        table, images or simpedes.images, TOKENIZER, transform or fmfa_training(SIZE), parts=known, **options
    )


@pytest.mark.parametrize("make", [fmfa_training, ivt_training, fmfa_evaluation])
def test_pictures_and_captions_are_those_without_part_maps(simpedes, make):
    plain, known = (pairs(simpedes, parts=parts, transform=make(SIZE)) for parts in (False, True))
    rows = range(0, len(plain), 5)
    expected, found = (data.collate([data[row] for row in rows]) for data in (plain, known))
    assert found.keys() - expected.keys() == {"part_maps", "token_parts"}
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert type(found["images"]) is type(found["part_maps"]) is torch.Tensor
    shapes = {name: (found[name].dtype, tuple(found[name].shape[1:])) for name in ("part_maps", "token_parts")}
    assert shapes == {"part_maps": (torch.int8, SIZE), "token_parts": (torch.int64, (TOKENIZER.context_length,))}


def test_maps_move_with_the_picture(simpedes, telling):
    data = pairs(simpedes, images=telling)
    rows = range(0, len(data), 2)
    batch = data.collate([data[row] for row in rows])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    level = ((batch["images"] * std + mean) * 255)[:, 0]  # GREY * (1 + part); 0 in the padding
    erased = (batch["images"] == mean).all(dim=1)
    shown = (level / GREY).round().int() - 1
    assert torch.equal(batch["part_maps"].int(), torch.where(erased, -1, shown))
    assert 0.2 < erased.flatten(1).any(dim=1).float().mean() < 0.8
    padded = (shown == -1) & ~erased
    assert padded.any()
    assert (batch["part_maps"][erased | padded] == -1).all()


def test_half_of_the_maps_are_mirrored_with_their_pictures(simpedes, telling):
    data = pairs(simpedes, images=telling, transform=fmfa_evaluation(SIZE))
    maps, table = Truth(simpedes.images.parent).parts("train"), simpedes.split("train")
    mirrored = []
    for row in range(len(data)):
        sample, plain = data[row], torch.from_numpy(maps[table["image"][row]])
        found = sample["part_maps"][0]
        mirrored.append(not torch.equal(found, plain))
        assert torch.equal(found, plain.flip(1) if mirrored[-1] else plain)
        caption = swap_sides(table["caption"][row]) if mirrored[-1] else table["caption"][row]
        assert torch.equal(sample["caption_ids"][0], TOKENIZER([caption])[0])
    assert 0.25 < np.mean(mirrored) < 0.75


def letters_parts(caption, phrases, swapped):
    """The text after the exchange, and the part of each of its characters, word by word."""
    parts = [-1] * len(caption)
    for phrase in phrases:
        if phrase["part"] in PARTS:
            parts[phrase["start"] : phrase["end"]] = [PARTS.index(phrase["part"])] * (phrase["end"] - phrase["start"])
    text, found = "", []
    for word in re.finditer(r"\w+|\W+", caption):
        new = {"left": "right", "right": "left"}.get(word[0], word[0]) if swapped else word[0]
        text += new
        same = new == word[0]
        found += parts[word.start() : word.end()] if same else [parts[word.start()]] * len(new)
    return text, found


@pytest.mark.parametrize("swapped", [False, True])
def test_token_parts_against_letters(simpedes, truth, swapped):
    table = simpedes.split("train")
    known, shifted, seen = PartMaps(table, simpedes.truth, TOKENIZER), 0, set()
    for row, (image, caption) in enumerate(zip(table["image"], table["caption"])):
        text, letters = letters_parts(caption, truth[image, caption], swapped)
        assert text == (swap_sides(caption) if swapped else caption)
        shifted += text != caption
        expected = [
            -1 if span is None else next((p for p in letters[slice(*span)] if p >= 0), -1)
            for span in TOKENIZER.offsets(text)
        ]
        found = known.tokens(row, TOKENIZER.context_length, swapped=swapped)
        assert found.tolist() == expected + [-1] * (len(found) - len(expected))
        seen |= set(found.tolist())
    assert (shifted > 5) == swapped
    assert {-1, *map(PARTS.index, ("hair", "top", "lower", "shoes", "bag"))} <= seen


def test_a_span_moves_with_its_words():
    caption = "A bag on the left, a cup in her right hand and Left shoes; leftover."
    for word in ("bag", "left", "cup", "right hand", "shoes", "leftover"):
        start = caption.index(word + "." if word == "leftover" else word)
        begin, end = swapped_span(caption, (start, start + len(word)))
        assert swap_sides(caption)[begin:end] == swap_sides(word)


def test_maps_of_another_size_are_resized_without_new_parts(simpedes):
    known = PartMaps(simpedes.split("train"), simpedes.truth, TOKENIZER)
    whole, half = known.picture(0, SIZE)[0], known.picture(0, (48, 16))[0]
    assert tuple(half.shape) == (48, 16)
    assert set(half.unique().tolist()) <= set(whole.unique().tolist())
    blocks = whole.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2)
    assert (blocks == half[:, :, None]).any(dim=2).all()


def test_batches_of_a_run_hold_the_truth_on_demand(simpedes):
    config = TrainConfig(method="irra", batch_size=4).resolved()
    plain, known = (
        next(iter(TableBatches(config, simpedes, TOKENIZER, masked=True, parts=parts).read(1, 0)))
        for parts in (False, True)
    )
    assert all(torch.equal(known[name], values) for name, values in plain.items())
    assert known["part_maps"].shape == (4, *SIZE)
    assert (known["token_parts"] >= 0).any(dim=1).all()


def test_what_has_no_truth_is_refused(simpedes):
    table = simpedes.split("train")
    with pytest.raises(AnnotationError, match="toy holds no ground truth, only SimPEDES has it"):
        replace(simpedes, name="toy", truth=None).require_truth()
    with pytest.raises(AnnotationError, match="truth of train lacks the caption 'unheard of'"):
        PartMaps(table.assign(caption="unheard of"), simpedes.truth, TOKENIZER)
    with pytest.raises(ConfigError, match="train this oracle without text levels"):
        pairs(simpedes, levels=lambda caption, row, generator: [caption] * 3)
    config = TrainConfig(method="irra", batch_size=4, pairs="shuffled").resolved()
    with pytest.raises(AnnotationError, match="every caption with its own picture"):
        TableBatches(config, simpedes, TOKENIZER, masked=True, parts=True)
