import json
from dataclasses import fields

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from toy_clip import CONTEXT, END, VOCABULARY, batch, config, retriever

from fmfa.errors import ConfigError
from fmfa.models.backbone import resize_positions
from fmfa.models.clip import SIMILAR, ClipRetriever
from fmfa.models.objectives import Objectives, objectives
from fmfa.training.loop import gradient_norms


@pytest.mark.parametrize(
    ("variant", "tower"),
    [
        (config(), CLIP),
        (config(custom_text=True), CustomTextCLIP),
        (config(quick_gelu=False, text={"pool_type": "eos", "eos_id": END}), CLIP),
        (config(text={"pool_type": "last", "no_causal_mask": True}, vision={"pool_type": "avg"}), CLIP),
        (config(vision={"pool_type": "avg", "final_ln_after_pool": True}, text={"proj_bias": True}), CLIP),
    ],
)
def test_embeddings_are_those_of_open_clip(variant, tower):
    model, data = ClipRetriever(variant).eval(), batch()
    assert type(model.clip) is tower
    with torch.no_grad():
        image, text = model.encode_image(data["images"]), model.encode_text(data["caption_ids"])
        torch.testing.assert_close(image.embedding, model.clip.encode_image(data["images"]))
        torch.testing.assert_close(text.embedding, model.clip.encode_text(data["caption_ids"]))
    assert image.tokens.shape == (4, 1 + 6 * 2, 24)


def test_every_token_is_normalised_and_projected():
    model, data = retriever().eval(), batch()
    visual = model.clip.visual
    with torch.no_grad():
        hidden = visual.transformer(visual._embeds(data["images"]))
        expected = visual.ln_post(hidden) @ visual.proj
        image = model.encode_image(data["images"])
        text = model.encode_text(data["caption_ids"])
    torch.testing.assert_close(image.tokens, expected)
    torch.testing.assert_close(image.embedding, image.tokens[:, 0])
    for row, end in enumerate(data["caption_ids"].argmax(dim=1)):
        torch.testing.assert_close(text.embedding[row], text.tokens[row, end])


def test_text_tower_runs_on_the_longest_caption_only_and_gives_the_same():
    model, data = retriever().eval(), batch()
    longest = int(data["caption_ids"].argmax(dim=1).max()) + 1
    with torch.no_grad():
        short = model.encode_text(data["caption_ids"])
        full = model.encode_text(data["caption_ids"], positions=CONTEXT)
    assert short.tokens.shape[1] == longest < CONTEXT
    torch.testing.assert_close(short.embedding, full.embedding)
    torch.testing.assert_close(short.tokens, full.tokens[:, :longest])


def test_captions_of_similar_length_are_encoded_together_and_keep_their_order():
    model, data = retriever().eval(), batch(3 * SIMILAR + 1, longest=CONTEXT)
    with torch.no_grad():
        full = model.encode_text(data["caption_ids"], positions=CONTEXT)
        for tokens in (True, False):
            found = model.encode_text(data["caption_ids"], tokens=tokens)
            torch.testing.assert_close(found.embedding, full.embedding)
        told = model.caption_positions(data["caption_ids"])
        tokens = model.encode_text(data["caption_ids"]).tokens
    torch.testing.assert_close(tokens[told[:, : tokens.shape[1]]], full.tokens[told])


@pytest.mark.parametrize("changes", [{"itc": 1}, {"sdm": 1, "id": 1, "irr": 1}, {"asdm": 1, "efa": 1, "irr": 1},
                                     {"sdm": 1, "efa": 1, "irr": 1, "efa_positions": "all"}])  # fmt: skip
def test_every_loss_of_the_embeddings_has_a_gradient_in_the_shared_features(changes, monkeypatch):
    model, data = retriever(Objectives(irr_depth=1, **changes)), batch(2 * SIMILAR, longest=CONTEXT)
    data["labels"] %= 2
    norms = gradient_norms(model(data))
    monkeypatch.setattr("fmfa.models.clip.SIMILAR", len(data["caption_ids"]))
    assert norms == pytest.approx(gradient_norms(model(data)), rel=1e-4)  # as of captions encoded all together
    for loss in set(changes) - {"irr", "efa_positions"}:
        assert min(norms[f"{loss}/image_tokens"], norms[f"{loss}/text_tokens"]) > 0, loss
    if "irr" in changes:
        assert norms["irr/masked_text_tokens"] > 0 == norms["irr/text_tokens"]


