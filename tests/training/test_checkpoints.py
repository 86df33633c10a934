import io
import json
import os
import pickle
import sys
import warnings
import zipfile
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fmfa.errors import CheckpointError, ConfigError
from fmfa.models import weights as checkpoints
from fmfa.models import weights as model_files
from fmfa.models.backbone import resize_positions, table_grid
from fmfa.models.clip import ClipRetriever
from fmfa.models.objectives import objectives
from fmfa.models.weight_files import read_state_dict
from fmfa.models.weights import LoadReport, find_weights, load_retriever, load_weights, read_checkpoint, save_checkpoint


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


@pytest.mark.parametrize("module", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("outer", [None, "model", "state_dict", "model_state_dict", "weights of my own"])
def test_irra_layout_is_loaded_whole(tmp_path, module, outer):
    source, target = retriever(seed=1), retriever(seed=2)
    state = {module + name: tensor for name, tensor in irra_layout(source).items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "optimizer": optimizer, outer: state}
    path = saved(tmp_path / "best.pth", content if outer else state)
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
    assert "16 positions, grid 4 x 4 to 6 x 2, bilinear (4 x 4: the backbone's)" in str(report)
    torch.testing.assert_close(target.clip.positional_embedding, source.clip.positional_embedding[:7], rtol=0, atol=0)
    patches = source.clip.visual.positional_embedding[1:].T.reshape(1, 32, 4, 4)
    expected = nn.functional.interpolate(patches, size=(6, 2), mode="bilinear")[0].flatten(1).T
    torch.testing.assert_close(target.clip.visual.positional_embedding[1:], expected)


@pytest.mark.parametrize(
    ("count", "likely", "expected"),
    [
        (192, {}, "24 x 8"),
        (128, {}, "16 x 8"),
        (310, {}, "31 x 10"),
        (49, {}, "7 x 7"),
        (196, {(14, 14): "the backbone's", (24, 8): "the model's"}, "14 x 14"),
        (144, {(14, 14): "the backbone's", (18, 8): "the model's"}, "18 x 8"),
        (144, {}, "24 x 6 or 18 x 8 or 16 x 9 or 12 x 12"),
        (64, {(14, 14): "the backbone's", (24, 8): "the model's"}, "16 x 4 or 8 x 8"),
        (144, {(12, 12): "the backbone's", (18, 8): "the model's"}, "12 x 12 or 18 x 8"),
        (71, {}, "no grid"),
        (0, {}, "no grid"),
        (-1, {}, "no grid"),
    ],
)
def test_the_grid_of_a_position_table(count, likely, expected):
    if "or" in expected or "no" in expected:
        with pytest.raises(ConfigError, match=rf"{count} image positions are .*{expected}.* as position_grid"):
            table_grid(count, likely)
    else:
        (rows, columns), _ = table_grid(count, likely)
        assert f"{rows} x {columns}" == expected


def grids(size, **arguments):
    """A pair of models, the second for other pictures than the first, with the first one's weights."""
    source = retriever(seed=1, image_size=size)
    return source, retriever(seed=2, **arguments), irra_layout(source)


@pytest.mark.parametrize("image_size", [(144, 64), (192, 48), (96, 96)])
def test_a_grid_that_is_not_known_must_be_named(image_size):
    """All three have 144 patches of 8 pixels."""
    source, target, state = grids(image_size, image_size=(48, 16))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"24 x 6 or 18 x 8 or 16 x 9 or 12 x 12.*position_grid"):
        load_weights(target, state)
    with pytest.raises(CheckpointError, match="position_grid is 6 x 2, but the file has 144"):
        load_weights(target, state, position_grid=(6, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    grid = source.clip.visual.grid_size
    report = load_weights(target, state, position_grid=grid)
    assert report.resized == ("clip.visual.positional_embedding",)
    assert f"grid {grid[0]} x {grid[1]} to 6 x 2, bilinear ({grid[0]} x {grid[1]}: as given)" in str(report)
    expected = resize_positions(source.clip.visual.positional_embedding.detach(), (6, 2), source_grid=grid)
    torch.testing.assert_close(target.clip.visual.positional_embedding.detach(), expected)


def test_a_table_of_the_models_length_but_another_shape_is_not_taken_as_it_is():
    source, target, state = grids((96, 96), image_size=(144, 64))
    assert not load_weights(target, state).resized  # its own 18 x 8 is the likely one
    report = load_weights(target, state, position_grid=(12, 12))
    assert report.resized == ("clip.visual.positional_embedding",)
    state |= {"base_model.input_resolution": torch.tensor(1)}  # no number of OpenAI's
    assert not load_weights(target, state).resized
    state = clip_layout(source) | {"input_resolution": torch.tensor(96)}
    assert "12 x 12 to 18 x 8, bilinear (12 x 12: of the file's input_resolution)" in str(load_weights(target, state))


def test_an_own_checkpoint_knows_its_grid(tmp_path):
    source, target, _ = grids((192, 48), image_size=(48, 16))
    save_checkpoint(tmp_path / "own.safetensors", source, {"model": source.config})
    assert "grid 24 x 6 to 6 x 2, bilinear (24 x 6: as recorded)" in str(
        load_weights(target, tmp_path / "own.safetensors")
    )


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
    with pytest.raises(CheckpointError, match=r"none of its .* tensors fits this model's CLIP.*The file has"):
        load_weights(target, saved(tmp_path / "other.pth", state))
    assert torch.equal(before, target.classifier.bias)


def renamed(part, prefix):
    """CLIP's names with one tower under a prefix that nobody knows."""
    state = clip_layout(retriever(seed=1))
    return {prefix + name if name.startswith("visual.") == (part == "image") else name: t for name, t in state.items()}


CLIP_STATE = clip_layout(retriever(seed=1))
PATCHES_OF_16 = torch.zeros(32, 3, 16, 16)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (renamed("text", "words."), r"20 of its 38 tensors .* text encoder would keep random values in 17 of 17.*"
         r"looked for clip.positional_embedding \(not in the file\).*18 like words.positional_embedding"),
        (renamed("image", "eye."), r"image encoder would keep random values in 20 of 20.*20 like eye.visual.class_emb"),
        ({"visual.proj": CLIP_STATE["visual.proj"]}, r"1 of its 1 tensors .* image encoder .* 19 of 20"),
        ({n: t for n, t in CLIP_STATE.items() if n != "ln_final.bias"}, r"in 1 of 17 .* clip.ln_final.bias \(not in"),
        (CLIP_STATE | {"visual.conv1.weight": PATCHES_OF_16}, r"conv1.weight \(\[32, 3, 16, 16\] in the file, \[32,"),
        ({}, "The file has no tensors"),
    ],
)  # fmt: skip
def test_an_encoder_that_would_stay_random_is_refused(state, message):
    target = retriever(seed=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(target, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


class EasyDict(dict):
    """What TBPS-CLIP keeps its settings in."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("custom_text", [True, False])
def test_tbps_clips_layout_is_loaded_whole(tmp_path, monkeypatch, zipped, custom_text):
    source, target = retriever(seed=1), retriever(seed=2, backbone=config(custom_text=custom_text))
    prefixes = {False: "encode_text.", True: ""}
    state = {
        prefixes[name.startswith(("visual.", "logit"))] + name: tensor for name, tensor in clip_layout(source).items()
    }
    state |= {"simclr_mlp.0.weight": torch.zeros(2, 2), "mlm_head.fc.weight": source.irr.mlm_head.fc.weight.detach()}
    monkeypatch.setitem(sys.modules, "easydict", ModuleType("easydict"))
    sys.modules["easydict"].EasyDict = EasyDict
    monkeypatch.setattr(EasyDict, "__module__", "easydict")
    settings = EasyDict(model=EasyDict(embed_dim=16), device="cuda:0")
    settings.seed = 1
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"model": state, "config": settings}, path, _use_new_zipfile_serialization=zipped)
    report = load_weights(target, path)
    assert (report.layout, report.left_out) == ("TBPS-CLIP", ("simclr_mlp.0.weight",))
    assert all(name.startswith(("irr.", "classifier.")) for name in report.missing)
    assert torch.equal(target.irr.mlm_head.fc.weight, source.irr.mlm_head.fc.weight)
    ids = torch.tensor([[28, 4, 5, 29, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(source.encode_text(ids).embedding, target.encode_text(ids).embedding)


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


STATE = {"a": torch.ones(1)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "found a list"),
        ({"epoch": 3}, "dictionary with 'epoch'"),
        ({"model": {"epoch": 3}}, "dictionary with 'model'"),
        ({"student": STATE, "teacher": STATE}, "'student', 'teacher'"),
        ({1: {2: {3: {4: STATE}}}}, "dictionary with 1"),
        (torch.ones(1), "found a Tensor"),
    ],
)
def test_files_without_a_state_dict_say_what_they_hold(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=f"holds no tensors by name.*{message}"):
        read_state_dict(saved(tmp_path / "empty.pth", content))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.ones(1), "module.w": torch.ones(1)}, "two tensors named 'w'"),
        ({"\ud800": torch.ones(1)}, r"unprintable name '\\ud800'"),
        ({"a\nb": torch.ones(1)}, r"unprintable name 'a\\nb'"),
    ],
)
def test_names_that_cannot_be_told_apart_or_printed_are_refused(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(saved(tmp_path / "names.pth", state))


def test_a_torch_compiled_part_keeps_its_names(tmp_path):
    found = read_state_dict(saved(tmp_path / "a.pth", {"model.base_model.visual._orig_mod.proj": torch.ones(1)}))
    assert list(found) == ["base_model.visual.proj"]


def test_the_content_decides_how_a_file_is_read(tmp_path):
    save_file(STATE, tmp_path / "safetensors.pth")
    with (tmp_path / "torch.safetensors").open("wb") as file:
        torch.save(STATE, file)
    for path in tmp_path.iterdir():
        assert torch.equal(read_state_dict(path)["a"], STATE["a"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html><title>Google Drive</title></html>", "it is a web page: the download"),
        (b"<html>429 Too Many Requests</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer.*git lfs pull"),
        (b'{"error": "not found"}', 'it begins with b\'."error"'),
        (pickle.dumps({"a": 1}, protocol=4), "damaged, cut short or of another kind"),
        (b"PK\x03\x04", "damaged, cut short or of another kind"),
    ],
)
def test_what_was_saved_in_place_of_weights_is_named(tmp_path, suffix, content, message):
    path = tmp_path / f"irra{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"cannot be read safely .*{message}") as caught:
        read_state_dict(path)
    assert "weights_only" not in str(caught.value)
    assert caught.value.__suppress_context__  # a traceback shows torch's advice no more than the message


def changed_tensors():
    """A state dict of which one tensor is of a kind that no weight is, and the words for it."""
    tables = st.sampled_from([name for name, tensor in CLIP_STATE.items() if tensor.dim() == 2])
    kinds = {
        "not finite in": lambda t: t.float().index_fill(0, torch.tensor(0), float("nan")),
        "not finite in .* values": lambda t: t / 0,
        "sparse": lambda t: t.to_sparse(),
        "without dense values": lambda t: t.to("meta"),
        "of type complex64": lambda t: t.to(torch.complex64),
        "of type bool": lambda t: t > 0,
        "of type int64": lambda t: t.long(),
        "would keep random values in 1 of": lambda t: t[None],
        "would keep random values in 1 of .*": lambda t: t.flatten(),
    }
    return st.tuples(tables, st.sampled_from(list(kinds))).map(
        lambda drawn: (drawn[0], kinds[drawn[1]](CLIP_STATE[drawn[0]]), drawn[1])
    )


@given(changed_tensors())
@settings(max_examples=60)
def test_tensors_that_are_no_weights_are_refused_by_name(changed):
    name, tensor, message = changed
    target = ClipRetriever(config(), seed=2)
    before = target.clip.visual.proj.clone()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(target, CLIP_STATE | {name: tensor})
    assert name in str(caught.value)
    assert torch.equal(target.clip.visual.proj, before)


@pytest.mark.parametrize("own", [True, False])
def test_nan_is_told_by_file_and_tensor(tmp_path, own):
    model, path = retriever(seed=1), tmp_path / "diverged.safetensors"
    model.clip.text_projection.data[3, 2] = float("nan")
    save_checkpoint(path, model, {"model": model.config})
    with pytest.raises(CheckpointError, match=r"diverged.*clip.text_projection is not finite in 1 of 512 values"):
        load_retriever(path) if own else load_weights(retriever(), path)


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    """One model's weights in every container, by name."""
    home = tmp_path_factory.mktemp("containers")
    state = {name: tensor.contiguous() for name, tensor in CLIP_STATE.items()}
    torch.save({"model": state}, home / "zip")
    torch.save({"model": state}, home / "legacy", _use_new_zipfile_serialization=False)
    save_file(state, home / "safetensors")
    save_checkpoint(home / "own.safetensors", ClipRetriever(config()), {"model": ClipRetriever(config()).config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Archived(), torch.zeros(1, 3)).save(str(home / "torchscript"))
    return {path.name: path.read_bytes() for path in home.iterdir() if path.suffix != ".json"}


def refusal(call):
    """What a call says when it refuses a file; empty if it does not."""
    try:
        call()
    except CheckpointError as error:
        return str(error).encode().decode()  # as a terminal needs it
    return ""


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors", "own.safetensors", "torchscript"])
def test_a_damaged_file_is_read_or_refused_in_one_sentence(containers, tmp_path, container):
    target, path, content = ClipRetriever(config()), tmp_path / "damaged", containers[container]
    place = st.one_of(
        st.integers(0, len(content) - 1), st.integers(0, 2000), st.integers(len(content) - 2000, len(content) - 1)
    )
    damage = st.tuples(place, st.integers(0, 40), st.binary(max_size=9))  # where, how much is lost, what is put there

    @given(st.lists(damage, min_size=1, max_size=4))
    @settings(max_examples=80)
    def read(damages):
        damaged = bytearray(content)
        for position, lost, put in damages:
            damaged[position : position + lost] = put
        path.write_bytes(damaged)
        calls = [lambda: load_weights(target, path)]
        if container == "torchscript":
            calls = [lambda: read_state_dict(path)]
        elif container == "own.safetensors":
            calls += [lambda: load_retriever(path)]
        for call in calls:
            assert "weights_only" not in refusal(call)

    read()


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
    with pytest.raises(CheckpointError, match=r"no such file, and ViT-B-16-quickgelu has no .* only openai, "):
        find_weights("opneai", "ViT-B-16-quickgelu")
    with pytest.raises(CheckpointError, match="'openai': no such file; give the path"):
        load_weights(retriever(), "openai")


def test_a_folder_is_no_weight_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"': is a folder; give the path of a weight file") as error:
        load_weights(retriever(), tmp_path)
    assert "None" not in str(error.value)


def test_a_tag_is_fetched_through_open_clip(monkeypatch, tmp_path):
    path = saved(tmp_path / "clip.safetensors", clip_layout(retriever(seed=1)))
    monkeypatch.setattr(checkpoints, "download_pretrained", lambda tag: str(path) if "openai" in str(tag) else "")
    target = retriever(seed=2)
    target.backbone = "ViT-B-16-quickgelu"
    assert load_weights(target, "openai").source == str(path)


def test_a_report_without_reasons_reads_well():
    text = str(LoadReport(("a",), (), ("b",), ("c",), {}, "weights", "IVT"))
    assert text.splitlines() == [
        "weights (IVT layout): 1 tensors loaded, 0 resized, 1 left out, 1 missing",
        "  left out  b",
        "  missing   c: keeps its value",
    ]


def test_own_checkpoint_returns_model_and_record(tmp_path):
    model, path = retriever(seed=1), tmp_path / "folder" / "tiny.safetensors"
    save_checkpoint(path, model, {"model": model.config, "seed": 7})
    twin, record = load_retriever(path), read_checkpoint(path)[1]
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
