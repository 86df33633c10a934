"""Systems by parameters only: what is built, trained, resumed, reopened and evaluated for every method."""

import json
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from formats import write_cuhk, write_icfg
from torchvision.transforms import InterpolationMode
from toy_ivt import NARROW, UNUSED, bert_state, released_state, vit_state

from fmfa.data.datasets import open_dataset
from fmfa.data.images import CLIP_MEAN
from fmfa.errors import AnnotationError, CheckpointError, ConfigError, TrainingError
from fmfa.files import write_json
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtConfig, IvtRetriever
from fmfa.models.weights import load_retriever, save_checkpoint
from fmfa.plots import retrieval as plots_retrieval
from fmfa.pretrain import pretraining_table
from fmfa.records import read_metrics, read_record
from fmfa.simpedes.generate import generate, recipe
from fmfa.simpedes.truth import Truth
from fmfa.study.results import read_results, save_evaluation
from fmfa.study.selection import epochs_table, score_epochs
from fmfa.systems import (
    TINY_BACKBONE,
    TINY_VOCABULARY,
    System,
    build_system,
    evaluate_start,
    load_start,
    load_system,
    load_systems,
    open_test_data,
    open_training_data,
    run_training,
)
from fmfa.text.wordpiece import wordpiece_tokenizer
from fmfa.training.batches import TableBatches, describe_levels, training_table
from fmfa.training.checkpoints import WEIGHTS, epoch_checkpoints, selected_checkpoint
from fmfa.training.config import TrainConfig

SMALL = {"width": 16, "depth": 1, "heads": 2, "patch": 8, "vocab_size": 667, "positions": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("street"), recipe("tiny", train=8, val=4, test=4), progress=False)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def ivt(root, backbone, /, **changes):
    """Two batches of 32 on 8 identities with 8 captions each."""
    values = {"method": "ivt", "root": str(root), "backbone": backbone, "weights": "none", "epochs": 1}
    values |= {"batch_size": 32, "device": "cpu", "tensorboard": False}
    return TrainConfig(**(values | changes))


