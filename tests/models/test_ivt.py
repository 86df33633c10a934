import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from fmfa.errors import ConfigError
from fmfa.losses.matching import cmpm, sdm
from fmfa.models import ivt
from fmfa.models.ivt import IvtConfig, IvtRetriever, draw_kept
from tests import parity
from tests.parity import ivt as parity_ivt

FIXTURE = Path(__file__).parents[1] / "fixtures" / "ivt_small.npz"
TINY = IvtConfig(width=32, depth=2, heads=2, image_size=(32, 16), patch=8, stride=6, vocab_size=50, positions=24)
STILL = replace(TINY, drop_path=0.0, text_dropout=0.0, mask_image=0.0, mask_text=0.0)


@pytest.fixture(scope="module")
def arrays():
    with np.load(FIXTURE) as file:
        return dict(file)


def make_batch(rows=6, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (rows, length), generator=generator)
    for row, texts in enumerate(ids):
        texts[length - row % 4 :] = 0
    return {
        "images": torch.randn(rows, 3, 32, 16, generator=generator),
        "caption_ids": ids,
        "labels": torch.arange(rows) // 2,
    }


def test_the_parity_command_reads_ivt_files(capsys):
    assert parity.main([str(FIXTURE)]) == 0
    assert "159 quantities, 0 above the limit" in capsys.readouterr().out


def test_every_quantity_of_the_parity_file_within_its_limit(arrays):
    rows = {name: (difference, limit) for name, difference, limit in parity_ivt.ivt_rows(arrays)}
    computed = {n for n in arrays if n.startswith(("eval/", "train/", "units/"))}
    assert computed - rows.keys() == {n for n in computed if parity_ivt.GIVEN.search(n)}
    parameters = [name for name, _ in parity_ivt.ivt_model(arrays).named_parameters()]
    assert len(parameters) == 44
    for variant in ("nomask", "mask_mid", "mask_max"):
        assert {f"train/{variant}/grad_norm/{name}" for name in parameters} <= rows.keys()
    assert all(difference < 1e-6 for difference, _ in rows.values()), rows
    assert {limit for _, limit in rows.values()} == {1e-4, 1e-6}


def test_parity_fails_when_the_loss_is_broken(arrays, monkeypatch):
    def l1_target(image, text, identity):
        same = (identity[:, None] == identity[None]).double()
        return cmpm(image, text, identity) + same.sum(1).log().mean()

    monkeypatch.setattr(ivt, "cmpm", l1_target)
    failed = {name for name, difference, limit in parity_ivt.ivt_rows(arrays) if difference > limit}
    assert failed == {f"{n}/cmpm" for n in ("eval", "train/nomask", "train/mask_mid", "train/mask_max")}


def test_parity_reports_quantities_that_it_does_not_know(arrays):
    changed = arrays | {"eval/novelty": np.ones(3), "eval/cmpm": arrays["eval/cmpm"] + 1e-4}
    failed = {name for name, difference, limit in parity_ivt.ivt_rows(changed) if difference > limit}
    assert failed == {"eval/novelty", "eval/cmpm"}


def naive_cmpm(image, text, identity):
    total = 0.0
    for projected, onto in ((image, text), (text, image)):
        for i in range(len(image)):
            logits = [float(projected[i] @ onto[j]) / float(onto[j].norm()) for j in range(len(image))]
            norm = sum(math.exp(value) for value in logits)
            positives = sum(int(identity[i] == identity[j]) for j in range(len(image)))
            for j, value in enumerate(logits):
                p = math.exp(value) / norm
                q = float(identity[i] == identity[j]) / math.sqrt(positives)
                total += p * (math.log(p) - math.log(q + 1e-8)) / len(image)
    return total


def test_cmpm_against_a_double_loop():
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    identity = torch.tensor([4, 0, 4, 4, 1, 0, 9])
    ours = cmpm(image, text, identity)
    assert ours.item() == pytest.approx(naive_cmpm(image, text, identity), rel=1e-12)
    half = cmpm(image.bfloat16(), text.bfloat16(), identity)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(ours.item(), rel=0.02)


def test_cmpm_of_a_perfect_match_is_minus_log_of_the_positives():
    identity = torch.arange(5).repeat_interleave(4)
    features = 60 * torch.nn.functional.one_hot(identity).double()
    assert cmpm(features, features, identity).item() == pytest.approx(-math.log(4), abs=1e-6)


