import json

import pytest
import torch
from torch.nn import functional as F
from toy_clip import batch, retriever

from fmfa.errors import CheckpointError
from fmfa.models.rde import RdeRetriever
from fmfa.score import main
from fmfa.systems import load_system


def heads(width, out=20, seed=0):
    """Tensors of RDE's two heads, as its checkpoints name them, in half precision but for the norms."""
    draw, state = torch.Generator().manual_seed(seed), {}

    def add(name, *shape):
        state[name] = torch.randn(*shape, generator=draw) / 3

    for prefix, linears in (("visul_emb_layer.", ("linear", "fc")), ("texual_emb_layer.", ("linear",))):
        for name in linears:
            add(f"{prefix}{name}.weight", out, width), add(f"{prefix}{name}.bias", out)
        for number, (wide, narrow) in enumerate(((out // 2, width), (out, out // 2))):
            add(f"{prefix}mlp.layers.{number}.weight", wide, narrow), add(f"{prefix}mlp.layers.{number}.bias", wide)
        for number, size in enumerate((out // 2, out)):
            for name in ("weight", "bias", "running_mean"):
                add(f"{prefix}mlp.bns.{number}.{name}", size)
            state[f"{prefix}mlp.bns.{number}.running_var"] = torch.rand(size, generator=draw) + 0.5
            state[f"{prefix}mlp.bns.{number}.num_batches_tracked"] = torch.tensor(7)
    halves = {name: tensor.half() for name, tensor in state.items() if "bns" not in name}
    return state | halves


def last_attention(block, x, mask):
    """Attention weights of torch's own layer, mean over heads: [B, L, L]."""
    return block.attn(x, x, x, need_weights=True, attn_mask=mask)[1]


def feature(state, prefix, linear, tokens):
    """The second branch of one item from its selected tokens [K, D], by RDE's definition."""
    w = {name.removeprefix(prefix): t.float() for name, t in state.items() if name.startswith(prefix)}
    rows = []
    for token in tokens:
        token = token / token.norm()
        hidden = w["mlp.layers.0.weight"] @ token + w["mlp.layers.0.bias"]
        scaled = (hidden - w["mlp.bns.0.running_mean"]) / (w["mlp.bns.0.running_var"] + 1e-5).sqrt()
        hidden = (scaled * w["mlp.bns.0.weight"] + w["mlp.bns.0.bias"]).clamp(min=0)
        mlp = w["mlp.layers.1.weight"] @ hidden + w["mlp.layers.1.bias"]
        rows.append(mlp + w[f"{linear}.weight"] @ token + w[f"{linear}.bias"])
    return torch.stack(rows).max(0).values


@torch.no_grad()
def test_both_branches_are_those_of_the_definition():
    base, given = retriever(seed=3).eval(), batch(size=5)
    for block in (base.clip.visual.transformer.resblocks[-1], base.clip.transformer.resblocks[-1]):
        block.attn.in_proj_weight.mul_(8)  # so that attention differs between tokens
    state = heads(24)
    model = RdeRetriever(base, state).eval()
    inputs = {}
    for name, tower in (("image", base.clip.visual), ("text", base.clip)):
        tower.transformer.resblocks[-1].ln_1.register_forward_hook(lambda _, args, out, n=name: inputs.update({n: out}))
    ids = given["caption_ids"]
    image, text = model.encode_image(given["images"]), model.encode_text(ids)
    weights = last_attention(base.clip.visual.transformer.resblocks[-1], inputs["image"], None)
    length = inputs["text"].shape[1]
    causal = torch.full((length, length), -torch.inf).triu(1)
    text_weights = last_attention(base.clip.transformer.resblocks[-1], inputs["text"], causal)
    for item in range(5):
        best = weights[item, 0, 1:].argsort(descending=True)[: int(12 * 0.3)] + 1
        second = feature(state, "visul_emb_layer.", "fc", image.tokens[item, best])
        expected = torch.cat([F.normalize(image.tokens[item, 0], dim=0), F.normalize(second, dim=0)])
        torch.testing.assert_close(image.embedding[item], expected, atol=1e-5, rtol=1e-4)
        end = int(ids[item].argmax())
        words = text_weights[item, end, 1:end].argsort(descending=True)[: int((12 - 2) * 0.3)] + 1
        second = feature(state, "texual_emb_layer.", "linear", text.tokens[item, words])
        expected = torch.cat([F.normalize(text.tokens[item, end], dim=0), F.normalize(second, dim=0)])
        torch.testing.assert_close(text.embedding[item], expected, atol=1e-5, rtol=1e-4)
    # the cosine of the joined branches is the mean of their cosines
    cosine = F.cosine_similarity(text.embedding, image.embedding)
    halves = [F.cosine_similarity(text.embedding[:, part], image.embedding[:, part])
              for part in (slice(24), slice(24, None))]  # fmt: skip
    torch.testing.assert_close(cosine, sum(halves) / 2)


@torch.no_grad()
def test_a_caption_without_words_has_a_finite_embedding():
    model = RdeRetriever(retriever().eval(), heads(24)).eval()
    ids = torch.zeros(2, 12, dtype=torch.int64)
    ids[:, 0], ids[:, 1] = 38, 39
    assert model.encode_text(ids).embedding.isfinite().all()


@pytest.fixture
def rde_file(tmp_path):
    """A file as RDE saves them: IRRA's names, the two heads, other things beside."""
    shipped = load_system().model
    state = {name.replace("clip.", "base_model.", 1): value for name, value in shipped.state_dict().items()}
    state |= heads(shipped.config["backbone"]["embed_dim"])
    (tmp_path / "backbone.json").write_text(json.dumps(shipped.config["backbone"]))
    about = {"backbone": str(tmp_path / "backbone.json"), "image_height": 96, "image_width": 32, "stride": 8}
    return state, tmp_path / "rde.pth", about | {"dataset": "SimPEDES-street"}


def test_files_of_rde_are_opened_with_both_branches_and_scored(rde_file, tiny, capsys, monkeypatch):
    state, path, about = rde_file
    torch.save({"model": state, "epoch": 60}, path)
    system = load_system(path, **about)
    assert isinstance(system.model, RdeRetriever)
    assert not system.model.training
    assert system.report.layout == "RDE"
    assert system.report.left_out == ()
    monkeypatch.chdir(path.parent)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in about.items()]
    assert main([str(path), *options, "--root", str(tiny.images.parent), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "(RDE layout)" in out
    assert "rde text to image" in out


def test_a_file_of_rde_that_lacks_a_tensor_is_told(rde_file):
    state, path, about = rde_file
    del state["texual_emb_layer.mlp.layers.1.weight"]
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match=r"rde.pth: texual_emb_layer.mlp.layers.1.weight is missing"):
        load_system(path, **about)