def test_a_text_tower_that_is_not_causal_runs_on_all_positions():
    model = ClipRetriever(config(text={"no_causal_mask": True}))
    assert model.encode_text(batch()["caption_ids"]).tokens.shape[1] == CONTEXT


def irr_loss(model, data, length):
    cut = {name: t[:, :length] if t.shape[1:] == (CONTEXT,) else t for name, t in data.items()}
    return model(cut).losses["irr"].item()


def test_padding_takes_part_in_irr_unless_it_is_hidden():
    data = batch()
    longest = int(data["caption_ids"].argmax(dim=1).max()) + 1
    open_model = retriever(Objectives(irr=1, irr_depth=1))
    assert irr_loss(open_model, data, longest) != pytest.approx(irr_loss(open_model, data, CONTEXT), rel=1e-5)
    hidden = retriever(Objectives(irr=1, irr_depth=1, irr_padding_mask=True))
    assert irr_loss(hidden, data, longest) == pytest.approx(irr_loss(hidden, data, CONTEXT), rel=1e-6)


def test_padding_takes_part_in_the_released_efa_but_not_in_the_papers():
    data = batch()
    lengths = {}
    for positions in ("caption", "all"):
        model = retriever(Objectives(efa=1, efa_positions=positions))
        output = model(data)
        lengths[positions] = output.features["text_tokens"].shape[1]
        noisy = dict(data, caption_ids=data["caption_ids"].clone())
        noisy["caption_ids"][:, -1] = 5  # beyond every end token
        same = model(noisy).losses["efa"].item() == pytest.approx(output.losses["efa"].item(), rel=1e-6)
        assert same == (positions == "caption")
    assert lengths["caption"] < lengths["all"] == CONTEXT


def test_the_vocabulary_head_runs_on_few_positions():
    model, data, seen = retriever(Objectives(irr=1, irr_depth=1)), batch(), []
    model.irr.mlm_head.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(data)
    assert seen == [(4, 4, VOCABULARY)]  # of 12 positions; a multiple of 4


def test_a_batch_without_masked_positions_trains():
    model, data = retriever(Objectives(irr=1, irr_depth=1)), batch()
    data["masked_labels"].zero_()
    loss = model(data).losses["irr"]
    loss.backward()
    assert loss.item() == 0


def test_retrieval_branch_sees_the_masked_caption_on_demand():
    data = batch()
    wanted = {"sdm": 1, "irr": 1, "efa": 1, "irr_depth": 1}
    plain, masked = (retriever(Objectives(**wanted, retrieval_sees_mask=flag)) for flag in (False, True))
    swapped = plain(dict(data, caption_ids=data["masked_ids"]))
    output = masked(data)
    for name, loss in output.losses.items():
        torch.testing.assert_close(loss, swapped.losses[name])
    assert plain(data).losses["sdm"].item() != pytest.approx(output.losses["sdm"].item(), rel=1e-4)
    assert set(output.features) == {"image_tokens", "text_tokens"}  # one run of the text tower, not two
    assert output.features["text_tokens"].shape[1] == CONTEXT


@pytest.mark.parametrize("name", ["itc", "cmpm", "sdm", "asdm", "id", "irr", "efa"])
def test_every_part_is_switchable_alone_and_weighted(name):
    data = batch()
    single, double = (retriever(Objectives(**{name: weight, "irr_depth": 1})) for weight in (1.0, 2.0))
    output = single(data)
    assert list(output.losses) == [name]
    torch.testing.assert_close(double(data).losses[name], 2 * output.losses[name])
    assert (single.irr is not None) == (name == "irr")
    assert (single.classifier is not None) == (name == "id")
    output.losses[name].backward()
    # DDP refuses parameters that get no gradient
    without = [n for n, p in single.named_parameters() if p.requires_grad and p.grad is None]
    text_only = [n for n in without if not n.startswith("clip.visual.")]
    assert without == text_only == []