@pytest.mark.parametrize("method", ["clip", "ivt"])
def test_shipped_weights_are_found_by_their_path_from_any_folder(root, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    shipped = {"clip": "data/tiny_clip.safetensors", "ivt": "data/tiny_ivt_equal.safetensors"}[method]
    config = TrainConfig(method=method, root=str(root), weights=shipped, device="cpu")
    assert build_system(config, open_training_data(config.resolved())).report.loaded
    (tmp_path / "data").mkdir()
    (tmp_path / shipped).write_bytes(b"another file of that name")  # the user's own, nearer
    with pytest.raises(CheckpointError):
        build_system(config, open_training_data(config.resolved()))


def run_of(folder, **config):
    folder.mkdir(parents=True)
    write_json(folder / "config.json", TrainConfig(**config).resolved().to_dict())
    return folder


def held_out(data):
    return set(data.split("val")["identity"])


def test_an_evaluation_takes_the_data_and_the_data_seed_of_its_run(tmp_path):
    write_icfg(tmp_path / "data", identities=(12, 2), file_name="mine.json", pictures=False)
    mine = {"dataset": "My shop", "root": str(tmp_path / "data")}
    zero, one = (run_of(tmp_path / f"run{seed}", data_seed=seed, **mine) for seed in (0, 1))
    expected = {run: held_out(open_dataset(*mine.values(), seed=seed)) for seed, run in enumerate((zero, one))}
    assert expected[zero] != expected[one]
    checkpoint = one / "checkpoints" / "best-1" / "model.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    for source in (zero, one, checkpoint):
        for named in ({}, {"root": mine["root"]}, {"dataset": "My shop"}, mine, {"data_seed": int(source != zero)}):
            data = open_test_data([source], **named)
            assert data.name == "My shop"
            assert held_out(data) == expected[zero if source == zero else one]
    with pytest.raises(ConfigError, match=r"data seeds differ \(1 of .*run1, 0 of data_seed\)"):
        open_test_data([one], **mine, data_seed=0)
    with pytest.raises(ConfigError, match=r"0 of .*run0, 1 of .*run1\).*apart"):
        open_test_data([zero, one], **mine)
    assert held_out(open_test_data([""], **mine, data_seed=1)) == expected[one]
    assert held_out(open_test_data([], **mine)) == expected[zero]
    write_cuhk(tmp_path / "cuhk", pictures=False)
    with pytest.raises(AnnotationError, match="no annotation file of RSTPReid"):
        open_test_data([one], "rstp", tmp_path / "cuhk")


def test_an_evaluation_takes_the_scale_of_its_run_unless_another_is_named(tmp_path, monkeypatch):
    opened = []

    def opens(name, root, *, scale, seed, **others):
        opened.append((name, root, scale, seed))

    monkeypatch.setattr("fmfa.systems.open_dataset", opens)
    run = run_of(tmp_path / "run", dataset="SimPEDES-station", scale="tiny", data_seed=3)
    for named in ({}, {"scale": "standard"}, {"dataset": "simpedes_street"}, {"root": "/r"}):
        open_test_data([run], **named)
    open_test_data([run], data_seed=0)  # nobody of any SimPEDES' test split was trained on
    open_test_data(
        [run, run_of(tmp_path / "other", dataset="SimPEDES-station", scale="tiny", data_seed=4)], data_seed=9
    )
    open_test_data([])
    assert opened == [
        ("SimPEDES-station", "", "tiny", 3),
        ("SimPEDES-station", "", "standard", 3),
        ("SimPEDES-street", "", "tiny", 3),
        ("", "/r", "tiny", 3),
        ("SimPEDES-station", "", "tiny", 0),
        ("SimPEDES-station", "", "tiny", 9),
        ("", "", "small", 0),
    ]


@pytest.mark.parametrize("empty", ["", " . "])
def test_empty_captions_stop_a_training_unless_it_leaves_them_out(backbone, tmp_path, empty):
    file = write_cuhk(tmp_path / "data")
    records = json.loads(file.read_text())
    for position in (0, -1):  # of train and of test
        records[position]["captions"] = [empty, records[position]["captions"][1]]
    file.write_text(json.dumps(records))
    sizes = {"image_height": 96, "image_width": 32, "stride": 8, "batch_size": 8, "text_levels": "off"}
    config = ivt(file.parent, backbone, **sizes)
    with pytest.raises(TrainingError, match=r"empty captions.* -p drop_empty_captions true"):
        run_training(config, tmp_path / "stopped")
    run = run_training(replace(config, drop_empty_captions=True), tmp_path / "run")
    assert read_record(run)["status"] == "finished"
    data = open_test_data([run])
    assert len(data.table) == 2 * len(records) - 2
    assert data.table["caption"].str.contains(r"\w").all()


@pytest.mark.parametrize(
    ("method", "preset", "dataset", "classes"),
    [
        ("fmfa", "released", "CUHK-PEDES", "pairs"),
        ("fmfa", "released", "mine", "pairs"),
        ("fmfa", "paper", "CUHK-PEDES", "identities"),
        ("irra", "released", "CUHK-PEDES", "identities"),
        ("fmfa", "released", "SimPEDES-street", "identities"),
    ],
)
def test_the_released_fmfa_has_a_class_for_each_training_pair(root, tmp_path, method, preset, dataset, classes):
    write_cuhk(tmp_path, file_name="mine.json" if dataset == "mine" else "reid_raw.json")
    folder = str(root if dataset == "SimPEDES-street" else tmp_path)
    small = {"backbone": str(TINY_BACKBONE), "weights": "none", "image_height": 32, "image_width": 16, "stride": 8}
    config = TrainConfig(method=method, preset=preset, dataset=dataset, root=folder, **small).resolved()
    data = open_training_data(config)
    train = data.split("train")
    expected = {"pairs": len(train), "identities": train["identity"].nunique()}
    assert expected["pairs"] > expected["identities"]
    model = build_system(config, data).model
    assert model.classifier.out_features == expected[classes]


@pytest.mark.parametrize(
    ("objectives", "text_levels", "mask"),
    list(product(["", "loss=sdm tau=0.05"], ["off", "released", "spans"], [0.0, 0.2])),
)
def test_ivt_trains_and_is_reopened_by_parameters_only(root, backbone, tmp_path, objectives, text_levels, mask):
    config = ivt(root, backbone, objectives=objectives, text_levels=text_levels, mask_image=mask, mask_text=mask)
    run_training(config, tmp_path)
    values = read_metrics(tmp_path)
    train = values[values["split"] == "train"].set_index("metric")["value"]
    assert values["step"].max() == 2
    assert f"loss/{'sdm' if objectives else 'cmpm'}" in train
    assert np.isfinite(train["loss/total"])
    if not mask:
        assert train["image_tokens_dropped"] == train["text_tokens_dropped"] == 0
    system, data = load_system(tmp_path), open_dataset("SimPEDES-street", root)
    assert system.model.config["mask_image"] == mask
    assert system.model.sizes.tau == (0.05 if objectives else 0.02)
    found = system.evaluate(data, "val", progress=False).metrics["text to image"].summary
    best = values[(values["split"] == "val") & (values["epoch"] == 1)].set_index("metric")["value"]
    assert found["R@1"] == pytest.approx(best["R@1"])
    assert found["mAP"] == pytest.approx(best["mAP"])


def test_an_interrupted_ivt_ends_with_the_same_weights(root, backbone, tmp_path, monkeypatch):
    config = ivt(root, backbone, epochs=2, checkpoint_every=1, learning_rate=0.05)
    run_training(config, tmp_path / "whole")
    calls, forward = [], IvtRetriever.forward

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(IvtRetriever, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt, match="after step 3"):
        run_training(config, tmp_path / "parts")
    monkeypatch.undo()
    run_training(config, tmp_path / "parts")
    states = [load_system(tmp_path / name).model.state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    before = load_start(tmp_path / "parts", open_dataset("SimPEDES-street", root)).model.state_dict()
    assert any(not torch.equal(value, states[1][name]) for name, value in before.items())


def test_the_start_of_several_runs_is_encoded_once(root, backbone, tmp_path, monkeypatch):
    data, encoded = open_dataset("SimPEDES-street", root), []
    plain = System.evaluate
    monkeypatch.setattr(System, "evaluate", lambda *given, **named: encoded.append(given) or plain(*given, **named))
    for name, changes in {"a": {}, "b": {"mask_text": 0.5}, "c": {"seed": 1}, "d": {"image_height": 64}}.items():
        run_training(ivt(root, backbone, epochs=1, **changes), tmp_path / name)
    expected = load_start(tmp_path / "a", data).evaluate(data, "test", seed=3)

    def found(run="a", split="test", data=data):
        before = len(encoded)
        return evaluate_start(tmp_path / run, data, split, seed=3), len(encoded) - before

    for run, times in (("a", 1), ("a", 0), ("b", 0), ("c", 1), ("d", 1), ("a", 0)):  # c has other random weights
        evaluation, took = found(run)
        assert took == times, run
        if run in "ab":
            assert torch.equal(evaluation.text_features, expected.text_features)
            assert torch.equal(evaluation.image_features, expected.image_features)
            pd.testing.assert_frame_equal(evaluation.table(), expected.table())
            pd.testing.assert_frame_equal(evaluation.per_query(), expected.per_query())
    for name, times in (("clip", 1), ("irra", 0)):  # which share their encoders, and have heads of their own
        run_training(TrainConfig(method=name, root=str(root), epochs=0, device="cpu"), tmp_path / name)
        assert found(name)[1] == times
    assert found(split="val")[1] == 1
    files = sorted((tmp_path / ".starts").iterdir())
    assert len(files) == 5
    contents = [file.read_bytes() for file in files]
    for damage in (lambda b: b"", lambda b: b[:-9], lambda b: b"x" + b[1:], lambda b: b[:999] + b"\0\1" + b[1001:]):
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(damage(content))
        assert found()[1] == 1
        assert torch.equal(found()[0].text_features, expected.text_features)
    other = replace(data, table=data.table.assign(caption=data.table["caption"] + " and a hat"))
    assert [found(data=other)[1], found(data=other)[1]] == [1, 0]
    picture = data.images / data.split("test")["image"].iloc[0]
    content = picture.read_bytes()
    picture.write_bytes(content + b" ")
    assert found()[1] == 1
    picture.write_bytes(content)
    assert evaluate_start("/irra.pth", data, "test") is None


def test_a_damaged_run_is_not_opened(root, backbone, tmp_path):
    run_training(ivt(root, backbone), tmp_path)
    path = selected_checkpoint(tmp_path) / WEIGHTS
    good = path.read_bytes()
    for source in (tmp_path, path):
        for place in (len(good) // 2, len(good) - 1):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(
                CheckpointError, match=r"model.safetensors is damaged: its SHA-256 begins with \w+, exp"
            ):
                load_system(source)
        with pytest.raises(CheckpointError, match="is damaged"):
            build_system(ivt(root, backbone, weights=str(path)))
    path.write_bytes(good)
    build_system(ivt(root, backbone, weights=str(path)))
    load_system(tmp_path)
    for content in ("null", "[1]", "[" * 100_000, '{"method": 3}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(TrainingError, match=r"config.json is no run's configuration"):
            load_start(path, open_dataset("SimPEDES-street", root))


def test_epochs_kept_are_scored_on_the_split_that_is_asked_for(root, backbone, tmp_path):
    data = open_dataset("SimPEDES-street", root)
    run = run_training(ivt(root, backbone, epochs=3, learning_rate=0.05, keep_epochs=True), tmp_path / "kept")
    table = score_epochs(run, data, "test")
    assert list(table) == ["epoch", "identity", "queries", "R@1"]
    assert table.groupby("epoch")["queries"].sum().to_dict() == dict.fromkeys((1, 2, 3), len(data.split("test")))
    best = read_record(run)["best_epoch"]
    hits = load_system(run).evaluate(data, "test", progress=False).per_query().groupby("identity")["first_rank"]
    assert (
        table[table["epoch"] == best].set_index("identity")["R@1"].to_dict()
        == hits.apply(lambda ranks: (ranks == 1).sum()).to_dict()
    )
    save_evaluation(load_system(run).evaluate(data, "test"), data, "test", run, tables={"epochs": table})
    assert epochs_table(read_results(tmp_path))["row"].tolist() == ["kept"]
    shutil.rmtree(epoch_checkpoints(run)[2])
    assert score_epochs(run, data, "test").empty  # the best of the epochs that are left is not the best of all


def test_levels_reach_the_batches(root, backbone):
    def batch(**changes):
        config = ivt(root, backbone, recipe="ivt", augmentation="none", **changes).resolved()
        data = open_training_data(config)
        tokenizer = build_system(config, data).tokenizer
        found = next(iter(TableBatches(config, data, tokenizer, masked=False).read(0, 0)))
        texts = [" ".join(tokenizer.decode(ids[ids > 0])[1:]) for ids in found["caption_ids"]]
        return training_table(config, data), found, texts

    _, one, _ = batch(text_levels="off")
    assert len(one["images"]) == 32
    assert (one["labels"].view(8, 4) == one["labels"].view(8, 4)[:, :1]).all()  # P x K: 8 identities, 4 rows each
    table, three, texts = batch(text_levels="spans")
    assert len(three["images"]) == 96
    assert torch.equal(three["labels"], three["labels"][:32].repeat(3))
    tokenizer = wordpiece_tokenizer(TINY_VOCABULARY, 64)
    for position in range(32):
        row = table.iloc[int(three["rows"][position])]
        phrases = {" ".join(tokenizer.decode(tokenizer([row["caption"][a:b]])[0])[1:]) for a, b in row["spans"]}
        assert texts[32 + position] in phrases
        assert all(any(word in phrase for phrase in phrases) for word in texts[position].split(" , "))


def test_spans_are_the_truth_of_the_training_captions(root, backbone):
    data = open_dataset("SimPEDES-street", root)
    config = ivt(root, backbone, text_levels="spans").resolved()
    truth = {
        (record["file_path"], caption["text"]): [phrase["text"] for phrase in caption["phrases"]]
        for record in Truth(root).records("train")
        for caption in record["captions"]
    }
    for row in training_table(config, data).to_dict("records"):
        assert [row["caption"][a:b] for a, b in row["spans"]] == truth[row["image"], row["caption"]]
    assert "spans" not in training_table(ivt(root, backbone).resolved(), data)


def test_spans_need_the_truth(root, backbone):
    data = open_dataset("SimPEDES-street", root)
    config = ivt(root, backbone, text_levels="spans").resolved()
    with pytest.raises(AnnotationError, match=r"no ground truth, only SimPEDES has it.*text_levels 'spans'"):
        training_table(config, replace(data, truth=None))
    changed = data.table.assign(caption=data.table["caption"].where(data.table.index != 3, "Somebody."))
    with pytest.raises(AnnotationError, match=r"truth of train lacks the caption 'Somebody\.'"):
        TableBatches(config, replace(data, table=changed), wordpiece_tokenizer(TINY_VOCABULARY), masked=False)


def test_fallbacks_to_the_whole_caption_are_told(root, backbone):
    data = open_dataset("SimPEDES-street", root)
    table = data.split("train").iloc[:3].assign(caption=["a bag.", "Blue.", "A red coat, blue jeans."])
    data = replace(data, table=table)
    assert "for 4 of 6 word- and" in describe_levels(ivt(root, backbone).resolved(), data)
    off = ivt(root, backbone, text_levels="off").resolved()
    assert describe_levels(off, data) == "text levels: the whole caption alone"


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"piece{n}" for n in range(34)), "coat"]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(PIECES) + "\n")
    return path


