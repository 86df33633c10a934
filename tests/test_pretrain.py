import errno
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from formats import CAPTIONS, write_pair_list, write_wordpiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmfa import pretrain as command
from fmfa.errors import ConfigError
from fmfa.evaluation.cost import training_budget, training_flops
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtRetriever
from fmfa.models.outputs import ModelOutput
from fmfa.models.weights import read_checkpoint
from fmfa.pretrain import Settings, build_parts, pretraining_budget
from fmfa.pretraining import loop, pairs
from fmfa.pretraining.loop import warmup_cosine_rate
from fmfa.pretraining.methods import DATA, METHODS, WORDPIECE, ClipPixels
from fmfa.pretraining.stream import web_pair
from fmfa.pretraining.vocabulary import train_small_vocabulary
from fmfa.text.bytepair import SMALL_VOCABULARY, small_tokenizer
from fmfa.text.wordpiece import wordpiece_tokenizer

MODELS = {"clip": ClipRetriever, "ivt": IvtRetriever}
SOURCES = [(method, source) for method in METHODS for source in ("stream", "list")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A list of pairs, and a model of each method small enough for a few steps."""
    monkeypatch.setattr(pairs, "HELD_OUT", 6)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    write_pair_list(tmp_path)
    write_wordpiece(CAPTIONS, tmp_path / "ivt.txt")
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
    files = {"config": str(folder / f"{method}.json"), "vocabulary": str(folder / f"{method}.txt")}
    listed = {"list": str(folder / "pairs.json"), "images": str(folder)} if source == "list" else {}
    return {**files, **listed, "method": method, "pairs": 9, "batch_size": 3, "workers": 0} | changes


def pretrain(out, **given):
    return command.pretrain(out, Settings(**given))


def given_settings(folder, method):
    return Settings(**options(folder, method)).resolved()


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
    named = command_line(folder, "ivt", "list", pairs=300)
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
        ("ivt", {"vocabulary": str(WORDPIECE)}, "pieces, the model"),
        ("clip", {"vocabulary": str(SMALL_VOCABULARY)}, "the backbone has a vocabulary of"),
        ("clip", {"images": "/pictures"}, "go together"),
        ("ivt", {"list": str(folder / "pairs.json")}, "go together"),
        ("clip", {"pairs": 2}, "fewer pairs than one batch"),
        ("clip", {"fusion_depth": 3}, "method clip has no fusion_depth"),
        ("ivt", {"tau": 0.1}, "method ivt has no tau"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain(folder / "out.safetensors", **options(folder, method, **changes))
    with pytest.raises(ConfigError, match="should be 'clip' or 'ivt'"):
        pretrain(folder / "out.safetensors", **options(folder, "clip") | {"method": "bert"})


def command_line(folder, method="clip", source="stream", **changes):
    given = options(folder, method, source, **changes)
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def error_of(capsys, *arguments):
    """The one line that the command prints when it refuses."""
    assert command.main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1, printed
    return printed[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bert"}, "method: should be 'clip' or 'ivt', found 'bert'"),
        ({"pairs": 0}, "pairs: should be greater than or equal to 1, found 0"),
        ({"pairs": 2}, "fewer pairs than one batch"),
        ({"batch_size": 1}, "batch_size: should be greater than or equal to 2, found 1"),
        ({"batch_size": -3}, "batch_size: should be"),
        ({"seed": -1}, "seed: should be greater than or equal to 0, found -1"),
        ({"learning_rate": "nan"}, "learning_rate: should be a finite number, found nan"),
        ({"learning_rate": 0}, "learning_rate: should be"),
        ({"weight_decay": "inf"}, "weight_decay: should be a finite number"),
        ({"warmup": 1}, "warmup: should be less than or equal to 0.99, found 1.0"),
        ({"position_std": -1}, "position_std: should be"),
        ({"tau": 0}, "tau: should be"),
        ({"workers": -1}, "workers: should be"),
        ({"precision": "fp8"}, "precision: should be 'bf16' or 'fp32', found 'fp8'"),
        ({"device": "gpu"}, "device is 'gpu'; expected one of auto, cpu, cuda"),
        ({"config": "nowhere.json"}, "nowhere.json cannot be read as JSON"),
        ({"config": "pairs.json"}, "pairs.json: expected a JSON object, found list"),
        ({"config": "empty.json"}, "the configuration describes no model of method clip (KeyError: 'text_cfg')"),
        ({"vocabulary": "nowhere.txt"}, "vocabulary nowhere.txt: No such file"),
        ({"method": "ivt", "config": "empty.json"}, "has 64 pieces, the model 30522"),
        ({"list": "nowhere.json", "images": "."}, "nowhere.json: "),
        ({"list": "pairs.json", "images": "nowhere"}, "nowhere"),
        ({"list": "clip.json", "images": "."}, "clip.json: "),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_the_work(folder, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(folder)
    (folder / "empty.json").write_text("{}")
    arguments = command_line(folder, **changes)
    assert message in error_of(capsys, "new/out.safetensors", *arguments)
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("out.pt", "out.pt: the weights go to a file that ends in .safetensors"),
        ("out", "out: the weights go to a file that ends in .safetensors"),
        ("folder.safetensors", "give such a name"),
        ("pairs.json/out.safetensors", "pairs.json/out.safetensors cannot be written: "),
        ("/proc/nowhere/out.safetensors", "/proc/nowhere/out.safetensors cannot be written: "),
    ],
)
def test_a_place_that_cannot_be_written_is_noticed_before_the_work(folder, monkeypatch, capsys, out, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(command, "pretrain_model", None)
    (folder / "folder.safetensors").mkdir()
    assert message in error_of(capsys, out, *command_line(folder))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(list(METHODS)), data=st.data())
def test_any_configuration_builds_a_model_or_is_refused(folder, method, data):
    config = json.loads((folder / f"{method}.json").read_text())
    part = config[data.draw(st.sampled_from(["vision_cfg", "text_cfg"]))] if method == "clip" else config
    value = data.draw(
        st.none() | st.booleans() | st.integers(-2, 40) | st.text(max_size=3) | st.lists(st.integers(0, 9))
    )
    part[data.draw(st.sampled_from([*part, "other"]))] = value
    with suppress(ConfigError):
        build_parts(given_settings(folder, method) | {"config": config})


def test_a_damaged_resume_file_is_refused_and_kept(folder, monkeypatch, capsys):
    given = options(folder, "clip")
    interrupt(monkeypatch, folder / "out.safetensors", given)
    resume = folder / "out.resume"
    whole = resume.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    torch.save([1], folder / "list.pt")
    torch.save({"model": {}}, folder / "other.pt")
    others = [(folder / name).read_bytes() for name in ("list.pt", "other.pt", "clip.json")]
    for content in (b"", whole[:middle], flipped, *others):
        resume.write_bytes(content)
        told = error_of(capsys, folder / "out.safetensors", *command_line(folder))
        assert f"{resume} is not what an interrupted pre-training left, or is damaged" in told
        assert resume.read_bytes() == content
    resume.write_bytes(whole)
    assert command.main([str(folder / "out.safetensors"), *command_line(folder)]) == 0


def test_a_full_disk_is_told_and_costs_nothing(folder, monkeypatch, capsys):
    out = folder / "out.safetensors"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name, there in ((loop, "whole_file", False), (command, "save_checkpoint", True)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            assert "No space left on device" in error_of(capsys, out, *command_line(folder))
        assert (folder / "out.resume").exists() == there
    pretrain(folder / "whole.safetensors", **options(folder, "clip"))
    assert command.main([str(out), *command_line(folder)]) == 0
    assert equal(out, folder / "whole.safetensors")


def test_a_loss_that_is_not_finite_stops(folder, capsys):
    told = error_of(capsys, folder / "out.safetensors", *command_line(folder, learning_rate=1e30))
    assert "a loss is not finite after" in told
    assert "lower learning_rate" in told


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_in_a_line_by_a_worker_too(folder, capsys, workers):
    (folder / "0.png").write_bytes(b"")
    told = error_of(capsys, folder / "out.safetensors", *command_line(folder, source="list", workers=workers))
    assert told == f"error: {folder / '0.png'}: the file is empty (0 bytes); replace it"


def test_ctrl_c_says_how_to_go_on(folder, monkeypatch, capsys):
    monkeypatch.setattr(command, "pretrain_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command.main([str(folder / "out.safetensors"), *command_line(folder)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_resume_file_of_other_settings_is_kept_and_refused(folder, monkeypatch):
    interrupt(monkeypatch, folder / "out.safetensors", options(folder, "clip"))
    for method, changes, named in (("clip", {"seed": 1}, "seed"), ("ivt", {}, "method")):
        with pytest.raises(ConfigError, match=named):
            pretrain(folder / "out.safetensors", **options(folder, method, **changes))
    assert (folder / "out.resume").exists()


def test_the_command_is_recorded_so_that_it_repeats_the_run(folder):
    out = Path("anywhere/tiny.safetensors")
    assert Settings().command(out) == ("python -m fmfa.pretrain data/tiny.safetensors --pairs 250000 --seed 0")
    assert Settings(method="ivt", batch_size=64).command(out) == (
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
    parts = METHODS[method](Settings(method=method).resolved())
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