def test_padding_does_not_change_the_text():
    model = IvtRetriever(STILL, seed=1).double().eval()
    ids = make_batch()["caption_ids"]
    longer = torch.nn.functional.pad(ids, (0, 9))
    short, long = model.encode_text(ids), model.encode_text(longer)
    assert torch.allclose(short.tokens, long.tokens[:, :10], atol=1e-12)
    explicit = model.encode_text(longer, attention_mask=(longer != 0).long())
    assert torch.equal(explicit.tokens, long.tokens)
    unmasked = model.encode_text(longer, attention_mask=torch.ones_like(longer))
    assert not torch.allclose(unmasked.embedding, long.embedding, atol=1e-6)


def test_the_order_of_kept_positions_does_not_matter_but_which_are_kept_does():
    model = IvtRetriever(STILL, seed=1).double().eval()
    batch = double_batch()
    patches = model.encode_image(batch["images"]).tokens.shape[1] - 1
    assert patches == 10  # 5 x 2 patches of 8 pixels at stride 6
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(0)) + 1
    whole = model.encode_image(batch["images"])
    shuffled = model.encode_image(batch["images"], order)
    assert torch.allclose(shuffled.embedding, whole.embedding, atol=1e-12)
    assert torch.allclose(shuffled.tokens[:, 1:], whole.tokens[:, order], atol=1e-12)
    fewer = model.encode_image(batch["images"], order[3:])
    assert fewer.tokens.shape == (6, 8, 32)
    assert not torch.allclose(fewer.embedding, whole.embedding, atol=1e-4)


def test_dropped_positions_are_uniform():
    generator = torch.Generator().manual_seed(0)
    draws = [draw_kept(14, 0.2, generator) for _ in range(6000)]
    lengths = torch.tensor([len(draw) for draw in draws])
    assert set(lengths.tolist()) == {11, 12, 13, 14}  # floor(0.2 * 15) = 3
    assert all(abs(int((lengths == n).sum()) - 1500) < 200 for n in (11, 12, 13, 14))
    kept = torch.bincount(torch.cat(draws), minlength=15)
    assert kept[0] == 0
    assert (kept[1:] - 6000 * 12.5 / 14).abs().max() < 150
    assert all(len(set(draw.tolist())) == len(draw) for draw in draws[:200])
    assert [len(draw_kept(310, 0.2, generator)) for _ in range(300)].count(310) < 30
    assert draw_kept(0, 0.2, generator).tolist() == []


@pytest.mark.parametrize(("mask_image", "mask_text"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.0, 0.0)])
def test_masking_is_switched_by_modality_and_off_in_evaluation(mask_image, mask_text):
    model = IvtRetriever(replace(STILL, mask_image=mask_image, mask_text=mask_text))
    batch = make_batch()
    stats = [model(batch).stats for _ in range(12)]
    assert any(s["image_tokens_dropped"] for s in stats) == bool(mask_image)
    assert any(s["text_tokens_dropped"] for s in stats) == bool(mask_text)
    model.eval()
    still = [model(batch).stats for _ in range(6)]
    assert not any(s[name] for s in still for name in ("image_tokens_dropped", "text_tokens_dropped"))


def test_masking_repeats_with_its_seed_only():
    model = IvtRetriever(replace(STILL, mask_image=0.5, mask_text=0.5), seed=5)
    batch = make_batch()

    def losses(steps):
        return [model(batch).losses["cmpm"].item() for _ in range(steps)]

    first = losses(5)
    assert len(set(first)) > 1
    torch.manual_seed(99)
    model.reseed(5)
    assert losses(5) == first


def test_each_modality_trains_the_shared_parts_and_its_own_mlp():
    batch = make_batch()
    for modality, own, other in (("image", "mlp_vis", "mlp_txt"), ("text", "mlp_txt", "mlp_vis")):
        model = IvtRetriever(STILL)
        encode = model.encode_image if modality == "image" else model.encode_text
        encode(batch["images" if modality == "image" else "caption_ids"]).embedding.square().sum().backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None}
        untouched = {name for name, _ in model.named_parameters()} - touched
        assert all(other in name for name in untouched if ".blocks." in name)
        assert {f"encoder_vl.blocks.{i}.{own}.fc2.weight" for i in (0, 1)} <= touched
        assert {f"encoder_vl.blocks.{i}.attn.qkv.weight" for i in (0, 1)} <= touched
        assert "encoder_vl.norm.weight" in touched


def test_outputs_follow_the_model_interface():
    model = IvtRetriever(STILL).eval()
    batch = make_batch()
    output = model(batch)
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["caption_ids"])
    assert torch.equal(output.features["image_tokens"], image.tokens)
    assert torch.equal(output.features["text_tokens"], text.tokens)
    assert torch.equal(image.embedding, image.tokens[:, 0])
    assert text.tokens.shape == (6, 10, 32)
    expected = cmpm(image.embedding, text.embedding, batch["labels"])
    assert list(output.losses) == ["cmpm"]
    assert torch.equal(output.losses["cmpm"], expected)


