import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from formats import write_cuhk, write_icfg
from huggingface_hub import parse_eval_result_entries

from fmfa.compare import main as compare
from fmfa.data.annotations import read_dataset
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, gallery_of
from fmfa.evaluation.features import caption_ids
from fmfa.evaluation.score_record import read_record
from fmfa.score import call_system, main
from fmfa.study.results import save_evaluation
from fmfa.systems import load_system

ROOT = Path(__file__).parents[1]
CALLABLE = """
import torch
from torchvision.transforms.functional import resize, pil_to_tensor

def load(checkpoint, device):
    scale = float(checkpoint or 1)
    def encode_image(pictures):
        return scale * pictures.float().mean((2, 3))
    def encode_text(ids):
        return ids.float()
    def preprocess(picture):
        return pil_to_tensor(resize(picture, [8, 4]))
    def tokenize(captions):
        return torch.tensor([[sum(map(ord, c)) % 251, len(c), c.count("a")] for c in captions])
    return encode_image, encode_text, preprocess, tokenize

def fewer(checkpoint, device):
    return 1, 2

def fails(checkpoint, device):
    _, encode_text, preprocess, tokenize = load(checkpoint, device)
    return lambda pictures: pictures.mean(), encode_text, preprocess, tokenize

def wrong(checkpoint, device):
    _, encode_text, preprocess, tokenize = load(checkpoint, device)
    return lambda pictures: pictures.float().mean((0, 2, 3)), encode_text, preprocess, tokenize

def nan(checkpoint, device):
    encode_image, _, preprocess, tokenize = load(checkpoint, device)
    return encode_image, lambda ids: ids.float() / 0, preprocess, tokenize

def sizes(checkpoint, device):
    encode_image, encode_text, _, tokenize = load(checkpoint, device)
    numbers = iter(range(4, 400))
    return encode_image, encode_text, lambda picture: torch.zeros(3, next(numbers), 4), tokenize

def text(checkpoint, device):
    encode_image, encode_text, preprocess, _ = load(checkpoint, device)
    return encode_image, encode_text, preprocess, list
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a data set and a features file of it, as working folder."""
    monkeypatch.chdir(tmp_path)
    write_cuhk(tmp_path / "data", (2, 0, 8), images_each=2)
    rows = read_dataset(tmp_path / "data").split("test")
    gallery, draw = gallery_of(rows), np.random.default_rng(0)
    people = draw.normal(size=(20, 6))
    features = {
        "query": people[rows["identity"]] + draw.normal(size=(len(rows), 6)),
        "gallery": people[gallery["identity"]] + draw.normal(size=(len(gallery), 6)),
    }
    np.savez("mine.npz", **features, query_ids=caption_ids(rows).to_numpy(str),
             gallery_ids=gallery["image"].to_numpy(str))  # fmt: skip
    return tmp_path


def score(*arguments, root="data"):
    return main([*map(str, arguments), "--root", str(root)])


def test_a_features_file_is_scored_into_a_table_a_record_trec_files_and_yaml(place, capsys):
    assert (
        score("mine.npz", "--trec", "t", "--eval-results", "r.yaml", "--hub", "lab/people:r1", "--selected", "val") == 0
    )
    out = capsys.readouterr().out
    record = read_record("mine.record")
    means = record.queries.by_identity().drop(columns="identity").sum()
    r1 = 100 * means["R@1"] / means["queries"]
    assert f"mine text to image {r1:.1f} [" in out
    assert "mine image to text" in out
    assert "chance text to image" in out
    assert f"split {record.split.fingerprint[:12]}, cost: dot products, selected on: val" in out
    assert (record.system, record.seed, record.selected, record.cost.dimension) == ("mine", 0, "val", 6)
    entry = parse_eval_result_entries(yaml.safe_load((place / "r.yaml").read_text()))[0]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("lab/people", "r1", pytest.approx(r1, abs=0.0051))
    assert "dot products; selected on: val" in entry.notes
    # what went out comes in again, with the data set and with its judgements in place of it
    assert score("t.run", "--name", "again") == 0
    assert main(["t.run", "--qrels", "t.qrels", "--to", "q.record"]) == 0
    again = read_record("again.record")
    assert (again.queries, again.split) == (record.queries, record.split)
    assert sorted(read_record("q.record").queries.first_rank) == sorted(record.queries.first_rank)
    assert main(["mine.npz", "--qrels", "t.qrels", "--to", "m.record"]) == 0
    assert read_record("m.record").queries == read_record("q.record").queries


