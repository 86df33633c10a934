import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import SimpleTokenizer

from fmfa.errors import ConfigError
from fmfa.pretraining.vocabulary import train_small_vocabulary
from fmfa.text import bytepair as cleaning
from fmfa.text.bytepair import clean_caption, cleaned_with_origin, clip_tokenizer, phrase_tokens, small_tokenizer

CAPTIONS = [
    "A man wearing a RED t-shirt, dark-blue jeans and white shoes; he's carrying 2 bags.",
    "The woman has long, black hair. She wears a pink skirt and is pushing a child's stroller!",
    "This person (male?) holds an umbrella/phone & walks to the left...",
    "Ünïcödé “quotes”, café — naïve ☕ 日本語 İstanbul ΣΑΣ ﬁne 𝔘𝔫𝔦",
    "a &amp; b &lt;tag&gt; &nbsp; caf&eacute; &amp;amp;",
    "donâ€™t fix\x00me\tnow\r\n  please ",
    "",
    "   ",
    "!!! ... ?!",
    "<|mask|> [SEP] </w> <|endoftext|>",
    "red " * 200,
    "ab" * 500,
]

# What a caption writer types, and what a token of it reads.
WORDS = [
    *((word, word.lower()) for word in ["A", "man", "Wearing", "RED", "shirt", "bag", "7", *",.!()-;"]),
    ("“", '"'),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("ﬁne", "fine"),
    ("ＲＥＤ", "red"),
    ("&quot;", '"'),
]
ordinary = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([" ", "  ", "\t", "\n", " \u3000"])), max_size=12)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "vocabulary.json"
    train_small_vocabulary(CAPTIONS[:4] * 3, 400, path)
    return path


@pytest.fixture(scope="module", params=["clip", "small"])
def tokenizer(request, vocabulary):
    return clip_tokenizer() if request.param == "clip" else small_tokenizer(vocabulary, 40)


@pytest.fixture(scope="module")
def reference():
    return SimpleTokenizer()


def rows(tokenizer, caption):
    """The ids up to and including the end token."""
    ids = tokenizer([caption])[0].tolist()
    return ids[: ids.index(tokenizer.end_id) + 1]


def test_ids_equal_open_clips(reference):
    assert clip_tokenizer()(CAPTIONS).equal(reference(CAPTIONS))
    assert clip_tokenizer(16)(CAPTIONS).equal(reference(CAPTIONS, 16))


def test_every_piece_of_the_vocabulary_is_read_as_open_clip_reads_it(reference):
    pieces = [reference.decode([i]) for i in range(49405)]
    captions = [" ".join(pieces[i : i + 25]) for i in range(0, len(pieces), 25)]
    ours, theirs = clip_tokenizer(300)(captions), reference(captions, 300)
    assert ours.equal(theirs)
    assert len(ours.unique()) > 36_000


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80))
def test_ids_equal_open_clips_on_any_text(caption):
    if "of_text>" not in caption.lower() and "jekyll" not in caption.lower():
        assert clip_tokenizer()([caption]).equal(_open_clip()([caption]))


def _open_clip(cache=[]):  # noqa: B006 - one instance for all examples
    if not cache:
        cache.append(SimpleTokenizer())
    return cache[0]


def test_mask_takes_the_place_of_the_last_merge(reference):
    tokenizer = clip_tokenizer()
    special = tokenizer.mask_id, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
    assert (*special, tokenizer.vocab_size) == (49405, 49406, 49407, 0, 49408)
    assert reference.decode([49405]) == "jekyll "
    pieces = tokenizer.decode(rows(tokenizer, "doctor Jekyll waits"))
    assert pieces == ["<|startoftext|>", "doctor", "jeky", "ll", "waits", "<|endoftext|>"]
    assert tokenizer.mask_id not in tokenizer(["doctor jekyll"])


