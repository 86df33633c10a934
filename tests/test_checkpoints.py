import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fmfa.errors import CheckpointError
from fmfa.models.clip import ClipRetriever, objectives
from fmfa.weights import loading as checkpoints
from fmfa.weights import own as model_files
from fmfa.weights.files import read_state_dict
from fmfa.weights.loading import LoadReport, find_weights, load_weights
from fmfa.weights.own import load_retriever, read_checkpoint, save_checkpoint


def config(**other):
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 10, "vocab_size": 30, "width": 32, "heads": 2, "layers": 1},
        **other,
    }


def retriever(identities=5, seed=0, backbone=None, **arguments):
    return ClipRetriever(
        backbone or config(), objectives("irra", irr_depth=1), identities=identities, seed=seed, **arguments
    )


def irra_layout(model):
    """The names of IRRA's checkpoints."""
    names = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (("clip.", "base_model."), ("irr.", "")):
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        names[name] = tensor
    return names


def clip_layout(model):
    return {name.removeprefix("clip."): t for name, t in model.state_dict().items() if name.startswith("clip.")}


def saved(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("module", ["", "module."])
@pytest.mark.parametrize("outer", [None, "model"])
def test_irra_layout_is_loaded_whole(tmp_path, module, outer):
    source, target = retriever(seed=1), retriever(seed=2)
    state = {module + name: tensor for name, tensor in irra_layout(source).items()}
    path = saved(tmp_path / "best.pth", {outer: state, "epoch": 3} if outer else state)
    report = load_weights(target, path)
    assert report.layout == "IRRA"
    assert (report.resized, report.left_out, report.missing) == ((), (), ())
    assert set(report.loaded) == set(target.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_a_classifier_of_another_size_is_left_out_and_said_so(tmp_path):
    source, target = retriever(identities=9, seed=1), retriever(identities=5, seed=2)
    before = target.classifier.weight.clone()
    report = load_weights(target, saved(tmp_path / "best.pth", irra_layout(source)))
    assert report.left_out == report.missing == ("classifier.weight", "classifier.bias")
    assert torch.equal(target.classifier.weight, before)
    assert torch.equal(target.irr.mlm_head.fc.weight, source.irr.mlm_head.fc.weight)
    text = str(report)
    assert "0 resized, 2 left out, 2 missing" in text
    assert "left out  classifier.weight: [9, 16] in the file, [5, 16] in the model" in text


def test_heads_that_the_model_does_not_have_are_left_out():
    target = ClipRetriever(config(), objectives("clip"), seed=2)
    report = load_weights(target, irra_layout(retriever(seed=1)))
    assert "classifier.weight" in report.left_out
    assert "mlm_head.fc.weight" in report.left_out
    assert report.missing == ()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_openai_state_dict_in_half_precision(tmp_path, suffix):
    source, target = retriever(seed=1), retriever(seed=2)
    state = {name: tensor.half() for name, tensor in clip_layout(source).items()}
    state |= {"input_resolution": torch.tensor(32), "context_length": torch.tensor(10)}
    report = load_weights(target, saved(tmp_path / f"ViT{suffix}", state))
    assert (report.layout, report.left_out, report.resized) == ("CLIP", (), ())
    assert all(name.startswith(("irr.", "classifier.")) for name in report.missing)
    assert target.clip.visual.proj.dtype == torch.float32
    torch.testing.assert_close(target.clip.visual.proj, source.clip.visual.proj, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("ours", "theirs"), [(False, True), (True, False), (True, True)])
def test_text_towers_of_both_open_clip_layouts(ours, theirs):
    source = ClipRetriever(config(custom_text=theirs), seed=1)
    target = ClipRetriever(config(custom_text=ours), seed=2)
    state = clip_layout(source)
    assert ("text.ln_final.weight" in state) == theirs
    report = load_weights(target, state)
    assert (report.left_out, report.missing) == ((), ())
    ids = torch.tensor([[28, 4, 5, 29, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(source.encode_text(ids).embedding, target.encode_text(ids).embedding)


def test_image_positions_are_resized_and_text_positions_cut():
    text = {**config()["text_cfg"], "context_length": 7}
    target = retriever(seed=2, backbone=config(text_cfg=text), image_size=(48, 16))
    source = retriever(seed=1)
    report = load_weights(target, irra_layout(source))
    assert set(report.resized) == {"clip.visual.positional_embedding", "clip.positional_embedding"}
    assert "17 positions to 13 (grid 6 x 2), bilinear" in str(report)
    torch.testing.assert_close(target.clip.positional_embedding, source.clip.positional_embedding[:7], rtol=0, atol=0)
    patches = source.clip.visual.positional_embedding[1:].T.reshape(1, 32, 4, 4)
    expected = nn.functional.interpolate(patches, size=(6, 2), mode="bilinear")[0].flatten(1).T
    torch.testing.assert_close(target.clip.visual.positional_embedding[1:], expected)


def test_a_grid_that_is_not_square_must_be_named():
    source, target = retriever(seed=1, image_size=(48, 16)), retriever(seed=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"12 patch positions are no 3 x 3 grid.*position_grid"):
        load_weights(target, irra_layout(source))
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    report = load_weights(target, irra_layout(source), position_grid=(6, 2))
    assert report.resized == ("clip.visual.positional_embedding",)


@pytest.mark.parametrize(
    "state",
    [
        {"layer.weight": torch.zeros(3)},
        {"classifier.bias": torch.zeros(5), "ln_post.weight": torch.zeros(16)},  # heads' names by chance
        {"base_model.other": torch.zeros(2), "classifier.bias": torch.ones(5)},
        {"logit_scale": torch.tensor(1.0)},
    ],
)
def test_a_file_that_matches_nothing_is_refused(tmp_path, state):
    target = retriever()
    before = target.classifier.bias.clone()
    with pytest.raises(CheckpointError, match=r"none of its .* tensors fits this model's CLIP"):
        load_weights(target, saved(tmp_path / "other.pth", state))
    assert torch.equal(before, target.classifier.bias)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path):
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        write({"model": Harmful(tmp_path / "harm")}, tmp_path / "evil.pth")
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            read_state_dict(tmp_path / "evil.pth")
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:  # looks like TorchScript
        archive.writestr("evil/constants.pkl", b"")
        archive.writestr("evil/data.pkl", pickle.dumps(Harmful(tmp_path / "harm"), protocol=2))
    with pytest.raises(CheckpointError, match=r"refers to posix.mkdir"):
        read_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists()


class Archived(nn.Module):
    """A few tensors under CLIP-like names, with a view and a buffer."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.small = nn.Parameter(torch.arange(6.0).reshape(2, 3).half())
        self.view = nn.Parameter(torch.arange(12.0).reshape(3, 4)[:, 1:3])
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return self.visual(x)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_tensors_of_a_torchscript_archive(tmp_path):
    torch.manual_seed(0)
    module = Archived()
    path = tmp_path / "ViT.pt"
    torch.jit.trace(module, torch.zeros(1, 3)).save(str(path))
    found = read_state_dict(path)
    expected = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot be read safely"), (b"not a weight file", "cannot be read safely"), (None, "no such file")],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(tmp_path, content, message, suffix):
    path = tmp_path / f"weights{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"epoch": 3}}])
def test_files_without_tensors(tmp_path, content):
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        read_state_dict(saved(tmp_path / "empty.pth", content))


def test_a_truncated_file(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, buffer)
    path = tmp_path / "cut.pth"
    path.write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        read_state_dict(path)


def test_names_without_a_network_lead_to_a_local_file(monkeypatch):
    def offline(*_, **__):
        raise OSError("network unreachable")

    monkeypatch.setattr(checkpoints, "download_pretrained", offline)
    monkeypatch.setattr(checkpoints, "download_pretrained_from_hf", offline)
    for name in ("openai", "hf-hub:someone/something"):
        with pytest.raises(CheckpointError, match=r"network unreachable.*give its path instead of the name"):
            find_weights(name, "ViT-B-16-quickgelu")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(CheckpointError, match=r"neither an existing file nor known .*openai.*local file"):
        find_weights("opneai", "ViT-B-16-quickgelu")
    with pytest.raises(CheckpointError, match="neither an existing file nor known"):
        load_weights(retriever(), "openai")


def test_a_tag_is_fetched_through_open_clip(monkeypatch, tmp_path):
    path = saved(tmp_path / "clip.safetensors", clip_layout(retriever(seed=1)))
    monkeypatch.setattr(checkpoints, "download_pretrained", lambda tag: str(path) if "openai" in str(tag) else "")
    target = retriever(seed=2)
    target.backbone = "ViT-B-16-quickgelu"
    assert load_weights(target, "openai").source == str(path)


def test_a_report_without_reasons_reads_well():
    text = str(LoadReport(("a",), (), ("b",), ("c",)))
    assert text.splitlines() == [
        "weights: 1 tensors loaded, 0 resized, 1 left out, 1 missing",
        "  left out  b",
        "  missing   c: keeps its value",
    ]


def test_own_checkpoint_returns_model_and_record(tmp_path):
    model, path = retriever(seed=1), tmp_path / "folder" / "tiny.safetensors"
    save_checkpoint(path, model, {"model": model.config, "seed": 7})
    twin, record = load_retriever(path)
    assert record["seed"] == 7
    assert json.loads(path.with_suffix(".json").read_text()) == record
    assert not twin.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiny.json", "tiny.safetensors"]
    report = load_weights(retriever(seed=3), path)
    assert (report.layout, report.missing, report.left_out) == ("fmfa", (), ())


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})

    def interrupted(state, part, metadata):
        part.write_bytes(b"half of a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
    state, record = read_checkpoint(path)
    assert torch.equal(state["a"], torch.ones(3))
    assert record == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.json", "tiny.safetensors"]


def test_own_checkpoints_say_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match=r"end in .safetensors"):
        save_checkpoint(tmp_path / "a.pt", {"a": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save_checkpoint(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"path": tmp_path})
    for content in (None, b"junk"):
        path = tmp_path / "b.safetensors"
        if content:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
            read_checkpoint(path)
    save_file({"a": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        read_checkpoint(tmp_path / "c.safetensors")
    save_checkpoint(tmp_path / "d.safetensors", {"a": torch.ones(1)}, {"model": retriever().config})
    with pytest.raises(CheckpointError, match="record does not describe its weights"):
        load_retriever(tmp_path / "d.safetensors")
