"""SimPEDES: families, exact counterfactuals, captions that tell only what shows, determinism, resumption."""

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, count, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fmfa.data.annotations import read_dataset
from fmfa.errors import AnnotationError, ConfigError
from fmfa.pretraining.stream import web_pair
from fmfa.simpedes.camera import CAMERAS, SPREAD, render
from fmfa.simpedes.canvas import PARTS
from fmfa.simpedes.captions import STYLES, describe
from fmfa.simpedes.generate import generate, recipe
from fmfa.simpedes.people import ATTRIBUTES, SIDES, change, draw_person, options, population
from fmfa.simpedes.truth import Truth, is_simpedes, told_truly
from fmfa.simpedes.words import TYPE_WORDS

CAMERA = CAMERAS["street"][0]
generation = importlib.import_module("fmfa.simpedes.generate")  # the package has a function of this name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("simpedes"), recipe("tiny"), workers=1, progress=False)


def _people(count=120, season="warm"):
    return [person for _, _, person in population([3, 0], count, 3, season)]


# --- people


def test_families_differ_and_never_by_side_alone():
    people = list(population([7, 0], 300, 3, "cold"))
    for start in range(0, 300, 3):
        members = people[start : start + 3]
        assert len({family for _, family, _ in members}) == 1
        for (_, _, a), (_, _, b) in combinations(members, 2):
            differing = {name for name in ATTRIBUTES if getattr(a, name) != getattr(b, name)}
            assert differing - set(SIDES)


def test_family_members_are_one_or_two_things_away_from_the_first():
    # A thing is one attribute with what hangs on it, such as a bag with its colour.
    things = {name: name.removesuffix("_colour").removesuffix("_side") for name in ATTRIBUTES}
    things |= {
        "pattern_colour": "top",
        "top_pattern": "top",
        "top_colour": "top",
        "hair_colour": "hair_colour",
    }
    things |= {"held_side": "held", "scarf_colour": "scarf"}
    people = _people(600)
    for start in range(0, 600, 3):
        base = people[start]
        for member in people[start + 1 : start + 3]:
            differing = {things[n] for n in ATTRIBUTES if getattr(base, n) != getattr(member, n) and n != "held_side"}
            assert 1 <= len(differing) <= 2


@pytest.mark.parametrize("season", ["warm", "cold"])
def test_every_person_is_possible(season):
    for person in _people(300, season):
        values = person.to_dict()
        for name in ATTRIBUTES:
            assert values[name] in options(name, values, season), (name, values)


def test_a_slice_of_the_population_equals_the_same_slice_of_the_whole():
    whole = list(population([1, 2], 40, 4, "warm"))
    assert list(population([1, 2], 12, 4, "warm", first=16)) == whole[16:28]


# --- rendering


def _near(mask: np.ndarray, distance: int) -> np.ndarray:
    near = mask.copy()
    for dy in range(-distance, distance + 1):
        for dx in range(-distance, distance + 1):
            shifted = np.zeros_like(mask)
            ys, xs = (
                slice(max(dy, 0), mask.shape[0] + min(dy, 0)),
                slice(max(dx, 0), mask.shape[1] + min(dx, 0)),
            )
            yo, xo = (
                slice(max(-dy, 0), mask.shape[0] + min(-dy, 0)),
                slice(max(-dx, 0), mask.shape[1] + min(-dx, 0)),
            )
            shifted[ys, xs] = mask[yo, xo]
            near |= shifted
    return near


COLOURED = {"top_colour": "top", "outer_colour": "outer", "lower_colour": "lower", "shoes_colour": "shoes",
            "bag_colour": "bag", "headwear_colour": "headwear", "held_colour": "held", "hair_colour": "hair",
            "scarf_colour": "scarf"}  # fmt: skip


