import json
import pickle
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa.errors import ConfigError
from fmfa.text.levels import (
    LEVEL_FORMS,
    LevelReader,
    clause_candidates,
    join_attributes,
    phrase_candidates,
    sentence_pieces,
    text_levels,
)

TABLES = json.loads((Path(__file__).parents[1] / "fixtures" / "ivt_tables.json").read_text())["text_levels"]
CAPTIONS = list(TABLES["captions"])


@pytest.mark.parametrize("caption", CAPTIONS)
def test_candidates_equal_the_released_cut(caption):
    released = TABLES["captions"][caption]
    assert sorted(set(phrase_candidates(caption))) == sorted(released["phrase_candidates"])
    assert sorted(set(clause_candidates(caption))) == sorted(released["icfg_rstp_word_candidates"])
    assert sentence_pieces(caption) == released["split_txt"]
    assert released["phrase_with_random.seed(0)"] in phrase_candidates(caption)


@pytest.mark.parametrize("caption", list(TABLES["phrase_failures"]))
@pytest.mark.parametrize("form", ["clauses", "attributes"])
def test_captions_that_the_released_cut_cannot_draw_from_stay_whole_and_are_counted(caption, form):
    assert phrase_candidates(caption) == []
    levels = text_levels(caption.upper(), np.random.default_rng(0), form=form)
    assert levels == (caption, caption, caption, 2)


def naive_phrase_pieces(caption):
    pieces = []
    for sentence in caption.split("."):
        clauses = sentence.split(",")
        best = clauses[0]
        for clause in clauses:
            if len(clause) > len(best):
                best = clause
        clauses.remove(best)
        pieces.append(best)
        pieces.append(",".join(clauses).strip(","))
    return [piece.strip() for piece in pieces if len(piece) > 5]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab ,.[]", max_size=60))
def test_pieces_against_a_naive_loop_and_texts_are_never_empty(caption):
    assert sentence_pieces(caption) == naive_phrase_pieces(caption)
    stripped = caption.strip(".").strip("[").strip("]")
    assert phrase_candidates(caption) == naive_phrase_pieces(stripped)
    clauses = [c.strip() for s in stripped.split(".") for c in s.split(",") if len(c) > 5]
    assert clause_candidates(caption) == clauses
    levels = text_levels(caption, np.random.default_rng(1))
    assert levels.sentence == caption.lower()
    assert bool(levels.word and levels.phrase) == bool(caption)
    assert levels.fallbacks >= (not clauses) + (not phrase_candidates(caption))


def test_ties_keep_the_first_clause_and_equal_clauses_stay():
    assert phrase_candidates("abcdef,ghijkl,abcdef") == ["abcdef", "ghijkl,abcdef"]


def test_phrases_and_clauses_are_drawn_uniformly_and_repeatably():
    caption = CAPTIONS[0]
    generator = np.random.default_rng(7)
    draws = [text_levels(caption, generator) for _ in range(4000)]
    for level, candidates in (("phrase", phrase_candidates(caption)), ("word", clause_candidates(caption))):
        counts = Counter(getattr(draw, level) for draw in draws)
        assert set(counts) == set(candidates)
        expected = 4000 / len(candidates)
        assert max(abs(n - expected) for n in counts.values()) < 5 * expected**0.5
    again = np.random.default_rng(7)
    assert draws[:20] == [text_levels(caption, again) for _ in range(20)]
    assert all(draw.fallbacks == 0 for draw in draws)


def test_attribute_phrases_are_joined_in_every_order_and_number():
    phrases = list(TABLES["cuhk_att"].values())
    every = {",".join(p) for n in range(1, 5) for p in permutations(phrases, n)}
    assert set(TABLES["cuhk_word_level_seeds0-7"]) <= every
    generator = np.random.default_rng(0)
    draws = [join_attributes(phrases, generator) for _ in range(4000)]
    assert set(draws) == every
    for number in range(1, 5):
        share = sum(draw.count(",") == number - 1 for draw in draws)
        assert abs(share - 1000) < 150
    first = Counter(draw.split(",")[0] for draw in draws)
    assert all(abs(first[phrase] - 1000) < 150 for phrase in phrases)


def test_attributes_form_uses_them_and_falls_back_to_unstripped_pieces():
    bracketed = CAPTIONS[4]
    generator = np.random.default_rng(0)
    with_attributes = text_levels(bracketed, generator, form="attributes", attributes={"upper": "white dress"})
    assert with_attributes.word == "white dress"
    words = {text_levels(bracketed, generator, form="attributes", attributes={}).word for _ in range(40)}
    assert words == {"[the girl is wearing a white dress", "carrying a bag"}
    empty = text_levels(bracketed, generator, form="attributes", attributes={"upper": ""})
    assert (empty.word, empty.fallbacks) == (bracketed, 1)


def test_true_spans_replace_the_cutting():
    caption = "A man in a Red coat. With jeans"
    spans = [(9, 19), (26, 31)]
    generator = np.random.default_rng(0)
    draws = [text_levels(caption, generator, form="true_spans", spans=spans) for _ in range(200)]
    assert {draw.phrase for draw in draws} == {"a Red coat", "jeans"}
    assert {draw.word for draw in draws} == {"a Red coat", "jeans", "a Red coat,jeans", "jeans,a Red coat"}
    assert {draw.sentence for draw in draws} == {caption.lower()}
    nothing = text_levels(caption, generator, form="true_spans", spans=[])
    assert nothing == (caption.lower(),) * 3 + (2,)


def test_the_reader_takes_phrases_from_the_table_and_counts_fallbacks():
    captions = ["a red coat, blue jeans", "ab,cd.ef", "a bag."]
    table = pd.DataFrame(
        {
            "caption": captions,
            "att": [{"upper": "red coat"}, {}, None],
            "spans": [[(2, 10)], [], [[2, 5]]],
        }
    )
    rows = table.to_dict("records")

    def read(form, number):
        reader = pickle.loads(pickle.dumps(LevelReader(form)))  # worker processes get a copy
        return reader(captions[number], rows[number], np.random.default_rng(0))

    assert read("attributes", 0).word == "red coat"
    assert read("attributes", 1) == ("ab,cd.ef",) * 3 + (2,)
    assert read("true_spans", 0) == ("red coat", "red coat", captions[0], 0)
    assert read("true_spans", 2) == ("bag", "bag", "a bag.", 0)
    # "a bag" has five characters, one too few for a piece
    assert LevelReader("attributes").fallbacks(table, np.random.default_rng(0)) == 4
    assert LevelReader("clauses").fallbacks(table.drop(columns=["att"]), np.random.default_rng(0)) == 4
    assert LevelReader("true_spans").fallbacks(table, np.random.default_rng(0)) == 2
    with pytest.raises(ConfigError, match="need the character spans"):
        LevelReader("true_spans").fallbacks(table[["caption"]], np.random.default_rng(0))


def test_wrong_arguments_are_refused():
    generator = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="need the character spans"):
        text_levels("a bag", generator, form="true_spans")
    with pytest.raises(ConfigError, match="'attributes', 'clauses' or 'true_spans'"):
        text_levels("a bag", generator, form="words")


def test_every_real_data_set_has_a_form():
    assert LEVEL_FORMS == {"CUHK-PEDES": "attributes", "ICFG-PEDES": "clauses", "RSTPReid": "clauses"}