def test_a_released_checkpoint_is_a_start_by_parameters(root, words, tmp_path):
    """In the released layout at reduced width, as a file of data-parallel training, at another stride."""
    (tmp_path / "narrow.json").write_text(json.dumps({"width": 24, "heads": 2, "vocab_size": 40, "positions": 20}))
    state = released_state(NARROW)
    content = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "best_acc": np.float64(0.5)}
    torch.save(content, tmp_path / "checkpoint_best.pth", _use_new_zipfile_serialization=False)
    files = {"weights": str(tmp_path / "checkpoint_best.pth"), "vocabulary": str(words)}
    sizes = {"image_height": 384, "image_width": 128, "stride": 16}
    config = ivt(root, str(tmp_path / "narrow.json"), **files, **sizes)
    system = build_system(config, open_dataset("SimPEDES-street", root))
    assert system.model.sizes.grid == (24, 8)
    assert set(system.report.left_out) == UNUSED
    assert set(system.report.resized) == {"encoder_vl.pos_embed", "encoder_vl.type_embed"}
    name = "encoder_vl.blocks.11.mlp_txt.fc2.weight"
    assert torch.equal(system.model.state_dict()[name], state[name])


def test_a_run_keeps_its_vocabulary(root, words, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL | {"vocab_size": 40}))
    config = ivt(root, str(tmp_path / "small.json"), vocabulary=str(words), text_levels="off")
    run_training(config, tmp_path / "run")
    words.unlink()
    reopened = load_system(tmp_path / "run")
    assert reopened.tokenizer.decode(reopened.tokenizer(["coat"])[0]) == ["[CLS]", "coat"]
    weights = next((tmp_path / "run" / "checkpoints").glob("best-*")) / "model.safetensors"
    assert load_system(weights).tokenizer.vocabulary == reopened.tokenizer.vocabulary
    words.write_text("\n".join([*PIECES[:-1], "hat"]) + "\n")
    with pytest.raises(TrainingError, match="vocabulary of another run"):
        run_training(config, tmp_path / "run")