def _touched(rendering, part):
    """Pixels of which any sample shows a part, bool [H, W]."""
    height, width = rendering.parts.shape
    shown = rendering.samples == PARTS.index(part)
    return shown.reshape(height, len(shown) // height, width, -1).any(axis=(1, 3))


@pytest.mark.parametrize("attribute", COLOURED)
def test_changing_a_colour_changes_its_part_and_nothing_else(attribute):
    seen = 0
    rng = np.random.default_rng(5)
    new = {"hair_colour": ("grey", "brown")}.get(attribute, ("blue", "red"))
    for k, person in enumerate(_people(150, "cold")):
        if getattr(person, attribute) == "none" or person.top == "dress" or person.hair_style == "bald":
            continue
        for camera in CAMERAS["street"][:2] + CAMERAS["station"][2:3]:
            before = render(person, camera, [11, k])
            other = new[getattr(person, attribute) == new[0]]
            after = render(change(person, attribute, rng, "cold", other), camera, [11, k])
            np.testing.assert_array_equal(before.parts, after.parts)
            changed = (before.image != after.image).any(axis=2)
            assert not (changed & ~_near(_touched(before, COLOURED[attribute]), SPREAD)).any()
            if before.visible[COLOURED[attribute]] > 0.01:
                assert changed.any()
                seen += 1
        if seen >= 6:
            break
    assert seen >= 6


def test_adding_a_bag_leaves_the_rest_alone():
    person = replace(_people(1)[0], bag="none", bag_colour="none", bag_side="none")
    bag = PARTS.index("bag")
    for seed in range(8):
        before = render(person, CAMERA, [2, seed])
        after = render(replace(person, bag="backpack", bag_colour="red"), CAMERA, [2, seed])
        np.testing.assert_array_equal(before.parts[after.parts != bag], after.parts[after.parts != bag])
        changed = (before.image != after.image).any(axis=2)
        assert not (changed & ~_near(_touched(after, "bag"), SPREAD)).any()


def test_a_viewpoint_hides_what_it_must():
    person = replace(_people(1)[0], glasses="sunglasses", bag="backpack", bag_colour="red", bag_side="none",
                     headwear="none", headwear_colour="none", hair_style="short")  # fmt: skip
    front = replace(CAMERA, yaws=((0, 1),), occlusion=0.0)
    back = replace(front, yaws=((180, 1),))
    for seed in range(10):
        assert render(person, back, seed).visible["glasses"] < 0.0007  # two pixels of an ear piece at most
        assert render(person, front, seed).visible["glasses"] > 0.002
        assert render(person, back, seed).visible["bag"] > 3 * render(person, front, seed).visible["bag"]


def test_the_same_scene_at_another_size():
    person = _people(3)[2]
    small, large = render(person, CAMERA, 4), render(person, CAMERA, 4, (384, 128))
    assert large.image.shape == (384, 128, 3)
    assert large.visible == small.visible
    agreement = (large.parts[2::4, 2::4] == small.parts).mean()
    assert agreement > 0.95
    shrunk = np.asarray(Image.fromarray(large.image).reduce(4), dtype=float)
    assert np.abs(shrunk - small.image).mean() < 12


# --- captions


def test_spans_point_at_their_phrases_and_captions_stay_in_range():
    lengths = []
    for domain in CAMERAS:
        for k, person in enumerate(_people(60, "cold")):
            picture = render(person, CAMERAS[domain][k % 3], [1, k])
            caption = describe(person, picture, STYLES[domain], [2, k])
            if STYLES[domain].notes:
                assert caption.text.split(",")[0].split(".")[0].split()[-1].lower() in TYPE_WORDS["gender"]
            else:
                lengths.append(len(caption.text.split()))
            for phrase in caption.phrases:
                assert caption.text[phrase.start : phrase.end] == phrase.text
            spans = [(p.start, p.end) for p in caption.phrases]
            assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert min(lengths) >= 12
    assert np.mean(lengths) > 22
    assert np.mean(np.array(lengths) > 47) < 0.1


@pytest.mark.parametrize("domain", ["street", "night"])
def test_what_is_told_is_true_unless_it_is_marked_as_a_mistake(domain):
    phrases = wrong = 0
    style = replace(STYLES[domain], mistake=0.2)
    for k, person in enumerate(_people(200)):
        picture = render(person, CAMERAS["street"][k % 5], [1, k])
        for phrase in describe(person, picture, style, [3, k]).phrases:
            phrases += 1
            wrong += bool(phrase.mistakes)
            for name, values in phrase.told.items():
                truth = getattr(person, name)
                assert (truth in values) != (name in phrase.mistakes), (phrase, truth)
                assert phrase.mistakes.get(name, truth) == truth
    assert 0.05 < wrong / phrases < 0.2


def test_only_what_shows_is_described():
    floor = {"glasses": 5, "bag": 20, "shoes": 10, "held": 8}  # pixels of 96 x 32
    described = 0
    for k, person in enumerate(_people(200)):
        picture = render(person, CAMERAS["street"][k % 5], [6, k])
        for phrase in describe(person, picture, STYLES["station"], [3, k]).phrases:
            if phrase.part in floor:
                described += 1
                assert picture.visible[phrase.part] * 96 * 32 >= floor[phrase.part]
    assert described > 100


# --- data sets on disk


def test_the_cuhk_layout_is_read_like_the_real_one(tiny):
    dataset = read_dataset(tiny)
    assert set(dataset.table["split"]) == {"train", "val", "test"}
    assert len(dataset.table) == (24 + 12 + 24) * 4 * 2
    assert dataset.split("train")["label"].nunique() == 24
    records = json.loads((tiny / "reid_raw.json").read_text())
    assert set(records[0]) == {"split", "captions", "file_path", "processed_tokens", "id"}
    ids = {split: {r["id"] for r in records if r["split"] == split} for split in ("train", "val", "test")}
    assert not ids["train"] & ids["test"]
    assert not ids["val"] & ids["test"]


def test_truth_lies_beside_every_picture(tiny):
    truth = list(Truth(tiny).records("val"))
    parts = Truth(tiny).parts("val")
    assert [t["file_path"] for t in truth] == list(parts)
    for record in truth[:10]:
        person_pixels = sum(v for k, v in record["visible"].items() if k not in ("background", "occluder"))
        assert abs((parts[record["file_path"]] > 1).mean() - person_pixels) < 0.02
        image = np.asarray(Image.open(tiny / "imgs" / record["file_path"]))
        assert image.shape == (96, 32, 3)


def test_families_never_straddle_splits(tiny):
    families = [{t["family"] for t in Truth(tiny).records(split)} for split in ("train", "val", "test")]
    assert not families[0] & families[2]


def test_the_ceiling_by_brute_force(tiny):
    stored = json.loads((tiny / "dataset.json").read_text())["ceiling"]["test"]
    truth = list(Truth(tiny).records("test"))
    people = {t["id"]: t["attributes"] for t in truth}
    scores = []
    for record in truth:
        for caption in record["captions"]:
            told = told_truly(caption["phrases"])
            fits = [i for i, a in people.items() if all(a[name] in values for name, values in told.items())]
            assert record["id"] in fits
            scores.append(1 / len(fits))
    assert stored["R@1"] == pytest.approx(np.mean(scores))
    assert stored["R@1"] < stored["R@5"] <= 1


def _digest(folder, pattern="**/*"):
    hasher = hashlib.sha256()
    for path in sorted(p for p in folder.glob(pattern) if p.is_file() and p.name != "dataset.json"):
        hasher.update(str(path.relative_to(folder)).encode())
        hasher.update(path.read_bytes() if path.suffix != ".npz" else np.load(path)["parts"].tobytes())
    return hasher.hexdigest()


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    kept = recipe("tiny", "station", seed=3, train=480, val=0, test=0, images=1)
    one = generate(tmp_path / "one", kept, workers=1, progress=False)
    two = generate(tmp_path / "two", kept, workers=2, progress=False)
    assert _digest(one) == _digest(two)


PICTURES = """
import hashlib, sys
from fmfa.simpedes.generate import pictures, recipe
hasher = hashlib.sha256()
for domain in sys.argv[1:]:
    for record, image, parts in pictures(recipe("tiny", domain, 0), "test", 0, 12):
        hasher.update(image.tobytes() + parts.tobytes() + repr(record["captions"]).encode())
print(hasher.hexdigest())
"""


@pytest.mark.parametrize("disabled", ["", "AVX2 FMA3", "AVX512F AVX512_SKX AVX512_ICL AVX2 FMA3"])
def test_the_pixels_have_a_known_checksum_on_any_processor(disabled):
    known = {
        ("street", "station"): "c5f2884f068a39b445a37ab5c4186ea3e56e87d8a2e9202cf91fd95b5d2b5c5b",
        ("night",): "5327faff90141b8ef883414f2790036d06bac89a5acb9e82a75d996cd674bda7",
    }
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled, "PYTHONWARNINGS": "ignore"}
    for domains, checksum in known.items():
        command = [sys.executable, "-c", PICTURES, *domains]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == checksum