def test_sdm_takes_the_place_of_cmpm():
    model = IvtRetriever(replace(STILL, loss="sdm", tau=0.05)).eval()
    batch = make_batch()
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["caption_ids"])
    expected = sdm(image.embedding, text.embedding, batch["labels"], scale=20.0)
    losses = model(batch).losses
    assert list(losses) == ["sdm"]
    assert losses["sdm"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_same_seed_same_weights_whatever_the_global_generator():
    torch.manual_seed(1)
    first = IvtRetriever(TINY, seed=3).state_dict()
    torch.manual_seed(2)
    second = IvtRetriever(TINY, seed=3).state_dict()
    other = IvtRetriever(TINY, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {
        name for name in first if not name.endswith("bias") and "norm" not in name and "LayerNorm" not in name
    }
    assert first["encoder_vl.embeddings.word_embeddings.weight"][0].abs().max() == 0
    convolution = IvtRetriever(replace(TINY, width=256)).encoder_vl.patch_embed.proj.weight
    assert convolution.std().item() == pytest.approx((2 / (8 * 8 * 256)) ** 0.5, rel=0.02)
    assert first["encoder_vl.blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_drop_path_rises_linearly_and_the_stem_has_dropout():
    model = IvtRetriever(replace(TINY, depth=5, drop_path=0.2))
    rates = [block.drop_path.drop_prob for block in model.encoder_vl.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    ids = make_batch()["caption_ids"]
    stem = model.encoder_vl.embeddings
    assert (stem(ids) == 0).float().mean() > 0.05
    assert not (stem.eval()(ids) == 0).any()


@pytest.mark.parametrize(("stride", "tokens", "millions"), [(12, 311, 166.63), (16, 193, 166.45)])
def test_full_size(stride, tokens, millions):
    with torch.device("meta"):
        model = IvtRetriever(IvtConfig(stride=stride))
        image = model.encode_image(torch.empty(2, 3, 384, 128))
        text = model.encode_text(torch.ones(2, 60, dtype=torch.int64))
    assert image.tokens.shape == (2, tokens, 768)
    assert text.tokens.shape == (2, 60, 768)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_mixed_precision_gives_a_float32_loss():
    model = IvtRetriever(STILL).eval()
    batch = make_batch()
    exact = model(batch).losses["cmpm"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(batch).losses["cmpm"]
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_few_steps_lower_the_joint_loss_of_three_levels():
    model = IvtRetriever(TINY, seed=0)
    levels = [make_batch(seed=seed) for seed in range(3)]
    batch = {name: torch.cat([level[name] for level in levels]) for name in levels[0]}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = model(batch).losses["cmpm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 32 is not a multiple of heads 3"),
        ({"stride": 9}, "patch 8 at stride 9"),
        ({"image_size": (32, 7)}, "does not fit"),
        ({"mask_image": 1.0}, "mask_image: should be less than 1"),
        ({"loss": "itc"}, "loss: should be 'cmpm' or 'sdm'"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_inputs_that_do_not_fit_are_refused():
    model = IvtRetriever(TINY)
    with pytest.raises(ConfigError, match=r"images of \(16, 32\).*\(32, 16\)"):
        model.encode_image(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ConfigError, match="texts of 25 positions, the model has 24"):
        model.encode_text(torch.ones(1, 25, dtype=torch.int64))


def shard(batch, rank):
    rows = slice(0, 4) if rank == 0 else slice(4, 6)
    part = {name: value[rows] for name, value in batch.items()}
    if rank:
        part["caption_ids"] = part["caption_ids"][:, :9]
    return part


def masked_model():
    return IvtRetriever(replace(STILL, mask_image=0.5, mask_text=0.5), seed=2).double()


def double_batch():
    batch = make_batch()
    batch["images"] = batch["images"].double()
    batch["caption_ids"][4:, 9:] = 0
    return batch


def train_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model = masked_model()
    parallel = DistributedDataParallel(model)
    loss = parallel(shard(double_batch(), rank)).losses["cmpm"]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"loss": loss.detach(), "gradients": gradients}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    multiprocessing.spawn(train_rank, args=(str(tmp_path),), nprocs=2)
    model = masked_model()
    output = model(double_batch())
    output.losses["cmpm"].backward()
    assert output.stats["text_tokens_dropped"] > 0
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result["loss"].item() == pytest.approx(output.losses["cmpm"].item(), rel=1e-10)
        for name, parameter in model.named_parameters():
            assert torch.allclose(result["gradients"][name], parameter.grad, atol=1e-9), name