def test_ivt_starts_from_an_own_file_and_from_vit_and_bert(root, backbone, tmp_path):
    data = open_dataset("SimPEDES-street", root)
    donor = IvtRetriever(IvtConfig(**SMALL, image_size=(96, 32), stride=8), seed=5)
    save_checkpoint(tmp_path / "own.safetensors", donor, {"model": donor.config})
    own = build_system(ivt(root, backbone, weights=str(tmp_path / "own.safetensors")), data)
    assert not own.report.missing
    assert all(torch.equal(value, own.model.state_dict()[name]) for name, value in donor.state_dict().items())
    vit, bert = vit_state(16, depth=1, patch=8), bert_state(width=16, layers=1, words=667, positions=64)
    torch.save(vit, tmp_path / "vit.pth")
    torch.save(bert, tmp_path / "bert.pth")
    files = {"weights": str(tmp_path / "vit.pth"), "text_weights": str(tmp_path / "bert.pth")}
    found = build_system(ivt(root, backbone, **files), data)
    state = found.model.state_dict()
    for ours, theirs in (("cls_token", "cls_token"), ("blocks.0.mlp_vis.fc1.bias", "blocks.0.mlp.fc1.bias")):
        assert torch.equal(state[f"encoder_vl.{ours}"], vit[theirs])
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(state[f"encoder_vl.{words}"], bert[words])
    assert found.report.layout == "ViT and BERT"


