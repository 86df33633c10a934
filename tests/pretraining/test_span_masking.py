import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa.pretraining.span_masking import SpanMasking, prepare_caption
from fmfa.text.wordpiece import SPECIAL, WordPieceTokenizer

WORDS = ["a", "man", "red", "coat", "jean", "##s", "##y", "bag", "[", "[unused0]"]
TOKENIZER = WordPieceTokenizer({token: number for number, token in enumerate([*SPECIAL, *WORDS])})
MASKING = SpanMasking(TOKENIZER)
START, GOES_ON = TOKENIZER.start_id, {10, 11}


def rows(pieces):
    return torch.tensor([START, *pieces])


@pytest.mark.parametrize(
    ("caption", "prepared"),
    [
        ("A Man, in a T-shirt.", "a man in a t shirt"),
        ("""It's "black/white"! (new?) *#:;~ ok""", "its black white new ok"),
        (" - ./ ", ""),
        ("bag " * 60, " ".join(["bag"] * 50)),
        ("left-hand " * 30, " ".join(["left hand"] * 25)),
        ("ÉCRU & 5%", "écru & 5%"),
    ],
)
def test_captions_are_prepared_as_released(caption, prepared):
    assert prepare_caption(caption) == prepared


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from([5, 6, 7, 8, 9, 10, 11, 12]), max_size=49), st.integers(0, 2**32))
def test_number_of_targets_labels_and_replacements(pieces, seed):
    ids = rows(pieces)
    before = ids.clone()
    masked, labels = MASKING(ids, np.random.default_rng(seed))
    assert torch.equal(ids, before)
    chosen = labels != 0
    expected = 0 if not pieces else min(8, max(1, round(0.25 * len(pieces))))
    assert int(chosen.sum()) == expected
    assert not chosen[0]
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    allowed = {TOKENIZER.mask_id, *range(len(SPECIAL), len(SPECIAL) + len(WORDS) - 1)}  # no [unused0]
    assert set(masked[chosen].tolist()) <= allowed


def test_the_draw_depends_on_the_generator_alone():
    ids = rows([5, 6, 7, 8, 9, 10] * 6)
    first, again, other = (MASKING(ids, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_pieces_beyond_the_number_are_taken_back_at_random():
    single = [MASKING.targets([START, 9, 10, 11], np.random.default_rng(seed)) for seed in range(60)]
    assert {len(targets) for targets in single} == {1}
    assert {targets[0] for targets in single} == {1, 2, 3}


def naive_targets(ids, generator):
    """The same rule, word by word, on lists of words."""
    words = []
    for position in range(1, len(ids)):
        if ids[position] in GOES_ON and words:
            words[-1].append(position)
        else:
            words.append([position])
    number = min(8, max(1, round((len(ids) - 1) / 4)))
    chosen = []
    for start in generator.permutation(np.arange(len(ids) - 1)) + 1:
        if len(chosen) < number and start not in chosen:
            length = generator.integers(2, 4) if generator.random() < 0.2 else 1
            for word in words:
                if set(word) & set(range(start, start + length)):
                    chosen += [position for position in word if position not in chosen]
    return sorted(generator.permutation(sorted(chosen))[:number])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from([5, 6, 9, 10, 11]), min_size=1, max_size=40), st.integers(0, 2**32))
def test_targets_against_a_word_by_word_rule(pieces, seed):
    ids = [START, *pieces]
    found = MASKING.targets(ids, np.random.default_rng(seed))
    assert found == naive_targets(ids, np.random.default_rng(seed))


def test_shares_of_mask_random_and_kept():
    ids = rows([5, 6, 7, 8] * 8)
    generator = np.random.default_rng(0)
    fates = np.zeros(3)
    places = np.zeros(len(ids))
    for _ in range(1500):
        masked, labels = MASKING(ids, generator)
        chosen = labels != 0
        places += chosen.numpy()
        now, was = masked[chosen], ids[chosen]
        hidden = now == TOKENIZER.mask_id
        fates += [int(hidden.sum()), int((~hidden & (now != was)).sum()), int((now == was).sum())]
    shares = fates / fates.sum()
    # A random piece is the piece itself once in nine times.
    assert shares == pytest.approx([0.8, 0.1 * 8 / 9, 0.1 + 0.1 / 9], abs=0.012)
    # Spans run to the right, so the first pieces are drawn a little less often.
    assert places[0] == 0
    assert places[4:] / 1500 == pytest.approx(np.full(len(ids) - 4, 0.25), abs=0.05)


def test_spans_of_two_or_three_pieces_are_a_fifth():
    ids = rows([5] * 8)  # two targets: neighbours mostly by a longer span
    neighbours = 0
    for seed in range(3000):
        first, second = MASKING.targets(ids.tolist(), np.random.default_rng(seed))
        neighbours += second - first == 1
    # A longer first span (0.2, less at the end of the row, and a span of three loses its middle or an end)
    # or two single draws that touch (0.25).
    assert 0.33 < neighbours / 3000 < 0.45
