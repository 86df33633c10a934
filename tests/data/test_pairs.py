import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fmfa.data import pairs as pairs_module
from fmfa.data.images import CLIP_MEAN, CLIP_STD, fmfa_evaluation, fmfa_training, ivt_evaluation, ivt_training
from fmfa.data.pairs import PairDataset, make_loader, mask_tokens
from fmfa.data.sampling import IdentityBatches, RandomBatches
from fmfa.errors import ConfigError, ImageError
from fmfa.text.bytepair import clip_tokenizer
from fmfa.text.levels import swap_sides
from fmfa.text.wordpiece import WordPieceTokenizer

SIZE = (24, 16)
CAPTIONS = ["A man with a bag on his left.", "Right shoe black, no hat.", "", "a tall woman in red"]


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer(20)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imgs")
    generator = np.random.default_rng(0)
    for i in range(6):
        pixels = generator.integers(0, 256, (30, 15, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def table():
    rows = np.arange(24)
    captions = [f"{CAPTIONS[row % 4]} {row}" if row % 4 != 2 else "" for row in rows]
    return pd.DataFrame(
        {"image": [f"{i}.png" for i in rows // 4], "caption": captions, "label": rows // 8, "extra": rows}
    )


@pytest.fixture
def dataset(table, pictures, tokenizer):
    def make(**options):
        options = {"seed": 7, "tokenizer": tokenizer, "transform": fmfa_training(SIZE)} | options
        return PairDataset(table, pictures, **options)

    return make


def same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=0)
    return True


# transforms


def seeded(transform, picture, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform.finish(picture)


def colours(draws, mean, std):
    """Normalised draws [n, 3, H, W] back to the unit interval."""
    return draws * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)


@pytest.mark.parametrize("make", [fmfa_evaluation, ivt_evaluation])
def test_evaluation_is_a_bilinear_resize_and_normalisation(make, pictures):
    pixels = Image.open(pictures / "0.png").resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(pixels).astype(np.float64) / 255
    mean, std = (CLIP_MEAN, CLIP_STD) if make is fmfa_evaluation else (0.5, 0.5)
    expected = ((pixels - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    found = make(SIZE)(pictures / "0.png")
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_training_resizes_as_published(pictures):
    for transform, mode in (
        (fmfa_training(SIZE), Image.Resampling.BILINEAR),
        (ivt_training(SIZE), Image.Resampling.BICUBIC),
    ):
        expected = np.asarray(Image.open(pictures / "1.png").resize((SIZE[1], SIZE[0]), mode))
        assert (transform.read(pictures / "1.png").permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("size", [SIZE, (96, 32), (384, 128), (9, 3)])
@pytest.mark.parametrize("make", [fmfa_training, ivt_training])
def test_training_pictures_are_torchvisions_bit_by_bit(make, size):
    transform = make(size)
    pictures = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for seed in range(20):
        expected = seeded(SimpleNamespace(finish=transform.finish.torchvision), pictures, seed)
        assert torch.equal(seeded(transform, pictures, seed), expected)


@pytest.mark.parametrize(("size", "pad"), [((384, 128), (10, 10)), ((96, 32), (3, 3)), ((192, 128), (5, 10))])
@pytest.mark.parametrize("make", [fmfa_training, ivt_training])
def test_crops_are_windows_of_the_padded_picture(make, size, pad):
    # Every pixel of the picture names its place, so a crop's offset can be read off its colours.
    height, width = size
    places = torch.zeros(3, *size, dtype=torch.uint8)
    places[0] = (1 + torch.arange(height) % 200)[:, None]
    places[1] = 1 + torch.arange(width)
    mean, std = (CLIP_MEAN, CLIP_STD) if make is fmfa_training else ((0.5,) * 3, (0.5,) * 3)
    seen = set()
    for seed in range(60 if height > 100 else 300):
        crop = (255 * colours(seeded(make(size), places, seed), mean, std)).round().int()
        if make is fmfa_training and (crop[2] != 0).any():
            continue  # erased: the blue channel is nowhere else above zero
        rows = crop[0].amax(1)
        if make is ivt_training and ((crop < 0).any() or (crop[2] != 0).any()):
            continue
        black_above = int((rows != 0).int().argmax())
        top = pad[0] - black_above if black_above else pad[0] + int(rows[0]) - 1
        columns = crop[1].amax(0)
        black_left = int((columns != 0).int().argmax())
        left = pad[1] - black_left if black_left else pad[1] + int(columns[0]) - 1
        padded = torch.nn.functional.pad(places, (pad[1], pad[1], pad[0], pad[0])).int()
        assert (crop == padded[:, top : top + height, left : left + width]).all()
        seen.add((top, left))
    tops, lefts = (set(values) for values in zip(*seen))
    assert min(tops) >= 0
    assert max(tops) <= 2 * pad[0]
    assert max(lefts) <= 2 * pad[1]
    if size == (96, 32):
        assert tops == lefts == set(range(7))


def erased_boxes(make, mean, std, draws=400):
    """Which pixels of a mid-grey picture were erased, and their fill, over many draws."""
    size = (96, 48)
    grey = torch.full((3, *size), 100, dtype=torch.uint8)
    images = torch.stack([seeded(make(size), grey, seed) for seed in range(draws)])
    unit = colours(images, mean, std)
    plain = (unit - 100 / 255).abs().amax(1) < 1e-4
    black = unit.abs().amax(1) < 1e-4
    return images, ~plain & ~black


def test_fmfa_erases_with_the_numbers_of_clips_mean():
    images, erased = erased_boxes(fmfa_training, CLIP_MEAN, CLIP_STD)
    share = erased.flatten(1).float().mean(1)
    hit = share > 0
    assert 160 < hit.sum() < 240  # half of 400, four standard deviations
    assert share[hit].min() > 0.015
    assert share[hit].max() < 0.41
    assert share[hit].max() > 0.36
    values = images.permute(0, 2, 3, 1)[erased]
    assert torch.equal(values, torch.tensor(CLIP_MEAN).expand_as(values))
    check_boxes(erased[hit])


def test_ivt_erases_with_noise():
    images, erased = erased_boxes(ivt_training, (0.5,) * 3, (0.5,) * 3)
    share = erased.flatten(1).float().mean(1)
    hit = share > 0
    assert 160 < hit.sum() < 240
    assert share[hit].max() < 0.345
    assert share[hit].max() > 0.28
    values = images.permute(0, 2, 3, 1)[erased]
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02
    assert len(values.unique()) > 0.9 * values.numel()  # each pixel and channel its own draw
    check_boxes(erased[hit])


def check_boxes(erased):
    for box in erased:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)
        for line in (rows, columns):
            where = line.nonzero()
            assert line.sum() == where.max() - where.min() + 1


# masking


def test_masking_shares(tokenizer):
    text = "the man with a dark blue shirt and long grey trousers walks"
    ids = tokenizer([text]).repeat(8000, 1)
    before = ids.clone()
    masked, labels = mask_tokens(ids, tokenizer, torch.Generator().manual_seed(0))
    assert ids.equal(before)
    ordinary = (ids > 0) & (ids < tokenizer.start_id)
    chosen = labels != 0
    assert torch.equal(labels, torch.where(chosen, ids, 0))
    assert not (chosen & ~ordinary).any()
    assert torch.equal(masked[~chosen], ids[~chosen])
    columns = chosen[:, ordinary[0]].float().mean(0)
    # Position 1 is also taken where none was chosen: 0.85^12.
    assert abs(columns[0] - 0.15 - 0.85**12) < 0.02
    assert ((columns[1:] - 0.15).abs() < 0.02).all()
    became, was = masked[chosen], ids[chosen]
    assert abs((became == tokenizer.mask_id).float().mean() - 0.8) < 0.02
    assert abs((became == was).float().mean() - 0.1) < 0.02
    random = became[(became != tokenizer.mask_id) & (became != was)]
    assert random.min() >= 1
    assert random.max() < tokenizer.mask_id
    assert abs(random.float().mean() / (tokenizer.mask_id / 2) - 1) < 0.1
    assert random.max() > 0.99 * tokenizer.mask_id
    assert chosen.any(1).all()


def test_where_none_is_chosen_position_one_is(tokenizer):
    ids = tokenizer(["a red bag", "", "it's red", "red"])
    ids[2, 1] = 0
    fates = set()
    for seed in range(60):
        masked, labels = mask_tokens(ids, tokenizer, torch.Generator().manual_seed(seed), 0.0)
        assert labels.nonzero().tolist() == [[0, 1], [3, 1]]
        assert masked[1:3].equal(ids[1:3])  # an end token, and a token that no label can name
        assert labels[0, 1] == ids[0, 1]
        fates.add("mask" if masked[0, 1] == tokenizer.mask_id else "kept" if masked[0, 1] == ids[0, 1] else "random")
    assert fates == {"mask", "kept", "random"}
    one, label = mask_tokens(ids[0], tokenizer, torch.Generator().manual_seed(1), 0.0)
    assert one.shape == label.shape == (20,)
    assert label.nonzero().tolist() == [[1]]


def test_random_replacements_are_any_ordinary_token():
    tiny = SimpleNamespace(mask_id=4)
    ids = torch.full((3000, 4), 2)
    masked, _ = mask_tokens(ids, tiny, torch.Generator().manual_seed(0), 1.0)
    assert set(masked.flatten().tolist()) == {1, 2, 3, 4}


def test_masking_everything(tokenizer):
    ids = tokenizer(["a red bag " * 20])
    _, labels = mask_tokens(ids, tokenizer, torch.Generator().manual_seed(0), 1.0)
    assert labels[0, 1:-1].equal(ids[0, 1:-1])
    assert labels[0, [0, -1]].tolist() == [0, 0]


# samples


def test_a_sample_derives_from_seed_epoch_and_row(dataset):
    pairs, again = dataset(), dataset()
    for epoch in (0, 3):
        pairs.set_epoch(epoch)
        again.set_epoch(epoch)
        forward = {row: pairs.collate([pairs[row]]) for row in range(24)}
        assert all(same(again.collate([again[row]]), forward[row]) for row in reversed(range(24)))
    other_epoch, other_seed = dataset(), dataset(seed=8)
    other_seed.set_epoch(3)
    other_epoch.set_epoch(2)
    for other in (other_epoch, other_seed):
        assert not other[0]["images"].equal(pairs[0]["images"])
        masks = [
            [sample["masked_ids"][0].tolist() for sample in map(data.__getitem__, range(24))] for data in (other, pairs)
        ]
        assert masks[0] != masks[1]
    # Rows of one picture are augmented independently.
    assert not pairs[0]["images"].equal(pairs[1]["images"])


def test_batches_hold_what_they_say(dataset, table, tokenizer):
    pairs = dataset()
    rows = [5, 2, 5, 17]
    batch = pairs.collate([pairs[row] for row in rows])
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "images": ((4, 3, *SIZE), torch.float32),
        "caption_ids": ((4, 20), torch.int64),
        "masked_ids": ((4, 20), torch.int64),
        "masked_labels": ((4, 20), torch.int64),
        "masked_positions": (tuple(batch["masked_positions"].shape), torch.int64),
        "labels": ((4,), torch.int64),
        "rows": ((4,), torch.int64),
    }
    assert batch["rows"].tolist() == rows
    assert batch["labels"].tolist() == table["label"][rows].tolist()
    assert batch["caption_ids"].equal(tokenizer(table["caption"][rows].tolist()))
    chosen = batch["masked_labels"] != 0
    places = batch["masked_positions"]
    assert places.shape[1] == -(-int(chosen.sum(dim=1).max()) // 4) * 4
    assert torch.equal(chosen.gather(1, places).sum(dim=1), chosen.sum(dim=1))
    assert all(len(row.unique()) == len(row) for row in places)
    assert torch.equal(batch["masked_labels"][chosen], batch["caption_ids"][chosen])
    assert torch.equal(batch["masked_ids"][~chosen], batch["caption_ids"][~chosen])
    assert chosen.any(1).tolist() == [True, False, True, True]  # the caption of row 2 is empty
    plain = dataset(mask_probability=0)
    assert not {"masked_ids", "masked_labels"} & plain[0].keys()


def test_the_default_generator_is_left_alone(dataset):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pairs = dataset()
    loader = make_loader(pairs, RandomBatches(24, 5, seed=0))
    assert len(list(loader)) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_changes_nothing(dataset, monkeypatch):
    cached = dataset()
    monkeypatch.setattr(pairs_module, "CACHE_LIMIT", 0)
    read = dataset()
    assert cached._pictures is not None
    assert read._pictures is None
    assert all(same(cached.collate([cached[row]]), read.collate([read[row]])) for row in range(24))


def test_worker_processes_and_resuming_change_nothing(dataset):
    def passes(workers, schedule):
        pairs = dataset(flip="swap")
        loader = make_loader(pairs, RandomBatches(24, 4, seed=1), workers=workers)
        found = []
        for epoch, first in schedule:
            loader.dataset.set_epoch(epoch)
            loader.batch_sampler.set_epoch(epoch, first)
            found.append(list(loader))
        return found

    alone, resumed = passes(0, [(0, 0), (1, 0)]), passes(0, [(1, 4)])
    shared = passes(2, [(0, 0), (1, 0), (0, 2)])
    assert [len(batches) for batches in alone + resumed + shared] == [6, 6, 2, 6, 6, 4]
    for expected, found in [
        (alone[0], shared[0]),
        (alone[1], shared[1]),
        (alone[0][2:], shared[2]),
        (alone[1][4:], resumed[0]),
    ]:
        assert all(same(left, right) for left, right in zip(expected, found, strict=True))
    assert not alone[0][0]["images"].equal(alone[1][0]["images"])


def test_ranks_make_up_the_joint_batch(dataset, table):
    def load(rank, world):
        batches = IdentityBatches(table["label"], 2, 4, seed=0, rank=rank, world_size=world)
        return list(make_loader(dataset(), batches))

    for joint, first, second in zip(load(0, 1), load(0, 2), load(1, 2), strict=True):
        assert same(joint, {key: torch.cat([first[key], second[key]]) for key in joint})


# flips


def mirrored(pairs, rows, picture):
    """Whether each of the rows shows the picture mirrored; fails if it shows neither."""
    shown = [pairs[row]["images"][0] for row in rows]
    plain, flipped = (pairs.transform.finish(p) for p in (picture, picture.flip(-1)))
    assert all(image.equal(plain) or image.equal(flipped) for image in shown)
    return [image.equal(flipped) for image in shown]


@pytest.mark.parametrize("flip", ["mirror", "swap", "off"])
def test_flips(dataset, table, tokenizer, flip):
    pairs = dataset(transform=fmfa_evaluation(SIZE), flip=flip, mask_probability=0)
    count = 0
    for epoch in range(40):
        pairs.set_epoch(epoch)
        flags = mirrored(pairs, [0, 1], pairs._pictures[0])
        count += sum(flags)
        for row, flag in zip([0, 1], flags):
            caption = table["caption"][row]
            expected = swap_sides(caption) if flag and flip == "swap" else caption
            assert pairs[row]["caption_ids"][0].equal(tokenizer([expected])[0])
    assert count == 0 if flip == "off" else 25 < count < 55


def test_masks_are_of_the_swapped_caption(dataset):
    pairs = dataset(flip="swap", mask_probability=0.9)
    for epoch in range(10):
        pairs.set_epoch(epoch)
        sample = pairs[0]
        ids, labels = sample["caption_ids"][0], sample["masked_labels"][0]
        assert labels[labels != 0].equal(ids[labels != 0])


def test_swap_sides():
    assert swap_sides("Left hand, right-hand RIGHT; upright leftover") == "Right hand, left-hand LEFT; upright leftover"
    assert swap_sides("no side") == "no side"


# levels


def levels(caption, record, generator):
    return f"word {record['extra']}", f"phrase left {generator.integers(10**6)}", caption.lower(), 0


def wordpieces():
    letters = [chr(c) for c in range(33, 127)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return WordPieceTokenizer({token: i for i, token in enumerate(tokens)}, 64)


def test_levels_have_three_texts_and_three_augmentations(dataset, table, tokenizer):
    pairs = dataset(levels=levels, transform=ivt_training(SIZE))
    rows = [4, 9]
    batch = pairs.collate([pairs[row] for row in rows])
    assert batch["images"].shape == (6, 3, *SIZE)
    assert batch["rows"].tolist() == rows * 3
    assert batch["labels"].tolist() == [0, 1] * 3
    assert batch["caption_ids"][:2].equal(tokenizer(["word 4", "word 9"]))
    assert batch["caption_ids"][4:].equal(tokenizer([table["caption"][row].lower() for row in rows]))
    assert not batch["caption_ids"][2].equal(batch["caption_ids"][3])
    assert len({image.numpy().tobytes() for image in batch["images"]}) == 6
    assert same(batch, pairs.collate([pairs[row] for row in rows]))
    pairs.set_epoch(1)
    later = pairs.collate([pairs[row] for row in rows])
    assert not later["caption_ids"][2:4].equal(batch["caption_ids"][2:4])


def test_each_level_is_swapped_with_its_own_picture(dataset, tokenizer):
    pairs = dataset(
        levels=lambda caption, record, generator: ["left"] * 3,
        transform=fmfa_evaluation(SIZE),
        flip="swap",
        mask_probability=0,
    )
    left, right = tokenizer(["left", "right"])
    seen = set()
    for epoch in range(40):
        pairs.set_epoch(epoch)
        sample = pairs[0]
        plain = pairs.transform.finish(pairs._pictures[0])
        flags = [not image.equal(plain) for image in sample["images"]]
        assert all(ids.equal(right if flag else left) for ids, flag in zip(sample["caption_ids"], flags))
        seen.add(tuple(flags))
    assert len(seen) == 8


@pytest.mark.parametrize("hook", [levels, None])
def test_a_padding_tokenizer_gets_an_attention_mask(dataset, hook):
    words = wordpieces()
    pairs = dataset(tokenizer=words, levels=hook, mask_probability=0)
    rows = [2, 3]  # an empty caption and a long one
    batch = pairs.collate([pairs[row] for row in rows])
    ids, mask = batch["caption_ids"], batch["attention_mask"]
    assert mask.dtype == torch.int64
    assert ids.shape == mask.shape
    assert torch.equal(mask, (ids != words.pad_id).long())
    assert mask.sum(1).max() == ids.shape[1]
    if hook is None:
        assert pairs.collate([pairs[2]])["attention_mask"].tolist() == [[1]]


# mistakes


def test_unreadable_pictures_are_named(table, pictures, tokenizer, tmp_path, monkeypatch):
    for path in pictures.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"3\.png"):
        PairDataset(table, tmp_path, tokenizer, fmfa_training(SIZE), seed=0)
    monkeypatch.setattr(pairs_module, "CACHE_LIMIT", 0)
    pairs = PairDataset(table, tmp_path, tokenizer, fmfa_training(SIZE), seed=0)
    assert pairs[0]["images"].shape == (1, 3, *SIZE)
    with pytest.raises(ImageError, match=r"3\.png"):
        pairs[12]
    outside = table.assign(image="../x.png")
    with pytest.raises(ImageError, match=r"\.\."):
        PairDataset(outside, tmp_path, tokenizer, fmfa_training(SIZE), seed=0)


def test_pictures_in_a_file_are_those_in_memory_and_a_killed_copy_goes_on(table, pictures, tokenizer, tmp_path):
    for path in pictures.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cache = tmp_path / "a" / "cache"

    def make(**options):
        return PairDataset(table, tmp_path, tokenizer, fmfa_training(SIZE), seed=0, **options)

    expected, size = make()._pictures, 3 * SIZE[0] * SIZE[1]
    assert torch.equal(make(cache=cache)._pictures, expected)
    [file] = cache.glob("pictures-*")
    file.rename(file.with_suffix(".partial"))
    os.truncate(file.with_suffix(".partial"), 2 * size + 5)  # two pictures and a part of the third
    with open(file.with_suffix(".partial"), "r+b") as partial:
        partial.write(b"\x07" * size)
    gone_on = make(cache=cache)
    assert (gone_on._pictures[0] == 7).all()  # what was written is not read again
    assert torch.equal(gone_on._pictures[1:], expected[1:])
    assert [path.name for path in cache.glob("pictures-*")] == [file.name]
    os.utime(tmp_path / "3.png", (1, 1))
    assert torch.equal(make(cache=cache)._pictures, expected)  # changed pictures have a file of their own
    assert len(list(cache.glob("pictures-*"))) == 2
    with pytest.raises(ConfigError, match="cannot hold the resized pictures"):
        make(cache=tmp_path / "3.png" / "cache")
