import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa.errors import ConfigError
from fmfa.text.wordpiece import WordPieceTokenizer, wordpiece_tokenizer

TABLE = json.loads((Path(__file__).parents[1] / "fixtures" / "ivt_tables.json").read_text())["tokenizer"]


@pytest.fixture(scope="module")
def tokenizer():
    return WordPieceTokenizer({token: number for number, token in enumerate(TABLE["vocab"])})


@pytest.fixture
def vocab_file(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TABLE["vocab"]) + "\n", encoding="utf-8")
    return path


def test_ids_tokens_and_mask_equal_the_released_tokenizer(tokenizer):
    ids = tokenizer(TABLE["texts"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == TABLE["input_ids"]
    assert tokenizer.attention_mask(ids).tolist() == TABLE["attention_mask"]
    assert [tokenizer.decode(row) for row in ids] == TABLE["tokens"]


def test_nothing_is_truncated_up_to_the_position_table(tokenizer):
    released = TABLE["max_length_100_on_150_words_gives"][1]
    assert tokenizer(["a bag", "bag " * 150]).shape == (2, released)
    assert tokenizer(["bag " * 511]).shape == (1, 512)
    assert tokenizer(["bag " * 600]).shape == (1, 512)
    assert len(tokenizer.offsets("bag " * 600)) == 512


def test_special_ids_and_sizes(tokenizer):
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id) == (0, 6, 7, 8)
    assert tokenizer.vocab_size == len(TABLE["vocab"])
    assert tokenizer.context_length == 512
    assert tokenizer(["", "a"]).tolist() == [[6, 0], [6, 9]]
    assert tokenizer([]).shape == (0, 1)


def test_special_tokens_in_a_caption_are_text(tokenizer):
    ids = tokenizer(["[MASK] [SEP] a"])[0].tolist()
    assert not {tokenizer.mask_id, tokenizer.end_id} & set(ids)


@pytest.mark.parametrize("caption", ["The man, wearing RED shirts.", "naïve Ｊeans\tT-shirt", "Red élan 👕"])
def test_offsets_are_spans_of_the_original_caption(tokenizer, caption):
    spans = tokenizer.offsets(caption)
    tokens = tokenizer.decode(tokenizer([caption])[0])
    assert spans[0] is None
    assert len(spans) == len(tokens)
    for span, token in zip(spans[1:], tokens[1:]):
        if token != "[UNK]":
            assert caption[slice(*span)].lower() == token.removeprefix("##")
    covered = {i for start, end in spans[1:] for i in range(start, end)}
    assert covered == {i for i, letter in enumerate(caption) if not letter.isspace()}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text_encodes_to_one_row_a_caption(captions):
    tokenizer = WordPieceTokenizer({token: number for number, token in enumerate(TABLE["vocab"])})
    ids = tokenizer(captions)
    assert ids.shape[0] == len(captions)
    for row, caption in zip(ids, captions):
        spans = tokenizer.offsets(caption)
        assert row[0] == tokenizer.start_id
        assert (row != tokenizer.pad_id).sum() == len(spans)
        assert all(0 <= start <= end <= len(caption) for start, end in spans[1:])


def test_the_released_tokenizers_successor_agrees(vocab_file, tokenizer):
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertTokenizer(str(vocab_file))
    for text in TABLE["texts"]:
        assert bert(text, add_special_tokens=False)["input_ids"] == tokenizer([text])[0].tolist()[1:]


def test_a_vocabulary_file_by_path(vocab_file):
    assert wordpiece_tokenizer(vocab_file)(TABLE["texts"]).tolist() == TABLE["input_ids"]
    assert wordpiece_tokenizer(str(vocab_file), context_length=5)(TABLE["texts"]).shape == (3, 5)


def test_half_a_surrogate_pair_is_read_as_nothing(vocab_file):
    tokenizer = wordpiece_tokenizer(vocab_file)
    assert tokenizer(["a \ud800 bag"]).equal(tokenizer(["a bag"]))
    assert tokenizer.offsets("a\udfff bag")[1:] == [(0, 1), (3, 6)]


def test_a_name_without_network_says_what_to_give_instead(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"bert-nowhere.*path of a local vocab\.txt"):
        wordpiece_tokenizer("someone/bert-nowhere")


def test_files_that_are_no_vocabulary(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("a\nbag\n[UNK]\n")
    with pytest.raises(ConfigError, match=r"\[PAD\], \[CLS\], \[SEP\], \[MASK\] missing among 3"):
        wordpiece_tokenizer(words)
    binary = tmp_path / "model.bin"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"model\.bin.*expected a vocab\.txt"):
        wordpiece_tokenizer(binary)