def test_pictures_are_normalised_as_the_system_expects(root, backbone):
    data = open_dataset("SimPEDES-street", root)
    black = torch.zeros(3, 96, 32, dtype=torch.uint8)
    assert (build_system(ivt(root, backbone), data).transform.finish(black) == -1).all()
    clip = build_system(TrainConfig(method="clip", root=str(root), weights="none"), data)
    assert clip.transform.finish(black)[0, 0, 0] == pytest.approx(-CLIP_MEAN[0] / 0.26862954)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": "efa=1"}, "objectives is 'efa=1', but ivt is trained with one loss"),
        ({"objectives": "tau=0.1"}, "CMPM has no temperature"),
        ({"objectives": "loss=sdm tau=0"}, "tau: should be greater than 0"),
        ({"objectives": "loss=itc"}, "'cmpm' or 'sdm'"),
        ({"backbone": "ViT-B-16"}, "ViT-B-16 cannot be read as JSON"),
        ({"vocabulary": str(TINY_VOCABULARY), "backbone": "other"}, "has 667 pieces, the model 700"),
        ({"backbone": "unknown"}, "unknown.json.*embed_dim: unknown name"),
        ({"method": "fmfa", "backbone": "", "mask_text": 0.2}, "mask_text is 0.2, .* belongs to ivt"),
        ({"method": "clip", "backbone": "", "vocabulary": "a"}, "vocabulary is 'a', .* belongs to ivt"),
    ],
)
def test_what_does_not_fit_is_refused(root, backbone, tmp_path, changes, message):
    (tmp_path / "other.json").write_text(json.dumps(SMALL | {"vocab_size": 700}))
    (tmp_path / "unknown.json").write_text(json.dumps({"embed_dim": 8}))
    if (tmp_path / f"{changes.get('backbone')}.json").is_file():
        changes = changes | {"backbone": str(tmp_path / f"{changes['backbone']}.json")}
    with pytest.raises(ConfigError, match=message):
        build_system(ivt(root, backbone, **changes), open_dataset("SimPEDES-street", root))


