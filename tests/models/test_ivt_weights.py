import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toy_ivt import NARROW, UNUSED, bert_state, released_shapes, released_state, vit_state

from fmfa.errors import CheckpointError
from fmfa.models.ivt import IvtConfig, IvtRetriever
from fmfa.models.weight_files import read_state_dict
from fmfa.models.weights import load_weights, save_checkpoint, start_from_vit_and_bert


@pytest.mark.parametrize("stride", [12, 16])
def test_full_size_names_and_shapes_are_the_released_ones(stride):
    with torch.device("meta"):
        model = IvtRetriever(IvtConfig(stride=stride))
    released = released_shapes(model.sizes)
    assert len(released) == 212
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert own == {name: shape for name, shape in released.items() if name not in UNUSED}


@pytest.mark.parametrize("stride", [12, 16])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_checkpoint_file_loads(tmp_path, stride, prefix):
    config = replace(NARROW, stride=stride)
    state = released_state(config)
    content = {
        "state_dict": {prefix + name: value for name, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.005, "params": [0, 1]}]},
        "epoch": 61,
        "best_acc": np.float64(0.5612),
    }
    path = tmp_path / "checkpoint_best.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"
    model = IvtRetriever(config)
    report = load_weights(model, path)
    assert len(report.loaded) == 204
    assert set(report.left_out) == UNUSED
    assert not report.resized
    assert not report.missing
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_old_numpy_scalars_pass_and_code_does_not(tmp_path):
    path = tmp_path / "old.pth"
    content = {"state_dict": {"a": torch.ones(1)}, "best_acc": np.float32(0.5)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    new, old = b"numpy._core.multiarray\nscalar", b"numpy.core.multiarray\nscalar"
    assert new in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(new, old))  # as numpy below 2 writes it
    assert list(read_state_dict(path)) == ["a"]

    class Payload:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Payload()}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        read_state_dict(tmp_path / "code.pth")


def test_pretrained_checkpoints_with_a_fusion_encoder_load():
    state = {name: value for name, value in released_state(NARROW).items() if "img." not in name}
    extra = {
        "encoder_fusion.bert.encoder.layer.0.crossattention.self.query.weight": torch.ones(24, 24),
        "encoder_fusion.cls.predictions.bias": torch.ones(40),
        "itm.weight": torch.ones(2, 24),
    }
    report = load_weights(IvtRetriever(NARROW), state | extra)
    assert len(report.loaded) == 204
    assert set(report.left_out) == {"temp", "encoder_vl.embeddings.position_ids", *extra}


def naive_resize(table, source, target):
    """Bilinear with half-pixel centres, cell by cell."""
    cells = table[0, 1:].double().numpy().reshape(*source, -1)
    rows = []
    for y in range(target[0]):
        for x in range(target[1]):
            value = 0.0
            centre = [(p + 0.5) * s / t - 0.5 for p, s, t in zip((y, x), source, target)]
            centre = [min(max(c, 0.0), s - 1.0) for c, s in zip(centre, source)]
            low = [int(c) for c in centre]
            for dy in (0, 1):
                for dx in (0, 1):
                    weight = 1.0
                    for c, first, step in zip(centre, low, (dy, dx)):
                        weight *= c - first if step else 1 - (c - first)
                    at = [min(first + step, s - 1) for first, step, s in zip(low, (dy, dx), source)]
                    value = value + weight * cells[at[0], at[1]]
            rows.append(value)
    return np.concatenate([table[0, :1].double().numpy(), np.stack(rows)])[None]


def test_positions_of_another_stride_are_resized_from_their_own_grid():
    state = released_state(replace(NARROW, stride=16))
    model = IvtRetriever(NARROW)
    tables = ("encoder_vl.pos_embed", "encoder_vl.type_embed")
    report = load_weights(model, state)
    assert set(report.resized) == set(tables)
    assert len(report.loaded) == 202
    for name in tables:
        expected = naive_resize(state[name], (24, 8), (31, 10))
        assert np.allclose(model.state_dict()[name].numpy(), expected, atol=1e-5)