def test_losses_reach_the_shared_features():
    output = retriever(objectives("fmfa", irr_depth=1))(batch())
    for name, loss in output.losses.items():
        for feature in ("image_tokens", "text_tokens"):
            gradient = torch.autograd.grad(loss, output.features[feature], retain_graph=True, allow_unused=True)[0]
            if (name, feature) == ("irr", "text_tokens"):
                assert gradient is None  # the masked captions are a run of their own
            else:
                assert gradient.norm() > 0
    assert all(not torch.as_tensor(value).requires_grad for value in output.stats.values())


def test_missing_fields_of_a_batch_are_named():
    data = batch()
    del data["masked_ids"]
    with pytest.raises(ConfigError, match="lacks masked_ids"):
        retriever(Objectives(irr=1, irr_depth=1))(data)


def test_bfloat16_is_close_to_float32():
    data, wanted = batch(), objectives("fmfa", irr_depth=1)
    expected = retriever(wanted)(data).losses
    pure = retriever(wanted).to(torch.bfloat16)(data).losses
    with torch.autocast("cpu", torch.bfloat16):
        mixed = retriever(wanted)(data).losses
    for name, loss in expected.items():
        assert pure[name].item() == pytest.approx(loss.item(), rel=0.05), name
        assert mixed[name].item() == pytest.approx(loss.item(), rel=0.05), name


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (retriever(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["clip.visual.proj"], other["clip.visual.proj"])


def test_config_rebuilds_the_model_after_json():
    model = retriever(objectives("fmfa", irr_depth=2, irr_heads=3), stride=4, image_size=(40, 24))
    twin = ClipRetriever.from_config(json.loads(json.dumps(model.config)))
    assert {n: p.shape for n, p in twin.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    assert twin.objectives == model.objectives
    assert twin.config == model.config


def test_overlapping_patches():
    model = retriever(image_size=(48, 16), stride=4)
    tokens = model.encode_image(batch()["images"]).tokens
    assert tokens.shape[1] == 1 + 11 * 3
    assert tuple(model.clip.visual.grid_size) == (11, 3)


def test_position_embeddings_start_with_the_spread_asked_for():
    for asked, expected in ((None, 32**-0.5), (0.4, 0.4)):
        positions = retriever(position_std=asked).clip.visual.positional_embedding
        assert positions.std().item() == pytest.approx(expected, rel=0.15)


def test_position_grid_is_resized_bilinearly_corners_not_aligned():
    positions = torch.arange(5.0)[:, None]  # class 0; grid [[1, 2], [3, 4]]
    resized = resize_positions(positions, (1, 4))
    # halfway between the rows; columns at -0.25 (clamped), 0.25, 0.75 and 1.25 (clamped)
    torch.testing.assert_close(resized[:, 0], torch.tensor([0, 2.0, 2.25, 2.75, 3.0]))


@pytest.mark.parametrize(("name", "width"), [("ViT-B-16-quickgelu", 512), ("ViT-L-14", 768)])
def test_full_size_backbones_by_name(name, width):
    patch = open_clip.get_model_config(name)["vision_cfg"]["patch_size"]
    with torch.device("meta"):
        model = ClipRetriever(name, objectives("fmfa"), identities=11003, image_size=(384, 128))
        rows, columns = 384 // patch, 128 // patch
        assert model.clip.visual.positional_embedding.shape[0] == 1 + rows * columns
        assert model.irr.heads == width // 64
        assert len(model.irr.cross_modal_transformer.resblocks) == 4
        assert model.classifier.weight.shape == (11003, width)


def test_a_configuration_file_is_a_backbone(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config()))
    assert ClipRetriever(path).config == ClipRetriever(config()).config


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("ViT-B-1666", "no backbone 'ViT-B-1666'"),
        ("RN50", "not a plain CLIP"),
        ("ViT-B-16-SigLIP", "not a plain CLIP"),
        ("roberta-ViT-B-32", "not a plain CLIP"),
        ("coca_ViT-B-32", "not a plain CLIP"),
        ({"embed_dim": 8, "text_cfg": {}}, "lacks vision_cfg"),
        ("nothing/here.json", "cannot be read as JSON"),
        (config(vision={"patches": 3}), "open_clip cannot build"),
    ],
)
def test_other_backbones_are_refused(backbone, message):
    with pytest.raises(ConfigError, match=message):
        ClipRetriever(backbone)


def test_a_hub_backbone_without_a_network_names_the_way_out(monkeypatch):
    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr("fmfa.models.backbone.get_model_config", offline)
    with pytest.raises(ConfigError, match=r"no route to host.*Without a network, give a JSON file"):
        ClipRetriever("hf-hub:someone/something")