def test_special_tokens_cannot_be_written_in_a_caption(tokenizer):
    hostile = "a <|mask|> <|endoftext|> <|startoftext|> <|pad|> <start_of_text> <end_of_text>"
    inner = rows(tokenizer, hostile)[1:-1]
    assert not set(inner) & {tokenizer.mask_id, tokenizer.start_id, tokenizer.end_id}
    assert "".join(tokenizer.decode(inner)) == hostile.replace(" ", "")[: len("".join(tokenizer.decode(inner)))]


def test_long_captions_keep_their_end_token(tokenizer):
    ids = tokenizer(["red " * 200, "red", ""])
    assert ids.dtype == torch.int64
    assert ids.shape == (3, tokenizer.context_length)
    assert ids[0, 0] == tokenizer.start_id
    assert ids[0, -1] == tokenizer.end_id
    assert (ids[0, 1:-1] == ids[1, 1]).all()
    assert ids[2, :3].tolist() == [tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id]
    assert ids.argmax(1).tolist() == [tokenizer.context_length - 1, 2, 1]
    assert len(tokenizer.offsets("red " * 200)) == tokenizer.context_length
    assert tokenizer([]).shape == (0, tokenizer.context_length)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.booleans())
def test_spans_lie_in_the_caption_and_never_run_backwards(caption, doubled):
    tokenizer = clip_tokenizer()
    caption = caption * 2 if doubled else caption
    spans = tokenizer.offsets(caption)
    assert len(spans) == len(rows(tokenizer, caption))
    assert spans[0] is None
    assert spans[-1] is None
    inner = spans[1:-1]
    assert all(0 <= start < end <= len(caption) for start, end in inner)
    assert inner == sorted(inner)
    assert [end for _, end in inner] == sorted(end for _, end in inner)


@settings(max_examples=150, deadline=None)
@given(ordinary)
def test_the_text_of_a_span_cleans_to_its_token(words):
    caption = "".join(raw + gap for (raw, _), gap in words)
    tokenizer = clip_tokenizer()
    tokens = tokenizer.decode(rows(tokenizer, caption))
    for token, span in zip(tokens, tokenizer.offsets(caption)):
        assert span is None or clean_caption(caption[slice(*span)]) == token
    assert tokens[1:-1] == [clean for (_, clean), _ in words]


def test_small_spans_clean_to_their_tokens(vocabulary):
    tokenizer = small_tokenizer(vocabulary, 200)
    for caption in CAPTIONS[:3]:
        tokens, spans = tokenizer.decode(rows(tokenizer, caption)), tokenizer.offsets(caption)
        assert len(tokens) == len(spans) > 15
        assert all(span is None or caption[slice(*span)].lower() == token for token, span in zip(tokens, spans))
        assert "".join(tokens[1:-1]) == clean_caption(caption).replace(" ", "")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_origin_has_one_span_a_cleaned_character(caption):
    text, origin = cleaned_with_origin(caption)
    assert text == clean_caption(caption)
    assert len(origin) == len(text)


def test_origin_of_changed_lengths():
    assert cleaned_with_origin(" \u0130x") == ("i\u0307x", [(1, 2), (1, 2), (2, 3)])
    assert cleaned_with_origin("a \t&lt;b") == ("a <b", [(0, 1), (1, 3), (3, 7), (7, 8)])
    assert cleaned_with_origin("\ufb01x") == ("fix", [(0, 1), (0, 1), (1, 2)])
    assert cleaned_with_origin("x\x00y") == ("xy", [(0, 1), (2, 3)])


# Texts that cleaning makes longer or shorter.
REPAIRED = ["&amp;", "&eacute;", "&CounterClockwiseContourIntegral;", "e\u0301", "Ã©", "â€™", "ﬃ", "\x00", "\x1b[0m"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*REPAIRED, "a", "ab", " ", "&nbsp;", "word", "ý"]) | st.text(max_size=3), max_size=20))
def test_origins_of_much_repaired_captions_are_those_of_their_words(parts):
    """Where there is too much to compare, a repaired word is the origin of each of its characters."""
    caption = "".join(parts)
    text, exact = cleaned_with_origin(caption)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning, "_MOST_MATCHES", -1)
        assert cleaned_with_origin(caption)[0] == text
        coarse = cleaned_with_origin(caption)[1]
    assert len(coarse) == len(exact)
    for (start, end), (first, last) in zip(exact, coarse):
        assert 0 <= first < last <= len(caption)
        assert (first, last) == (start, end) or (first <= start and end <= last)
    assert coarse == sorted(coarse)