def test_positions_of_an_unknown_grid_are_refused_until_it_is_given(tmp_path):
    config, other = (replace(NARROW, depth=1, image_size=size, stride=16) for size in ((384, 128), (288, 128)))
    source, model = IvtRetriever(other, seed=1), IvtRetriever(config, seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"pos_embed: 144 image positions are a grid of 24 x 6 or 18 x 8.*_grid"):
        load_weights(model, source.state_dict())
    with pytest.raises(CheckpointError, match="position_grid is 9 x 8, but the file has 144"):
        load_weights(model, source.state_dict(), position_grid=(9, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = load_weights(model, source.state_dict(), position_grid=(18, 8))
    assert "pos_embed: 144 positions, grid 18 x 8 to 24 x 8, bilinear (18 x 8: as given)" in str(report)
    expected = naive_resize(source.encoder_vl.pos_embed.detach(), (18, 8), (24, 8))
    assert np.allclose(model.state_dict()["encoder_vl.pos_embed"].numpy(), expected, atol=1e-5)
    save_checkpoint(tmp_path / "own.safetensors", source, {"model": source.config})
    assert "18 x 8: as recorded" in str(load_weights(model, tmp_path / "own.safetensors"))
    with pytest.raises(CheckpointError, match="71 image positions are no grid"):
        load_weights(model, released_state(NARROW) | {"encoder_vl.pos_embed": torch.randn(1, 1 + 71, 24)})


def test_a_square_vit_grid_is_resized_even_where_the_model_has_as_many_patches():
    config = replace(NARROW, depth=1, image_size=(448, 112), stride=16)  # 28 x 7 patches against 14 x 14
    model, vit = IvtRetriever(config), vit_state(depth=1)
    report = start_from_vit_and_bert(model, vit, bert_state(layers=1))
    assert report.resized == ("encoder_vl.pos_embed",)
    assert "pos_embed: 196 positions, grid 14 x 14 to 28 x 7, bilinear" in str(report)
    expected = naive_resize(vit["pos_embed"], (14, 14), (28, 7))
    assert np.allclose(model.state_dict()["encoder_vl.pos_embed"].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("prefix", "norm"), [("", ("weight", "bias")), ("bert.", ("gamma", "beta"))])
def test_start_from_an_imagenet_vit_and_bert(tmp_path, prefix, norm):
    vit, bert = vit_state(), bert_state(prefix, norm)
    torch.save(vit, tmp_path / "vit.pth")
    save_file(bert, tmp_path / "model.safetensors")
    model = IvtRetriever(NARROW, seed=4)
    report = start_from_vit_and_bert(model, tmp_path / "vit.pth", tmp_path / "model.safetensors")
    own = model.state_dict()
    assert set(report.resized) == {"encoder_vl.pos_embed"}
    assert tuple(report.missing) == ("encoder_vl.type_embed",)
    assert len(report.loaded) == 202
    assert torch.equal(own["encoder_vl.type_embed"], IvtRetriever(NARROW, seed=4).encoder_vl.type_embed.detach())
    expected = naive_resize(vit["pos_embed"], (14, 14), (31, 10))
    assert np.allclose(own["encoder_vl.pos_embed"].numpy(), expected, atol=1e-5)
    for ours, theirs in (
        ("cls_token", "cls_token"),
        ("patch_embed.proj.weight", "patch_embed.proj.weight"),
        ("norm.bias", "norm.bias"),
        ("blocks.11.norm1.weight", "blocks.11.norm1.weight"),
        ("blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.bias"),
        ("blocks.3.mlp_vis.fc2.weight", "blocks.3.mlp.fc2.weight"),
    ):
        assert torch.equal(own[f"encoder_vl.{ours}"], vit[theirs])
    for ours, theirs in (
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        ("embeddings.LayerNorm.bias", f"embeddings.LayerNorm.{norm[1]}"),
        ("blocks.0.mlp_txt.fc1.weight", "encoder.layer.0.intermediate.dense.weight"),
        ("blocks.11.mlp_txt.fc2.bias", "encoder.layer.11.output.dense.bias"),
    ):
        assert torch.equal(own[f"encoder_vl.{ours}"], bert[prefix + theirs])
    left_out = set(report.left_out)
    assert {"vit:head.weight", "vit:head.bias", f"bert:{prefix}pooler.dense.weight"} <= left_out
    assert f"bert:{prefix}encoder.layer.5.attention.output.dense.weight" in left_out
    assert len(left_out) == 2 + 1 + 3 * 12


def test_a_shallow_ivt_takes_the_first_layers_and_says_what_it_left():
    model = IvtRetriever(replace(NARROW, depth=2))
    report = start_from_vit_and_bert(model, vit_state(), bert_state())
    assert tuple(report.missing) == ("encoder_vl.type_embed",)
    assert "encoder_vl.blocks.2.attn.qkv.weight" in set(report.left_out)


def test_names_without_network_say_which_file_to_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = IvtRetriever(replace(NARROW, depth=1))
    with pytest.raises(CheckpointError, match=r"'vit_nowhere'.*from timm.*give the path of a state dict"):
        start_from_vit_and_bert(model, "vit_nowhere", bert_state())
    with pytest.raises(CheckpointError, match=r"'someone/no-bert'.*hub.*give the path of a state dict"):
        start_from_vit_and_bert(model, vit_state(), "someone/no-bert")


def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    model = IvtRetriever(NARROW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = released_state(NARROW)
    state["encoder_vl.embeddings.word_embeddings.weight"] = torch.ones(41, 24)
    with pytest.raises(CheckpointError, match=r"word_embeddings.*\[41, 24\].*\[40, 24\]"):
        load_weights(model, state)
    with pytest.raises(CheckpointError, match=r"none of its 1 tensors fits this model's IVT.*base_model\.a"):
        load_weights(model, {"base_model.a": torch.ones(1)})
    text = {name: value for name, value in released_state(NARROW).items() if "mlp_txt" not in name}
    with pytest.raises(CheckpointError, match=r"random values in 48 of 204 .*blocks\.0\.mlp_txt\.fc1\.weight"):
        load_weights(model, text)
    with pytest.raises(CheckpointError, match=r"random values in 53 of 203 tensors; looked for .*word_embeddings"):
        start_from_vit_and_bert(model, vit_state(), {"text_model.embeddings": torch.ones(1)})
    for broken, said in (
        (torch.full((24,), torch.nan), "not finite in 24 of 24"),
        (torch.ones(24) > 0, "of type bool"),
    ):
        with pytest.raises(CheckpointError, match=f"encoder_vl.norm.bias is {said}"):
            load_weights(model, released_state(NARROW) | {"encoder_vl.norm.bias": broken})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_recorded_configuration_rebuilds_the_model():
    model = IvtRetriever(replace(NARROW, depth=1, loss="sdm"), seed=3)
    again = IvtRetriever.from_config(json.loads(json.dumps(model.config)))
    assert again.sizes == model.sizes
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
