import json

import numpy as np
import pytest
import torch

from fmfa import benchmark
from fmfa.benchmark import curves, evaluation, main, side_by_side, training, ways

SMALL = {"batch_size": 4}


def test_ranking_and_sorting_everything_find_the_same():
    found = [evaluation(50, 70, 16, sorts=sorts) for sorts in (False, True)]
    assert found[0]["R@1"] == found[1]["R@1"] > 0
    assert found[0]["mAP"] == pytest.approx(found[1]["mAP"], rel=1e-5)


def test_captions_get_the_number_of_words_that_is_asked_for(tiny):
    lengths = []
    for words in (3, 30):
        _, model, batches = training("clip", words=words, root=str(tiny.images.parent), **SMALL)
        batch = next(iter(batches.read(0, 0)))
        lengths.append(int(model.longest_caption(batch["caption_ids"])))
        assert {len(caption.split()) for caption in batches.table["caption"]} == {words}
    assert lengths[0] < lengths[1]


def test_curves_know_their_exponents(monkeypatch):
    assert benchmark._curve("a", "b", [1, 2, 4], [3, 12, 48])["exponent"] == pytest.approx(2)
    monkeypatch.setattr(benchmark, "METHODS", ("clip",))
    monkeypatch.setattr(benchmark, "_step_seconds", lambda *given, batch_size, words=1, **size: batch_size * words)
    found = curves(repeats=1, sizes=2)
    assert [round(curve["exponent"], 6) for curve in found[:3]] == [1, 1, 0]
    kinds = ["pairs in a batch", "words in a caption", "pixels of a picture", *["pictures in a gallery"] * 2]
    assert [curve["over"] for curve in found] == kinds
    assert all(np.isfinite(curve["exponent"]) for curve in found)
    assert len(benchmark.plot_curves(found).axes) == 4


@pytest.mark.parametrize("method", ["irra", "ivt"])
def test_the_ways_to_train_are_measured_on_any_device(tiny, method, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    rows = list(ways(method, 1, batches=(4, 8) if method == "irra" else (4,), workers=0, root=str(tiny.images.parent)))
    kinds = [(4, True, False), (4, False, False), (8, True, False), (4, True, True)][: 4 if method == "irra" else 2]
    assert [(row["batch"], row["deterministic"], row["compile"]) for row in rows] == kinds
    assert len(compiled) == (method == "irra")
    assert all(row["seconds"] > 0 and row["loading"] > 0 and 0 < row["utilisation"] < 2 for row in rows)


def test_several_models_train_side_by_side(tiny):
    assert side_by_side(2, "cpu", 0.5, root=str(tiny.images.parent), **SMALL) > 0


def test_what_is_measured_in_time_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "side_by_side", lambda count, *given, **named: float(count))
    main(["--ways", "--minutes", "0", "--batch", "4", "--repeats", "1", "--to", str(tmp_path / "a" / "b")])
    kept = json.loads((tmp_path / "a" / "b" / "benchmark.json").read_text())
    assert kept["ways"] == []
    assert kept["side_by_side"] == {"1": 1.0, "2": 2.0}
    assert "--ways --minutes 0" in kept["command"]
    assert capsys.readouterr().out.count("no time was left") == 4