def test_a_killed_generation_leaves_nothing_whole_and_goes_on(tmp_path, tiny):
    root = tmp_path / "again"
    shutil.copytree(tiny, root)
    for name in ("dataset.json", "reid_raw.json", "truth/test-0000.jsonl"):
        (root / name).unlink()
    (root / "imgs" / "test" / "0000" / "leftover.png").write_bytes(b"half a pict")
    kept = os.stat(root / "truth" / "train-0000.jsonl").st_mtime_ns
    generate(root, recipe("tiny"), workers=1, progress=False)
    assert os.stat(root / "truth" / "train-0000.jsonl").st_mtime_ns == kept
    assert _digest(root) == _digest(tiny)


def test_a_folder_of_another_recipe_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"another recipe.*seed"):
        generate(tiny, recipe("tiny", seed=1), progress=False)


FEW = {"train": 4, "val": 2, "test": 2, "images": 2}


def _made(root, **changes):
    return generate(root, recipe("tiny", **FEW | changes), workers=1, progress=False)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return _made(tmp_path_factory.mktemp("few") / "data")


def _read_everything(root):
    Truth(root)
    return [(list(Truth(root).records(split)), Truth(root).parts(split)) for split in ("train", "val", "test")]


def test_a_finished_data_set_is_opened_without_writing(few, tmp_path):
    root = shutil.copytree(few, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    _made(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


FILES = ("dataset.json", "recipe.json", "truth/val-0000.jsonl", "truth/val-0000.npz")
DAMAGES = {
    "missing": lambda old: None,
    "empty": lambda old: b"",
    "cut short": lambda old: old[: len(old) // 2],
    "without its last line": lambda old: old[: old[:-1].rfind(b"\n") + 1],
    "longer": lambda old: old + b"0\n",
    "null": lambda old: b"null",
    "list": lambda old: b"[]",
    "object": lambda old: b"{}\n",
    "nested": lambda old: b"[" * 100_000,
    "no text": lambda old: b"\xff\x00" * 100,
    "another value": lambda old: old.replace(b"0", b"1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(few, tmp_path, name, damage):
    root = shutil.copytree(few, tmp_path / "data")
    content = DAMAGES[damage]((root / name).read_bytes())
    (root / name).unlink()
    if content is not None:
        (root / name).write_bytes(content)
    assert is_simpedes(root)
    if (name, damage) == ("dataset.json", "missing"):  # as of a killed run
        with pytest.raises(AnnotationError, match=r"dataset\.json.*unfinished.*make it again"):
            _read_everything(root)
        _made(root)
        assert _digest(root) == _digest(few)
        return
    with pytest.raises(AnnotationError, match=rf"{re.escape(str(root / name))}.*delete this folder and make it again"):
        _made(root)
    if name != "recipe.json":
        with pytest.raises(AnnotationError, match=re.escape(str(root / name))):
            _read_everything(root)


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 40), st.binary(max_size=40))
def test_any_other_bytes_are_damage(few, name, place, length, found):
    file = few / name
    old = file.read_bytes()
    start = int(place * len(old))
    new = old[:start] + found + old[start + length :]
    if new == old or (name == "dataset.json" and _same_json(new, old)):
        return
    try:
        file.write_bytes(new)
        with pytest.raises(AnnotationError, match=re.escape(str(file))):
            _made(few)
    finally:
        file.write_bytes(old)


def _same_json(new, old):
    try:
        return json.loads(new) == json.loads(old)
    except ValueError:
        return False


def test_a_missing_split_is_no_empty_one(few):
    for read in (Truth.records, Truth.parts):
        with pytest.raises(AnnotationError, match=r"no ground truth for split 'query': expected truth/query-\*\.jsonl"):
            read(Truth(few), "query")


def test_data_made_again_in_one_process_is_read_anew(tmp_path):
    for seed in (0, 1):
        root = _made(tmp_path / "data", seed=seed)
        stored = np.load(root / "truth" / "test-0000.npz")["parts"]
        np.testing.assert_array_equal(list(Truth(root).parts("test").values()), stored)
        shutil.rmtree(root)


@pytest.mark.parametrize("lost", ["truth/train-0000.npz", "truth/train-0000.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "without its last line", "object"])
def test_a_damaged_shard_of_an_unfinished_data_set_is_written_again(few, tmp_path, lost, damage):
    root = shutil.copytree(few, tmp_path / "data")
    (root / "dataset.json").unlink()
    content = DAMAGES[damage]((root / lost).read_bytes())
    (root / lost).unlink()
    if content is not None:
        (root / lost).write_bytes(content)
    _made(root)
    assert _digest(root) == _digest(few)


def test_shards_of_an_unknown_recipe_are_not_taken_over(few, tmp_path):
    root = shutil.copytree(few, tmp_path / "data", ignore=shutil.ignore_patterns("*.json"))
    with pytest.raises(AnnotationError, match=r"recipe\.json"):
        _made(root, seed=1)


@pytest.mark.parametrize("full", range(9))  # which of the files that are written whole
def test_a_full_disk_is_one_sentence_and_the_next_start_goes_on(few, tmp_path, monkeypatch, full):
    root, written, sync = tmp_path / "data", count(), os.fsync

    def fsync(handle):
        if next(written) == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        expected = f"SimPEDES cannot be written to {root}; started again, it goes on where it stopped: No space left"
        with pytest.raises(ConfigError, match=re.escape(expected)):
            _made(root)
    assert not (root / "dataset.json").exists()
    (root / ".reid_raw.abc.json").write_bytes(b"left by a kill")
    _made(root)
    assert next(written) > full
    assert _digest(root) == _digest(few)


@pytest.mark.parametrize("place", ["file/data", "file"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"SimPEDES cannot be written to .*file"):
        _made(tmp_path / place)


def test_a_worker_that_dies_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_is_whole", lambda *_: os._exit(9))
    with pytest.raises(ConfigError, match=r"a process that wrote SimPEDES to .* died; start again"):
        generate(tmp_path / "data", recipe("tiny", **FEW), workers=2, progress=False)


@pytest.mark.parametrize("changes", [{"domain": "moon"}, {"family": 0}, {"images": 0}, {"train": -1}, {"seed": -1}])
def test_impossible_recipes_are_refused(changes):
    with pytest.raises(ConfigError):
        recipe("tiny", **{"domain": "street", **changes})
    with pytest.raises(ConfigError, match="scale"):
        recipe("gigantic")


# --- the stream


def test_the_stream_is_a_pure_function_with_short_texts():
    texts = []
    for index in range(40):
        image, text = web_pair(1, index)
        again, same = web_pair(1, index)
        np.testing.assert_array_equal(image, again)
        assert text == same
        assert image.shape == (96, 32, 3)
        texts.append(text)
    assert np.mean([len(t.split()) for t in texts]) < 10
    assert len(set(texts)) > 35
    assert texts != [web_pair(2, index)[1] for index in range(40)]


def test_a_person_is_drawn_from_the_generator_alone():
    assert draw_person(np.random.default_rng(1)) == draw_person(np.random.default_rng(1))
