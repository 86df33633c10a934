import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from fmfa.data.images import fmfa_evaluation
from fmfa.errors import AnnotationError, ConfigError, ImageError
from fmfa.evaluation.evaluate import (
    IMAGE_TO_TEXT,
    TEXT_TO_IMAGE,
    Evaluation,
    encode_captions,
    encode_images,
    encode_sentence,
    evaluate,
    gallery_of,
    pictures_below,
    top_matches,
)
from fmfa.metrics import rank_metrics
from fmfa.models.outputs import Encoded

TRANSFORM = fmfa_evaluation((6, 4))
COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "grey": (90, 90, 90)}


class WordTokenizer:
    """Positions of known words, 0 for padding."""

    context_length, pad_id = 5, 0
    words = (None, *COLOURS, "person")

    def __call__(self, captions):
        rows = [[self.words.index(word) for word in caption.split()] for caption in captions]
        return torch.tensor([(row + [0] * self.context_length)[: self.context_length] for row in rows])

    def length(self, caption):
        return len(caption.split())


class ColourModel(nn.Module):
    """Knows the mean colour of a picture and of the colour words of a caption; dropout only when training."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5).eval()
        colours = torch.tensor([(0, 0, 0), *COLOURS.values(), (0, 0, 0)]) / 255.0
        colours[1:-1] = TRANSFORM.finish((colours[1:-1] * 255).byte()[:, :, None, None])[:, :, 0, 0]
        self.colours = nn.Parameter(colours)
        self.batches = []

    def encode_image(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert images.dtype == torch.float32
        self.batches.append(len(images))
        return Encoded(images.flatten(2).mT, self.dropout(images.mean((2, 3))))

    def encode_text(self, ids, attention_mask=None):
        assert not self.training
        assert not torch.is_autocast_enabled("cpu")
        self.batches.append(len(ids))
        return Encoded(self.colours[ids], self.colours[ids].sum(1).half())


@pytest.fixture
def split(tmp_path):
    """Three pictures of each colour, two captions each; the colour is the identity."""
    rows = []
    for identity, (name, colour) in enumerate(COLOURS.items()):
        for shot in range(3):
            image = f"{name}/{shot}.png"
            (tmp_path / name).mkdir(exist_ok=True)
            shade = tuple(min(255, level + 3 * shot) for level in colour)
            Image.new("RGB", (8, 12), shade).save(tmp_path / image)
            captions = (f"{name} person", f"person {name} {name}")
            rows += [{"image": image, "identity": 10 * identity, "caption": caption} for caption in captions]
    # A row index that is no range, as after a selection.
    return pd.DataFrame(rows, index=range(100, 100 + len(rows)))


@pytest.fixture
def result(split, tmp_path):
    return evaluate(ColourModel(), split, tmp_path, WordTokenizer(), TRANSFORM, batch_size=5)


def test_images_are_encoded_once_and_every_caption_is_a_query(result, split):
    assert result.image_features.shape == (12, 3)
    assert result.text_features.shape == (24, 3)
    assert result.text_features.dtype == torch.float32
    assert list(result.gallery["image"]) == list(dict.fromkeys(split["image"]))
    assert result.metrics[TEXT_TO_IMAGE].gallery_size == 12
    assert result.metrics[IMAGE_TO_TEXT].gallery_size == 24


def test_a_model_that_knows_the_answer_is_perfect_and_a_shuffled_one_is_not(result, split, tmp_path):
    table = result.table().set_index(["direction", "metric"])
    assert (table.loc[:, "value"].drop("R@10", level="metric") == 100).all()
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert table.loc[(TEXT_TO_IMAGE, "R@1"), "chance"] == pytest.approx(25)
    assert table.loc[(IMAGE_TO_TEXT, "R@1"), ["queries", "gallery"]].tolist() == [12, 24]
    wrong = split.assign(caption=np.roll(split["caption"], 6))
    shuffled = evaluate(ColourModel(), wrong, tmp_path, WordTokenizer(), TRANSFORM)
    assert shuffled.metrics[TEXT_TO_IMAGE].summary["R@1"] == 0


def test_metrics_are_those_of_the_features_in_both_directions(split, tmp_path):
    split["identity"] = np.repeat([1, 1, 2, 2, 3, 3, 4, 4, 4, 1, 2, 3], 2)  # identities that colours do not tell
    found = evaluate(ColourModel(), split, tmp_path, WordTokenizer(), TRANSFORM, batch_size=5)
    text, image = (nn.functional.normalize(f.double()) for f in (found.text_features, found.image_features))
    identities = split["identity"].to_numpy(), split["identity"].to_numpy()[::2]
    similarity = (text @ image.T).float()
    for direction, scores, (query, gallery) in (
        (TEXT_TO_IMAGE, similarity, identities),
        (IMAGE_TO_TEXT, similarity.T, identities[::-1]),
    ):
        expected = rank_metrics(scores, query, gallery)
        assert found.metrics[direction].summary == expected.summary
        assert 0 < expected.summary["R@1"] < 1
        queries = found.per_query(direction)
        np.testing.assert_array_equal(queries["first_rank"], expected.first_rank)
        np.testing.assert_array_equal(queries["mAP"], expected.average_precision)
    assert found.per_query()["caption"].tolist() == split["caption"].tolist()


def test_intervals_are_reproducible(split, tmp_path, result):
    again = evaluate(ColourModel(), split, tmp_path, WordTokenizer(), TRANSFORM, batch_size=3)
    pd.testing.assert_frame_equal(again.table(), result.table())


def test_model_keeps_its_mode_device_and_gradients(split, tmp_path):
    model = ColourModel()
    model.train()
    model.dropout.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluate(model, split, tmp_path, WordTokenizer(), TRANSFORM, batch_size=7)
    assert model.training
    assert not model.dropout.training
    assert model.batches == [7, 7, 7, 3, 7, 5]
    assert torch.is_grad_enabled()


def test_top_matches_are_sorted_and_marked(result):
    found = result.top_matches(6, k=5)  # a green caption
    assert found["similarity"].is_monotonic_decreasing
    assert found["hit"].tolist() == [True] * 3 + [False] * 2
    assert set(found["image"][:3]) == {f"green/{shot}.png" for shot in range(3)}
    assert len(result.top_matches(0, k=99)) == 12
    assert top_matches(torch.tensor([0.1, 0.7, 0.7, 0.9]), 3).tolist() == [3, 1, 2]


@pytest.mark.parametrize("equal", [2, 3, 12])
def test_ties_count_against_the_model_in_ranks_and_lists_alike(split, equal):
    """Of equal pictures those of other people come first: the first tick of a list is at the caption's rank."""
    gallery, draw = gallery_of(split), np.random.default_rng(equal)
    features = torch.from_numpy(draw.normal(size=(12 // equal, 3))).float().repeat(equal, 1)
    features = features[torch.from_numpy(draw.permutation(len(features)))]
    text = features[torch.from_numpy(draw.integers(0, 12, len(split)))] + 0.1
    found = Evaluation(split, gallery, text, features)
    ranks = found.metrics[TEXT_TO_IMAGE].first_rank
    for query in range(len(split)):
        matches = found.top_matches(query, 12)
        assert matches["similarity"].is_monotonic_decreasing
        assert matches["hit"].to_numpy().argmax() + 1 == ranks[query]
        same = found.top_matches(query, 3)
        pd.testing.assert_frame_equal(same, matches[:3])


def test_a_folder_has_the_pictures_that_are_not_hidden(split, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    for hidden in ("blue/._0.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", ".cache/b.png", ".c.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("no picture")
    Image.new("RGB", (4, 4), COLOURS["blue"]).save(tmp_path / "TOP.JPG")
    paths, faults = pictures_below(tmp_path)
    names = {str(Path(path).relative_to(tmp_path)) for path in paths}
    assert names == {"TOP.JPG", *(f"{colour}/{number}.png" for colour in COLOURS for number in range(3))}
    assert faults == {}


@pytest.mark.parametrize("name", ["a.jpe", "a.JFIF", "a.avif", "a.jp2", "汉 é.TIF", "a.b.ppm", "dir.jpg/a.png"])
def test_pictures_that_pillow_reads_are_found_and_encoded(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 12), COLOURS["red"]).save(tmp_path / name)
    paths, _ = pictures_below(tmp_path)
    assert paths == [str(tmp_path / name)]
    assert len(encode_images(ColourModel(), paths, TRANSFORM)) == 1


def test_what_cannot_be_read_is_named_and_left_out(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "searched"
    for place in (outside, folder / "sub"):
        place.mkdir(parents=True)
    picture = Image.new("RGB", (8, 12), COLOURS["red"])
    for place in (outside / "far.png", folder / "sub" / "near.png"):
        picture.save(place)
    (folder / "cut.jpg").write_bytes((outside / "far.png").read_bytes()[:45])
    (folder / "phone.heic").write_bytes(b"\0\0\0\x20ftypheic")
    (folder / "layers.psd").write_text("not a picture")
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    links = {"gone.png": "nowhere", "loop.png": "loop.png", "loop": "loop", "self": ".", "up": "..", "sub/top": ".."}
    links |= {"way": outside, "one.png": outside / "far.png"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    paths, faults = pictures_below(folder)
    encoded = encode_images(ColourModel(), paths, TRANSFORM, faults=faults, batch_size=2)
    read = [str(Path(path).relative_to(folder)) for path in paths if path not in faults]
    assert read == ["one.png", "sub/near.png", "way/far.png"]
    assert len(encoded) == 3
    left_out = sorted(Path(path).name for path in faults)
    assert left_out == ["cut.jpg", "empty.png", "gone.png", "layers.psd", "loop.png", "phone.heic", "pipe.png"]
    assert "pip install pillow-heif" in faults[str(folder / "phone.heic")]


def test_a_sentence_that_is_cut_gets_a_warning():
    with pytest.warns(UserWarning, match="the sentence needs 6 positions and the model reads 5: its end is not"):
        encode_sentence(ColourModel(), "person person red person person blue", WordTokenizer())


def test_bad_input_is_named(split, tmp_path):
    tools = ColourModel(), WordTokenizer(), TRANSFORM
    with pytest.raises(ConfigError, match="sentence to search for is empty"):
        encode_sentence(tools[0], " ", tools[1])
    (tmp_path / "red" / "0.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"red/0\.png"):
        evaluate(tools[0], split, tmp_path, *tools[1:])
    with pytest.raises(AnnotationError, match="no captions"):
        gallery_of(split[:0])
    with pytest.raises(AnnotationError, match=r"'red/0\.png' belongs to the identities \[0, 7\]"):
        gallery_of(split.assign(identity=[7, *split["identity"][1:]]))


def test_nothing_to_encode_gives_nothing():
    assert encode_images(ColourModel(), [], TRANSFORM).shape[0] == 0
    assert encode_captions(ColourModel(), [], WordTokenizer()).shape[0] == 0