@pytest.mark.parametrize(
    ("unit", "words"),
    [("a", 1), ("e\u0301", 1), ("ab&eacute;", 1), ("donâ€™t", 40), ("a\u0301\u0302\u0323", 80), ("\x1b[", 1)],
)
def test_any_caption_is_read_in_bounded_time(unit, words):
    word = (unit * 20_000)[: 20_000 // words] + "&amp;é"
    caption = " ".join([word] * words)
    started = time.process_time()
    assert len(clip_tokenizer().offsets(caption)) == 77
    assert time.process_time() - started < 8  # comparing whole words takes up to minutes


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=0x7F), max_size=40))
def test_ascii_is_cleaned_as_in_open_clip(caption):
    assert clean_caption(caption) == _open_clip().clean_fn(caption)


def test_small_vocabulary_layout(vocabulary):
    tokenizer = small_tokenizer(vocabulary)
    assert tokenizer.vocab_size == 400
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.start_id, tokenizer.end_id) == (0, 397, 398, 399)
    assert tokenizer.decode([0, 397, 398, 399]) == ["<|pad|>", "<|mask|>", "<|startoftext|>", "<|endoftext|>"]
    assert rows(tokenizer, "Man")[1:-1] == rows(tokenizer, "man")[1:-1]
    assert len(rows(tokenizer, "wearing")) == 3  # learnt whole
    assert rows(tokenizer, "ж")[1:-1] == [1 + byte for byte in "ж".encode()]  # unseen in training


def test_small_vocabulary_ends_where_nothing_repeats(tmp_path):
    train_small_vocabulary(["abc abc xyz"], 5000, tmp_path / "v.json")
    tokenizer = small_tokenizer(tmp_path / "v.json")
    assert tokenizer.vocab_size == 256 + 2 + 4
    assert tokenizer.end_id == tokenizer.vocab_size - 1


def test_small_vocabulary_is_the_same_every_time(vocabulary, tmp_path):
    # The library's trainer keeps hash tables whose order differs from one to the next.
    for attempt in range(5):
        path = tmp_path / f"{attempt}.json"
        train_small_vocabulary(iter(CAPTIONS[:4] * 3), 400, path)
        assert path.read_bytes() == vocabulary.read_bytes()


def test_bad_vocabularies_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="train_small_vocabulary"):
        small_tokenizer(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not a file of the tokenizers library"):
        small_tokenizer(tmp_path / "other.json")
    train_small_vocabulary(["a"], 300, tmp_path / "v.json")
    changed = (tmp_path / "v.json").read_text().replace("<|mask|>", "<|hide|>")
    (tmp_path / "v.json").write_text(changed)
    with pytest.raises(ConfigError, match="last three ids"):
        small_tokenizer(tmp_path / "v.json")
    with pytest.raises(ConfigError, match="at least 3"):
        clip_tokenizer(2)


def test_phrase_tokens(tokenizer):
    caption = "A man in “dark   BLUE” shoes &amp; a hat"
    start = caption.index("dark")
    positions = phrase_tokens(tokenizer, caption, (start, caption.index("”")))
    assert positions == list(range(positions[0], positions[-1] + 1))
    assert "".join(tokenizer.decode(tokenizer([caption])[0][positions])) == "darkblue"
    assert phrase_tokens(tokenizer, caption, (start + 4, start + 6)) == []
    whole = phrase_tokens(tokenizer, caption, (0, len(caption)))
    assert whole == list(range(1, len(rows(tokenizer, caption)) - 1))


def test_phrase_tokens_of_a_truncated_phrase(tokenizer):
    caption = "red " * 200 + "hat"
    assert phrase_tokens(tokenizer, caption, (800, 803)) == []
    assert phrase_tokens(tokenizer, caption, (0, 3))[0] == 1