def test_wrong_sizes_are_errors():
    with pytest.raises(ConfigError, match=r"\(48, 24\) pixels .* \(48, 16\)"):
        retriever().encode_image(torch.zeros(1, 3, 48, 24))
    with pytest.raises(ConfigError, match="stride 9 with patch 8"):
        retriever(stride=9)
    with pytest.raises(ConfigError, match="number of training identities, found 0"):
        ClipRetriever(config(), Objectives(id=1))


def test_presets():
    fmfa, released = objectives("fmfa"), objectives("fmfa", "released", "ICFG-PEDES")
    assert (fmfa.asdm, fmfa.id, fmfa.irr, fmfa.efa, fmfa.sdm, fmfa.itc, fmfa.cmpm) == (
        1,
        1,
        1,
        1,
        0,
        0,
        0,
    )
    assert (fmfa.asdm_form, fmfa.asdm_alpha, fmfa.efa_cost) == ("paper", 10, "paper")
    assert (fmfa.efa_positions, fmfa.efa_keep, fmfa.retrieval_sees_mask) == ("caption", ">=", False)
    assert (released.asdm_form, released.asdm_alpha, released.efa_cost) == ("released", 0.1, "released")
    assert (released.efa_positions, released.efa_keep, released.retrieval_sees_mask) == ("all", ">", True)
    assert (released.efa_margin_text, released.efa_margin_image) == (0.1, 0.9)
    margins = {
        "CUHK-PEDES": (0.1, 0.1),
        "ICFG-PEDES": (0.2, 1.0),
        "RSTPReid": (0.2, 0.8),
        "SimPEDES": (0.1, 0.1),
    }
    for dataset, expected in margins.items():
        wanted = objectives("fmfa", dataset=dataset)
        assert (wanted.efa_margin_text, wanted.efa_margin_image) == expected
        assert wanted.asdm_alpha == (10 if dataset in ("CUHK-PEDES", "ICFG-PEDES", "my own") else 1)
    irra = objectives("irra", "released")
    assert (irra.sdm, irra.id, irra.irr, irra.asdm, irra.efa, irra.retrieval_sees_mask) == (
        1,
        1,
        1,
        0,
        0,
        True,
    )
    clip = objectives("clip", "released")
    assert (clip.itc, clip.sdm, clip.id, clip.irr, clip.needs_mask) == (1, 0, 0, 0, False)


def test_each_difference_between_the_presets_is_switchable_alone():
    paper, released = objectives("fmfa"), objectives("fmfa", "released")
    differences = [f.name for f in fields(Objectives) if getattr(paper, f.name) != getattr(released, f.name)]
    assert len(differences) == 7
    for name in differences:
        one = objectives("fmfa", **{name: getattr(released, name)})
        changed = [f.name for f in fields(Objectives) if getattr(one, f.name) != getattr(paper, f.name)]
        assert changed == [name]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"efa_sigmaa": 0.1}, "unknown objectives efa_sigmaa; known are"),
        ({"efa": -1.0}, "efa: should be greater than or equal to 0, found -1.0"),
        ({"efa": "1"}, "efa: should be a valid number, found '1'"),
        ({"irr_depth": 2.0}, "irr_depth: should be a valid integer, found 2.0"),
        ({"retrieval_sees_mask": 1}, "retrieval_sees_mask: should be a valid boolean, found 1"),
        ({"tau": 0.0}, "tau: should be greater than 0, found 0.0"),
        ({"sdm": float("nan")}, "sdm: should be a finite number, found nan"),
        ({"efa_keep": "="}, "efa_keep: should be '>=' or '>', found '='"),
        ({"asdm": 0, "id": 0, "irr": 0.0, "efa": 0}, "asdm, id, irr, efa, grounding are all 0: nothing to train"),
    ],
)
def test_wrong_objectives_are_errors(override, message):
    with pytest.raises(ConfigError, match=message):
        objectives("fmfa", **override)
    with pytest.raises(ConfigError, match="method is 'cmpm'"):
        objectives("cmpm")


def test_every_objective_is_a_plain_value_for_a_notebook():
    assert {type(field.default) for field in fields(Objectives)} <= {float, int, str, bool}