def test_reranked_scores_change_ranks_and_cost(place, capsys):
    assert score("mine.npz") == 0
    rows = read_dataset("data").split("test")
    best = pd.DataFrame({"query": caption_ids(rows), "item": rows["image"], "score": 1.0})
    best.to_csv("scores.csv", index=False)
    assert score("mine.npz", "--scores", "scores.csv", "--name", "ranked", "--model-calls", 9) == 0
    record = read_record("ranked.record")
    assert set(record.queries.first_rank) == {1}
    assert str(record.cost) == "re-ranks 1, 9 model calls"
    assert "image to text" not in capsys.readouterr().out.split("ranked", 1)[1]


def test_a_callable_is_a_system(place, capsys):
    (place / "my_system_of_a_test.py").write_text(CALLABLE)
    assert score("my_system_of_a_test:load", "--checkpoint", "2", "--device", "cpu") == 0
    record = read_record("my_system_of_a_test-load.record")
    rows = read_dataset("data").split("test")
    system = call_system("my_system_of_a_test:load", "3")
    metrics = system.evaluate(read_dataset("data"), "test", progress=False).metrics[TEXT_TO_IMAGE]
    assert sorted(record.queries.first_rank) == sorted(metrics.first_rank)
    assert record.split.captions == len(rows)
    assert record.cost.caption_operations is None  # it multiplies no matrices that could be counted
    for name, message in (
        ("fewer", "gave no system (ValueError"),
        ("none", "gave no system (AttributeError"),
        ("fails", "encode_image failed (RuntimeError: "),
        ("wrong", "encode_image returned shape (3,) for 16 items"),
        ("nan", "encode_text returned NaN or infinity"),
        ("sizes", "preprocess returned the shapes "),
        ("text", "tokenize returned list; expected a tensor"),
    ):
        assert score(f"my_system_of_a_test:{name}") == 2
        assert message in capsys.readouterr().err
    assert score("no_such_module_here:load") == 2
    assert "ModuleNotFoundError" in capsys.readouterr().err
    del sys.modules["my_system_of_a_test"]


