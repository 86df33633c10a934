import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formats import CAPTIONS, write_pair_list

from fmfa import pretrain as command
from fmfa.errors import ConfigError
from fmfa.models.clip import ClipRetriever
from fmfa.models.interfaces import ModelOutput
from fmfa.models.ivt import IvtRetriever
from fmfa.pretrain import pretrain, pretraining_budget
from fmfa.pretraining import loop, pairs
from fmfa.pretraining.loop import warmup_cosine_rate
from fmfa.pretraining.methods import DATA, METHODS, WORDPIECE, ClipPixels
from fmfa.simpedes.stream import web_pair
from fmfa.text.tokens import SMALL_VOCABULARY, small_tokenizer, train_small_vocabulary
from fmfa.text.wordpiece import train_wordpiece_vocabulary, wordpiece_tokenizer
from fmfa.training.budget import training_budget, training_flops
from fmfa.weights.own import read_checkpoint

MODELS = {"clip": ClipRetriever, "ivt": IvtRetriever}
SOURCES = [(method, source) for method in METHODS for source in ("stream", "list")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A list of pairs, and a model of each method small enough for a few steps."""
    monkeypatch.setattr(pairs, "HELD_OUT", 6)
    write_pair_list(tmp_path)
    train_wordpiece_vocabulary([c.lower() for c in CAPTIONS], 60, tmp_path / "ivt.txt")
    train_small_vocabulary(CAPTIONS, 280, tmp_path / "clip.txt")
    sizes = {"width": 16, "depth": 1, "heads": 2, "image_size": [32, 16], "patch": 8, "stride": 8, "positions": 24}
    sizes["vocab_size"] = wordpiece_tokenizer(tmp_path / "ivt.txt").vocab_size
    (tmp_path / "ivt.json").write_text(json.dumps(sizes))
    tower = {"width": 16, "layers": 1}
    vision = {**tower, "image_size": [32, 16], "patch_size": 8, "head_width": 8}
    text = {**tower, "heads": 2, "context_length": 24}
    text["vocab_size"] = small_tokenizer(tmp_path / "clip.txt").vocab_size
    (tmp_path / "clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return tmp_path


def options(folder, method, source="stream", **changes):
    files = {"config": folder / f"{method}.json", "vocabulary": folder / f"{method}.txt"}
    listed = {"list": str(folder / "pairs.json"), "images": str(folder)} if source == "list" else {}
    return {**files, **listed, "method": method, "pairs": 9, "batch_size": 3, "workers": 0} | changes


def given_settings(folder, method):
    return command._settings({**pretrain.__kwdefaults__, **options(folder, method)})


def without_seconds(curve):
    return [{name: value for name, value in point.items() if name != "seconds"} for point in curve]


def equal(first, second):
    (state, record), (again, other) = (read_checkpoint(path) for path in (first, second))
    assert without_seconds(record["curve"]) == without_seconds(other["curve"])
    return state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


def interrupt(monkeypatch, out, given, steps=2):
    """Pre-train until Ctrl-C after some steps."""
    step, seen = loop.train_step, []

    def interrupted(*arguments):
        if len(seen) == steps:
            raise KeyboardInterrupt
        seen.append(arguments)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(out, **given)


@pytest.mark.parametrize(("method", "source"), SOURCES)
def test_an_interrupted_pre_training_goes_on_exactly(folder, monkeypatch, method, source):
    whole, part = folder / "whole.safetensors", folder / "part.safetensors"
    given = options(folder, method, source)
    pretrain(whole, **given)
    interrupt(monkeypatch, part, given)
    torch.rand(7)  # the default generator stands elsewhere
    assert (folder / "part.resume").exists()
    record = pretrain(part, **given | {"workers": 1})  # which changes no number
    assert [point["pairs"] for point in record["curve"]] == [3, 6, 9]
    assert not (folder / "part.resume").exists()
    assert equal(whole, part)


def test_a_killed_command_goes_on_exactly(folder, capsys):
    given = options(folder, "ivt", "list", pairs=300)
    named = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    line = [sys.executable, "-m", "fmfa.pretrain", str(folder / "killed.safetensors"), *named]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert "training_flops_a_pair" in process.stdout.readline()
        first = json.loads(process.stdout.readline())
        process.kill()
    assert first["pairs"] < 300
    assert (folder / "killed.resume").exists()
    assert not (folder / "killed.safetensors").exists()
    pretrain(folder / "whole.safetensors", **given)
    capsys.readouterr()
    pretrain(folder / "killed.safetensors", **given)
    assert json.loads(capsys.readouterr().out.splitlines()[1])["pairs"] > first["pairs"]  # not from the start
    assert equal(folder / "whole.safetensors", folder / "killed.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_the_retrievers_and_were_trained(folder, method):
    record = pretrain(folder / "out.safetensors", **options(folder, method))
    state, kept = read_checkpoint(folder / "out.safetensors")
    assert kept == json.loads((folder / "out.json").read_text()) == json.loads(json.dumps(record))
    model = MODELS[method].from_config(record["model"])
    model.load_state_dict(state)
    start = METHODS[method](given_settings(folder, method)).model.state_dict()
    changed = {name for name in state if not torch.equal(state[name], start[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(changed & trained) > 0.9 * len(trained)
    assert record["budget"]["retrieval_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (record["budget"]["parameters"] > record["budget"]["retrieval_parameters"]) == (method == "ivt")
    assert set(record["curve"][-1]["losses"]) == ({"itc"} if method == "clip" else {"itc", "itm", "mlm"})


def test_what_does_not_fit_is_refused(folder):
    for method, changes, message in (
        ("ivt", {"vocabulary": WORDPIECE}, "pieces, the configuration vocab_size"),
        ("clip", {"vocabulary": SMALL_VOCABULARY}, "pieces, the configuration vocab_size"),
        ("clip", {"images": "/pictures"}, "go together"),
        ("ivt", {"list": str(folder / "pairs.json")}, "go together"),
        ("clip", {"pairs": 2}, "fewer pairs than one batch"),
        ("clip", {"fusion_depth": 3}, "method clip has no fusion_depth"),
        ("ivt", {"tau": 0.1}, "method ivt has no tau"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain(folder / "out.safetensors", **options(folder, method, **changes))
    with pytest.raises(ConfigError, match="expected one of clip, ivt"):
        pretrain(folder / "out.safetensors", **options(folder, "clip") | {"method": "bert"})


def test_a_resume_file_of_other_settings_is_kept_and_refused(folder, monkeypatch):
    interrupt(monkeypatch, folder / "out.safetensors", options(folder, "clip"))
    for method, changes, named in (("clip", {"seed": 1}, "seed"), ("ivt", {}, "method")):
        with pytest.raises(ConfigError, match=named):
            pretrain(folder / "out.safetensors", **options(folder, method, **changes))
    assert (folder / "out.resume").exists()


def test_the_command_is_recorded_so_that_it_repeats_the_run(folder):
    out = Path("anywhere/tiny.safetensors")
    defaults = pretrain.__kwdefaults__
    assert command._command(out, {**defaults, "pairs": 250_000}) == (
        "python -m fmfa.pretrain data/tiny.safetensors --pairs 250000 --seed 0"
    )
    assert command._command(out, {**defaults, "method": "ivt", "batch_size": 64}) == (
        "python -m fmfa.pretrain data/tiny.safetensors --method ivt --pairs 250000 --seed 0 --batch-size 64"
    )


def test_the_stream_of_both_methods_is_the_same_pairs(folder):
    seen = {}
    for method, parts in ((method, METHODS[method](given_settings(folder, method))) for method in METHODS):
        training, held_out = pairs.pairs_to_see(parts, seed=3, count=20)
        sample = training(first=17, count=3)[1]
        image, text = web_pair(3, 18, (32, 16))
        assert torch.equal(sample["images"], parts.plain(torch.from_numpy(image).permute(2, 0, 1)))
        assert "".join(parts.captions.tokenizer.decode(sample["caption_ids"])).replace("#", "").find(text[:3].lower())
        assert sample["labels"] == 18
        seen[method] = len(held_out["images"])
    assert seen == {"clip": 6, "ivt": 6}


def test_clips_pixels_are_divided_as_when_the_shipped_weights_were_made():
    picture = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = torch.stack([(picture[i].float() / 255 - mean[i]) / std[i] for i in range(3)])
    assert torch.equal(ClipPixels()(picture), expected)


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero():
    assert warmup_cosine_rate(0.0, 0.1) == pytest.approx(0.01)
    assert warmup_cosine_rate(0.05, 0.1) == pytest.approx(0.51)
    assert warmup_cosine_rate(0.1, 0.1) == 1
    assert warmup_cosine_rate(0.55, 0.1) == pytest.approx(0.5)
    assert warmup_cosine_rate(1.0, 0.1) == pytest.approx(0)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(7, 5), torch.nn.Linear(5, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, batch):
        return ModelOutput(losses={"loss": self.head(self.layer(batch["images"])).sum()})


def test_operations_and_parameters_of_linear_layers_are_counted():
    model = Plain()
    # Forward, the gradient of the weights, and that of the features between the layers; the images need none.
    expected = 2 * (2 * 7 * 5 + 3 * 5 * 2)
    batch = {"images": torch.ones(4, 7)}
    assert training_flops(model, batch) == expected
    assert all(p.grad is None for p in model.parameters())
    assert training_budget(model, batch, "layer.") == {
        "parameters": 40 + 10,
        "retrieval_parameters": 40,
        "training_flops_a_pair": expected,
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_shipped_configurations_fit_their_vocabularies(method):
    parts = METHODS[method](command._settings({**pretrain.__kwdefaults__, "method": method}))
    tokenizer = parts.captions.tokenizer
    text = "The woman, 25, wears a zebra-striped (XL) coat & carries 2 bags @ 10 o'clock!"
    unknown = tokenizer.decode([1])[0]
    if method == "ivt":
        assert unknown not in tokenizer.decode(tokenizer([text])[0])
    positions = parts.model.encoder_vl.pos_embed if method == "ivt" else parts.model.clip.visual.positional_embedding
    assert positions.std().item() == pytest.approx(0.4, rel=0.05)
    assert 4 * sum(tensor.numel() for tensor in parts.weights.values()) < 10e6


@pytest.mark.parametrize("method", METHODS)
def test_the_shipped_weights_have_their_record_and_budget(method):
    path = DATA / f"tiny_{method}.safetensors"
    if not path.exists():
        pytest.skip(f"{path.name} is not made yet")
    assert path.stat().st_size < 10e6
    state, record = read_checkpoint(path)
    assert record == json.loads(path.with_suffix(".json").read_text())
    assert f"fmfa.pretrain data/{path.name}" in record["command"]
    assert record["curve"][-1]["pairs"] <= record["settings"]["pairs"]
    model = MODELS[method].from_config(record["model"])
    model.load_state_dict(state)
    if method == "ivt":
        assert record["budget"] == pretraining_budget("ivt")
        assert record["budget"]["retrieval_parameters"] == sum(p.numel() for p in model.parameters())