def test_names_that_are_no_files_name_the_local_alternative(root, backbone, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: 1 / 0)
    data = open_dataset("SimPEDES-street", root)
    with pytest.raises(CheckpointError, match=r"openai: no such file; expected a local weight file"):
        build_system(ivt(root, backbone, weights="openai"), data)
    with pytest.raises(CheckpointError, match=r"timm; without a network, give the path"):
        build_system(ivt(root, backbone, weights=""), data)


def test_a_run_without_a_later_setting_can_go_on(root, backbone, tmp_path):
    config = ivt(root, backbone)
    run_training(config, tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    for name in ("recipe", "text_weights", "vocabulary"):
        del kept[name]
    (tmp_path / "config.json").write_text(json.dumps(kept))
    run_training(config, tmp_path)
    with pytest.raises(TrainingError, match="batch_size 32 there, 16 now"):
        run_training(replace(config, batch_size=16), tmp_path)


def test_a_record_of_neither_model_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"model": {"layers": 3}})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: its record does not describe its weights"):
        load_retriever(tmp_path / "a.safetensors")


def test_the_start_of_a_checkpoint_outside_a_run_is_not_known(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
    assert load_start(tmp_path / "a.safetensors", None) is None


NARROW_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 740, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def released(tmp_path):
    """A two-stream model in IRRA's layout, as a wrapped training left it, and the file of its backbone."""
    model = ClipRetriever(NARROW_CLIP, image_size=(72, 24), seed=5)
    state = {f"module.base_{name.replace('clip', 'model', 1)}": value for name, value in model.state_dict().items()}
    torch.save({"model": state | {"module.classifier.weight": torch.ones(3, 16)}, "epoch": 60}, tmp_path / "irra.pth")
    (tmp_path / "narrow.json").write_text(json.dumps(NARROW_CLIP))
    return model, tmp_path / "irra.pth", {"backbone": str(tmp_path / "narrow.json"), "dataset": "SimPEDES-street"}


def test_a_file_of_another_code_is_evaluated_without_a_training(root, released):
    model, path, about = released
    system = load_system(path, image_height=72, image_width=24, stride=8, **about)
    assert not system.model.training
    assert system.report.left_out == ("classifier.weight",)
    assert all(torch.equal(value, system.model.state_dict()[name]) for name, value in model.state_dict().items())
    data = open_dataset("SimPEDES-street", root)
    found = system.evaluate(data, "test", progress=False).metrics["text to image"].summary
    assert found == system.evaluate(data, "test", progress=False).metrics["text to image"].summary
    resized = load_system(path, **about)  # by the sizes of SimPEDES
    assert resized.model.clip.visual.grid_size == (12, 4)
    assert "27 positions, grid 9 x 3 to 12 x 4, bilinear" in str(resized.report)
    with pytest.raises(CheckpointError, match="position_grid is 3 x 3"):
        load_system(path, position_grid="3x3", **about)
    with pytest.raises(CheckpointError, match=r"irra\.pth: none of its 39 tensors"):
        load_system(path)  # the tiny backbone of SimPEDES
    with pytest.raises(ConfigError, match=r"'backbon"):
        load_system(path, backbon="ViT-B-16")


def test_tbps_clip_reads_pictures_as_in_its_training(released, tmp_path):
    model, _, about = released
    state = {
        name.replace("clip.", "" if name.startswith(("clip.visual", "clip.logit")) else "encode_text.", 1): value
        for name, value in model.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "checkpoint_best.pth")
    transform = load_system(tmp_path / "checkpoint_best.pth", **about).transform
    grey = torch.full((3, 96, 32), 124, dtype=torch.uint8)  # 124 / 255 is ImageNet's mean of red
    torch.testing.assert_close(transform.finish(grey)[0, 0, 0], torch.tensor((124 / 255 - 0.485) / 0.229))
    assert transform.interpolation == InterpolationMode.BICUBIC


def test_a_released_ivt_is_evaluated_without_a_training(root, words, tmp_path):
    (tmp_path / "narrow.json").write_text(json.dumps({"width": 24, "heads": 2, "vocab_size": 40, "positions": 20}))
    state = released_state(NARROW)
    torch.save({"state_dict": state}, tmp_path / "checkpoint_best.pth")
    about = {"backbone": str(tmp_path / "narrow.json"), "vocabulary": str(words), "dataset": "CUHK-PEDES"}
    system = load_system(tmp_path / "checkpoint_best.pth", **about)
    assert isinstance(system.model, IvtRetriever)
    assert set(system.report.left_out) == UNUSED
    assert not system.report.resized  # 384 x 128 at stride 12
    assert "coat" in system.tokenizer.decode(system.tokenizer(["coat"])[0])
    assert len(system.evaluate(open_dataset("SimPEDES-street", root), "test", progress=False).rows)


def test_weights_that_open_clip_knows_are_named_with_their_model(monkeypatch):
    def offline(*_, **__):
        raise OSError("network unreachable")

    monkeypatch.setattr("fmfa.models.weights.download_pretrained", offline)
    with pytest.raises(CheckpointError, match=r"'openai' of 'ViT-B-32-quickgelu' cannot be fetched.*unreachable"):
        load_system("/home/me/ViT-B-32-quickgelu/openai", dataset="CUHK-PEDES")  # as a notebook takes it
    for name in ("ViT-B-1666/openai", "runs/nothing", "irra.pth"):
        with pytest.raises(CheckpointError, match=f"{name}: no such file or folder.*such as ViT-B-16-quickgelu/openai"):
            load_system(name)


def test_a_run_knows_its_model(tmp_path, released):
    own = "data/tiny_clip.safetensors"
    with pytest.raises(ConfigError, match=r"tiny_clip.safetensors knows its own model: leave out stride"):
        load_system(own, dataset="CUHK-PEDES", stride=8)
    _, path, about = released
    (tmp_path / "other").mkdir()
    shutil.copy(path, tmp_path / "other" / "irra.pth")
    again = str(tmp_path / "other" / "irra.pth")
    systems = load_systems([own, str(path), again], **about)
    assert list(systems) == ["tiny_clip", str(path), again]
    assert [system.report is None for system in systems.values()] == [True, False, False]
    with pytest.raises(ConfigError, match="leave out backbone"):
        load_systems([own], **about)


def test_no_epochs_evaluate_the_starting_weights(root, backbone, tmp_path, capsys):
    config = ivt(root, backbone, epochs=0, keep_epochs=True)
    run = run_training(config, tmp_path / "run")
    data, record = open_dataset("SimPEDES-street", root), read_record(run)
    assert (record["status"], record["steps"], record["best_epoch"]) == ("finished", 0, 0)
    values = read_metrics(run)
    assert set(values["split"]) == {"val"}
    found = load_system(run).evaluate(data, "val", progress=False).metrics["text to image"].summary
    assert found["R@1"] == pytest.approx(record["best"])
    start = build_system(config, data).model.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in load_system(run).model.state_dict().items())
    assert run_training(config, run) == run
    assert not plots_retrieval.plot_training(run).axes[0].get_title().startswith("loss")
    with pytest.raises(TrainingError, match="epochs 0 there, 1 now"):
        run_training(replace(config, epochs=1), run)