def test_a_model_is_scored_as_the_notebook_scores_it(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.chdir(tmp_path)
    assert score("", "--name", "shipped", "--device", "cpu", root=tiny.images.parent) == 0
    evaluation = load_system().evaluate(tiny, "test", progress=False)
    record = read_record("shipped.record")
    means = record.queries.by_identity().sum()
    assert means["R@1"] / means["queries"] == pytest.approx(evaluation.metrics[TEXT_TO_IMAGE].summary["R@1"])
    assert record.cost.dimension == evaluation.image_features.shape[1]
    for each in (record.cost.caption_operations, record.cost.picture_operations):
        assert 10**6 < each < 10**8
    assert "ceiling of the captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.npz", "--branch", "tse"], "--branch tse: expected NAME=WEIGHT"),
        (["mine.npz", "--eval-results", "x.yaml"], "--eval-results needs --hub"),
        (["mine.npz", "--eval-results", "x.yaml", "--hub", "people"], "--eval-results needs --hub ORGANISATION/NAME"),
        (["mine.npz", "--trec", "x", "--trec-depth", "-1"], "--trec-depth is -1; expected"),
        (["mine.npz", "--model-calls", "-1"], "model_calls: should be greater than or equal to 0"),
        (["mine.npz", "--to", "no/such/folder.record"], "cannot be written"),
        (["mine.npz", "--trec", "no/such/folder"], "cannot be written"),
        (["mine.npz", "--split", "dev"], "has no split 'dev'"),
        (["other.npz"], "other.npz: no such file"),
        (["other.run"], "other.run cannot be read"),
        (["other.pth"], "other.pth: no such file"),
        (["mine.npz", "--root", "nowhere"], "nowhere"),
        (["mine.npz", "--scores", "nothing.csv"], "nothing.csv cannot be read"),
        (["", "--qrels", "nothing"], "nothing cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(place, capsys, arguments, message):
    assert main(["--root", "data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_features_of_another_data_set_are_refused(place, capsys):
    write_icfg(place / "icfg", (2, 8))
    assert score("mine.npz", root="icfg") == 2
    assert "ids are unknown in this split, first " in capsys.readouterr().err


def test_the_page_can_be_followed_by_a_new_user(tmp_path, monkeypatch, capsys, tiny):
    """Its script and its three commands, as they are in data/score.md, with the data set where it is here."""
    page = (ROOT / "data" / "score.md").read_text()
    script = re.search("```python\n(.*?)```", page, re.S)[1]
    commands = re.search("```\n\n```\n(python -m fmfa.score colours.*?)```", page, re.S)[1].splitlines()
    assert len(script.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    here = f'root="{tiny.images.parent.as_posix()}"'
    exec(compile(script.replace('scale="tiny"', here), "score.md", "exec"), {})
    for command in commands:
        module, *words = shlex.split(command.replace("--scale tiny", here.replace("root=", "--root "))
                                     .removeprefix("python -m fmfa."))  # fmt: skip
        words = [str(ROOT / word) if word.startswith("data/") else word for word in words]
        assert {"score": main, "compare": compare}[module](words) == 0
    out = capsys.readouterr().out
    assert "tiny_irra is better" in out
    ranking = pd.read_csv("ranking.csv").set_index("system")
    assert ranking["rank"].to_dict() == {"tiny_irra": 1, "colours": 2}
    assert ranking.loc["colours", "R@1"] > 5  # chance: 4.2


@pytest.mark.parametrize(
    ("prefixes", "layout", "heads"),
    [
        (
            ("base_model.", "base_model."),
            "IRRA",
            ["cross_attn.in_proj_bias", "classifier.weight", "mlm_head.fc.bias"],
        ),
        (("", "encode_text."), "TBPS-CLIP", ["simclr_mlp.0.weight", "classifier.weight", "mlm_head.fc.bias"]),
    ],
)
def test_weight_files_of_other_codebases_are_scored(tmp_path, monkeypatch, capsys, tiny, prefixes, layout, heads):
    """Files with the names and the heads of the released ones, in which only the encoders are of use to a search."""
    monkeypatch.chdir(tmp_path)
    shipped = load_system()
    state = {name.removeprefix("clip."): value for name, value in shipped.model.state_dict().items()}
    state = {prefixes[not name.startswith(("visual.", "logit"))] + name: value for name, value in state.items()}
    state |= {name: torch.ones(7) for name in heads}
    torch.save({"model": state, "epoch": 60}, "best.pth")
    Path("backbone.json").write_text(json.dumps(shipped.model.config["backbone"]))
    about = "--backbone backbone.json --image-height 96 --image-width 32 --stride 8 --device cpu"
    assert score("best.pth", *about.split(), root=tiny.images.parent) == 0
    out = capsys.readouterr().out
    assert f"best.pth ({layout} layout)" in out
    assert "3 left out" in out
    first_ranks = shipped.evaluate(tiny, "test", progress=False).metrics[TEXT_TO_IMAGE].first_rank
    same = sorted(read_record("best.record").queries.first_rank) == sorted(first_ranks)
    assert same == (layout == "IRRA")  # TBPS-CLIP reads pictures in another way


def test_runs_of_the_study_are_records_of_what_they_were_tested_on(tmp_path, monkeypatch, tiny):
    """Runs that were trained on other people each, and evaluated on the same ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fmfa.data.datasets.DATA", tmp_path / "data")
    (tmp_path / "data" / "simpedes").mkdir(parents=True)
    (tmp_path / "data" / "simpedes" / "street-tiny-0").symlink_to(tiny.images.parent)
    evaluation = load_system().evaluate(tiny, "test", progress=False)
    for seed in (0, 1):
        run = tmp_path / "runs" / f"clip-{seed}"
        run.mkdir(parents=True)
        config = {"dataset": "SimPEDES-street", "scale": "small", "data_seed": seed + 5, "root": ""}
        (run / "run.json").write_text(json.dumps({"config": config, "seed": seed, "status": "finished"}))
        save_evaluation(evaluation, tiny, "test", run)
    assert main(["runs", "--to", "records", "--scale", "tiny", "--data-seed", "0"]) == 0
    for seed in (0, 1):
        record, own = read_record(f"records/clip-{seed}.record"), read_record(f"runs/clip-{seed}/queries-test.record")
        assert (record.system, record.seed, record.split) == ("clip", seed, own.split)
        pd.testing.assert_frame_equal(record.queries.by_identity(), own.queries.by_identity(), atol=1e-4)