@pytest.mark.parametrize(
    ("weights", "said"), [("none", "random starting weights"), ("", "tiny_clip.safetensors (fmfa")]
)
def test_where_the_weights_come_from_is_printed_and_kept(root, tmp_path, capsys, weights, said):
    config = TrainConfig(method="clip", root=str(root), weights=weights, epochs=0, device="cpu", tensorboard=False)
    run_training(config, tmp_path)
    kept = (tmp_path / "weights.txt").read_text()
    assert said in kept
    assert kept in capsys.readouterr().out


def test_a_file_directly_below_the_root_lies_in_no_run(monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: path.name == "irra.pth")
    assert load_start("/irra.pth", None) is None


def test_the_pretraining_table_reads_the_records(tmp_path, monkeypatch):
    end = {"pairs": 2_000_000, "held_out_R@1": 0.123}
    budget = {"parameters": 1500, "retrieval_parameters": 1200, "training_flops_a_pair": 450_000_000}
    full = {"curve": [{"pairs": 1}, end], "seconds": 120.0, "device": "cpu", "budget": budget}
    (tmp_path / "tiny_b.json").write_text(json.dumps(full))
    (tmp_path / "tiny_a.json").write_text(json.dumps({key: full[key] for key in full if key != "budget"}))
    (tmp_path / "tiny_a_config.json").write_text(json.dumps({"width": 8}))
    counted = {"clip": {"parameters": 790, "retrieval_parameters": 790, "training_flops_a_pair": 170_000_000}}
    monkeypatch.setattr("fmfa.pretrain.pretraining_budget", counted.get)
    monkeypatch.setattr("fmfa.pretrain.DATA", tmp_path)
    table = pretraining_table()
    assert list(table.index) == ["tiny_a", "tiny_b"]
    assert list(table.loc["tiny_b"]) == ["2,000,000", "1,500", "1,200", "450", "900", "2 on cpu", "12.3"]
    assert list(table.loc["tiny_a"])[:5] == ["2,000,000", "790", "790", "170", "340"]
