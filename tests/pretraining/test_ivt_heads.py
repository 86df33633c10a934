import json
import math
from dataclasses import replace

import pytest
import torch
from formats import CAPTIONS, write_pair_list, write_wordpiece

from fmfa.data.images import ivt_evaluation, ivt_training
from fmfa.errors import AnnotationError, ConfigError, ImageError
from fmfa.models.ivt import IvtConfig, IvtRetriever
from fmfa.models.weights import load_weights
from fmfa.pretraining import ivt_heads as ivt_pretraining
from fmfa.pretraining.ivt_heads import FusionEncoder, IvtPretrainer, hard_negatives, itc_uniform
from fmfa.pretraining.methods import MaskedCaptions
from fmfa.pretraining.pairs import ImageCaptionList, PretrainingPairs, collate_pairs
from fmfa.text.wordpiece import SPECIAL, wordpiece_tokenizer

TINY = IvtConfig(width=32, depth=2, heads=2, image_size=(32, 16), patch=8, stride=8, vocab_size=50, positions=24)
STILL = replace(TINY, drop_path=0.0, text_dropout=0.0)
MASK = SPECIAL.index("[MASK]")
UNUSED = tuple(
    f"encoder_fusion.bert.embeddings.{name}"
    for name in ("position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
)


def make_batch(rows=6, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (rows, length), generator=generator)
    for row, texts in enumerate(ids):
        texts[length - row % 4 :] = 0
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen[:, 2] = chosen[1:3, 4] = True
    return {
        "images": torch.randn(rows, 3, 32, 16, generator=generator),
        "caption_ids": ids,
        "masked_ids": torch.where(chosen, MASK, ids),
        "masked_labels": torch.where(chosen, ids, 0),
        "labels": torch.arange(rows),
    }


def naive_itc(image, text, labels, temperature):
    total = 0.0
    for rows, columns in ((image, text), (text, image)):
        for i in range(len(rows)):
            logits = [(rows[i] @ column).item() / temperature for column in columns]
            highest = max(logits)
            log_sum = highest + math.log(sum(math.exp(value - highest) for value in logits))
            positives = [j for j in range(len(rows)) if labels[i] == labels[j]]
            total -= sum(logits[j] - log_sum for j in positives) / len(positives)
    return total / (2 * len(image))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0]])
def test_itc_against_a_double_loop(labels):
    model, batch = IvtPretrainer(STILL, fusion_depth=1), make_batch()
    batch["labels"] = torch.tensor(labels)
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["caption_ids"])
    expected = naive_itc(image.embedding, text.embedding, labels, 0.5)
    assert image.embedding.norm(dim=1).mean() > 2  # not normalised
    assert model(batch).losses["itc"].item() == pytest.approx(expected, rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    found = itc_uniform(image @ text.T / 0.7, batch["labels"])
    assert found.item() == pytest.approx(naive_itc(image, text, labels, 0.7), rel=1e-12)


def test_negatives_follow_softmax_plus_1e_4_and_are_never_positives():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(5, 5, generator=generator)
    logits[2, 0] = 80.0  # the positive that softmax would nearly always pick
    labels = torch.tensor([0, 1, 0, 2, 3])
    counts = torch.zeros(5, 5)
    for _ in range(3000):
        counts[torch.arange(5), hard_negatives(logits, labels, generator)] += 1
    weights = logits.softmax(1) + 1e-4
    weights[labels[:, None] == labels[None]] = 0
    assert (counts[labels[:, None] == labels[None]] == 0).all()
    assert torch.allclose(counts / 3000, weights / weights.sum(1, keepdim=True), atol=0.03)
    assert (counts[2, [1, 3, 4]] > 800).all()  # only the 1e-4 is left of each


def test_negatives_come_from_the_given_generator_alone():
    logits, labels = torch.zeros(8, 8), torch.arange(8)
    state = torch.random.get_rng_state()
    drawn = [hard_negatives(logits, labels, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("labels", [[0], [3, 3, 3], [0, 0, 0]])
def test_a_batch_without_negatives_is_refused(labels):
    with pytest.raises(ConfigError, match="without a negative"):
        hard_negatives(torch.zeros(len(labels), len(labels)), torch.tensor(labels), torch.Generator())


def recorded(model, batch):
    """The fusion encoder's calls during a forward pass: (text tokens, mask, image tokens), and the output."""
    calls = []
    handle = model.encoder_fusion.register_forward_pre_hook(lambda module, given: calls.append(given))
    output = model(batch)
    handle.remove()
    return calls, output


def test_matching_sees_b_pairs_and_two_b_negatives():
    model, batch = IvtPretrainer(STILL, fusion_depth=1).eval(), make_batch()
    batch["labels"] = torch.tensor([0, 1, 2, 0, 3, 4])
    image = model.encode_image(batch["images"]).tokens
    text = model.encode_text(batch["caption_ids"]).tokens
    (text_rows, mask, image_rows), _ = recorded(model, batch)[0]
    assert len(text_rows) == len(image_rows) == 18
    found = []
    for row in range(18):
        i = [k for k in range(6) if torch.allclose(image_rows[row], image[k], atol=1e-6)]
        t = [k for k in range(6) if torch.allclose(text_rows[row], text[k], atol=1e-6)]
        assert len(i) == len(t) == 1
        assert torch.equal(mask[row], batch["caption_ids"][t[0]] != 0)
        found.append((i[0], t[0]))
    labels = batch["labels"].tolist()
    assert found[:6] == [(k, k) for k in range(6)]
    assert [t for _, t in found[6:12]] == list(range(6))  # one image for each text
    assert [i for i, _ in found[12:]] == list(range(6))  # one text for each image
    assert all(labels[i] != labels[t] for i, t in found[6:])
    model.reseed(5)
    output = model(batch)
    model.reseed(5)
    (tokens, mask, images), _ = recorded(model, batch)[0]
    logits = model.itm(model.encoder_fusion(tokens, mask, images)[:, 0])
    by_hand = sum(
        -math.log(math.exp(row[int(k < 6)]) / (math.exp(row[0]) + math.exp(row[1])))
        for k, row in enumerate(logits.tolist())
    )
    assert output.losses["itm"].item() == pytest.approx(by_hand / 18, rel=1e-5)


def test_images_and_texts_are_drawn_from_their_own_direction(monkeypatch):
    model, batch, given = IvtPretrainer(STILL, fusion_depth=1).eval(), make_batch(), []
    draw = ivt_pretraining.hard_negatives
    monkeypatch.setattr(ivt_pretraining, "hard_negatives", lambda *a: (given.append(a[0]), draw(*a))[1])
    (_, _, image_rows), _ = recorded(model, batch)[0]
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["caption_ids"])
    similarity = image.embedding @ text.embedding.T / 0.5
    assert torch.allclose(given[0], similarity, atol=1e-4)  # texts for images
    assert torch.allclose(given[1], similarity.T, atol=1e-4)  # images for texts
    assert torch.equal(image_rows[:6], image_rows[12:])


def test_words_are_asked_for_at_masked_positions_only():
    model, batch = IvtPretrainer(STILL, fusion_depth=1).eval(), make_batch()
    image = model.encode_image(batch["images"]).tokens
    masked = model.encode_text(batch["masked_ids"], batch["caption_ids"] != 0).tokens
    calls, output = recorded(model, batch)
    tokens, _, images = calls[1]
    assert torch.allclose(tokens, masked, atol=1e-6)
    assert torch.allclose(images, image, atol=1e-6)
    total, count = 0.0, 0
    for row in range(6):
        keep = batch["caption_ids"][row : row + 1] != 0
        fused = model.encoder_fusion(masked[row : row + 1], keep, image[row : row + 1])
        for position in range(10):
            if (label := int(batch["masked_labels"][row, position])) != 0:
                total -= model.encoder_fusion.words(fused)[0, position].log_softmax(0)[label].item()
                count += 1
    assert count == 8
    assert output.losses["mlm"].item() == pytest.approx(total / 8, rel=1e-5)


def test_a_batch_without_masked_words_has_no_word_loss():
    batch = make_batch()
    batch["masked_labels"] = torch.zeros_like(batch["masked_labels"])
    output = IvtPretrainer(STILL, fusion_depth=1)(batch)
    assert output.losses["mlm"].item() == 0
    sum(output.losses.values()).backward()


def test_padding_does_not_change_the_losses():
    model, batch = IvtPretrainer(STILL, fusion_depth=2).eval(), make_batch()
    padded = {k: torch.nn.functional.pad(v, (0, 3)) if v.dim() == 2 else v for k, v in batch.items()}
    losses = []
    for given in (batch, padded):
        model.reseed(0)
        losses.append(torch.stack(list(model(given).losses.values())))
    assert torch.allclose(*losses, atol=1e-5)


def test_gradients_reach_everything_that_is_used():
    model = IvtPretrainer(TINY, fusion_depth=2)
    sum(model(make_batch()).losses.values()).backward()
    named = dict(model.named_parameters())
    without = {name for name, p in named.items() if p.grad is None or not p.grad.abs().sum()}
    assert without == set(UNUSED)
    assert not any(named[name].requires_grad for name in UNUSED)
    token_types = named["encoder_vl.embeddings.token_type_embeddings.weight"].grad
    assert token_types[0].any()
    assert not token_types[1].any()


def test_image_and_text_learn_from_every_loss():
    model, batch = IvtPretrainer(STILL, fusion_depth=1), make_batch()
    with torch.no_grad():  # at 0.02 the fusion encoder hardly reacts to its input
        model.encoder_fusion.bert.encoder.layer[0].crossattention.self.value.weight.normal_()
    for name in ("itc", "itm", "mlm"):
        model.zero_grad()
        model(batch).losses[name].backward()
        assert model.encoder_vl.patch_embed.proj.weight.grad.abs().sum() > 0, name
        assert model.encoder_vl.blocks[0].mlp_txt.fc1.weight.grad.abs().sum() > 0, name
        assert (model.temp.grad is not None) == (name == "itc")


def test_matching_tells_sixteen_fixed_pairs_from_their_hard_negatives():
    """The shipped tiny IVT never learnt matching; the loss and its head can."""
    model, batch = IvtPretrainer(STILL, fusion_depth=2, seed=1), make_batch(rows=16)
    with torch.no_grad():
        model.temp.fill_(6.7)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_((768 / 32) ** 0.5)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(80):
        model.reseed(step)
        output = model(batch)
        optimizer.zero_grad()
        (output.losses["itm"] + output.losses["itc"]).backward()
        optimizer.step()
    assert output.stats["itm_accuracy"] > 0.95  # "not a pair" for all: 0.67


def test_no_token_is_dropped_and_the_encoder_is_the_retrievers():
    model, plain = IvtPretrainer(TINY, fusion_depth=1, seed=4), IvtRetriever(TINY, seed=4)
    output = model.train()(make_batch())
    assert output.features["image_tokens"].shape == (6, 1 + 8, 32)
    assert output.features["text_tokens"].shape == (6, 10, 32)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    assert model.temp.item() == 0.5
    report = load_weights(plain, state)
    assert set(report.left_out) == {n for n in state if not n.startswith("encoder_vl.")}
    assert not report.missing


def test_released_names_and_shapes_at_full_size():
    with torch.device("meta"):
        fusion = FusionEncoder(IvtConfig(stride=16))
    expected = {
        "bert.embeddings.word_embeddings.weight": (30522, 768),
        "bert.embeddings.position_embeddings.weight": (512, 768),
        "bert.embeddings.token_type_embeddings.weight": (2, 768),
        "cls.predictions.bias": (30522,),
        "cls.predictions.transform.dense.weight": (768, 768),
        "cls.predictions.transform.dense.bias": (768,),
        "cls.predictions.decoder.weight": (30522, 768),
        "cls.predictions.decoder.bias": (30522,),
    }
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for i in range(6):
        layer = f"bert.encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                expected[f"{layer}.{attention}.{part}.weight"] = (768, 768)
                expected[f"{layer}.{attention}.{part}.bias"] = (768,)
            norms.append(f"{layer}.{attention}.output.LayerNorm")
        expected[f"{layer}.intermediate.dense.weight"] = (3072, 768)
        expected[f"{layer}.intermediate.dense.bias"] = (3072,)
        expected[f"{layer}.output.dense.weight"] = (768, 3072)
        expected[f"{layer}.output.dense.bias"] = (768,)
        norms.append(f"{layer}.output.LayerNorm")
    expected |= {f"{norm}.{kind}": (768,) for norm in norms for kind in ("weight", "bias")}
    assert {name: tuple(tensor.shape) for name, tensor in fusion.state_dict().items()} == expected
    assert fusion.cls.predictions.decoder.weight is fusion.bert.embeddings.word_embeddings.weight
    top = {name.split(".")[0] for name in IvtPretrainer(TINY, fusion_depth=1).state_dict()}
    assert top == {"encoder_vl", "encoder_fusion", "itm", "temp"}
    assert IvtPretrainer(TINY, fusion_depth=1).itm.weight.shape == (2, 32)


def test_bfloat16_agrees_with_float32():
    model, batch = IvtPretrainer(STILL, fusion_depth=1), make_batch()
    model.reseed(0)
    full = model(batch).losses
    model.reseed(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch).losses
    assert {loss.dtype for loss in half.values()} == {torch.float32}
    # Logits of up to some 60 of features with 8 bits: the contrast is the least exact.
    assert {name: loss.item() for name, loss in half.items()} == pytest.approx(
        {name: loss.item() for name, loss in full.items()}, rel=0.05
    )
    sum(half.values()).backward()


@pytest.fixture
def pair_list(tmp_path):
    write_pair_list(tmp_path)
    write_wordpiece(CAPTIONS, tmp_path / "vocab.txt")
    return tmp_path


def test_lists_are_read_and_labelled_by_running_index(pair_list):
    transform = ivt_training((32, 16))
    pairs = ImageCaptionList(pair_list / "pairs.json", pair_list, transform)
    assert len(pairs) == 6  # "..." has no word
    picture, caption = pairs[3]
    assert caption == "white shoes"
    assert torch.equal(picture, transform.read(pair_list / "4.png"))
    tokenizer = wordpiece_tokenizer(pair_list / "vocab.txt", 50)
    captions, finish = MaskedCaptions(tokenizer), ivt_evaluation((32, 16)).finish
    samples = PretrainingPairs(pairs, captions, finish, seed=0, first=0, count=6)
    batch = collate_pairs([samples[i] for i in range(6)])
    assert batch["labels"].tolist() == list(range(6))
    assert torch.equal(
        batch["caption_ids"][1], tokenizer(["blue jeans new", *CAPTIONS])[0, : batch["masked_ids"].shape[1]]
    )
    assert torch.equal(batch["attention_mask"], (batch["caption_ids"] != 0).long())
    asked = batch["masked_labels"] != 0
    assert torch.equal(batch["masked_ids"][~asked], batch["caption_ids"][~asked])
    assert (asked.sum(1) > 0).all()
    assert batch["images"].shape == (6, 3, 32, 16)
    assert batch["images"].min() >= -1


def test_each_pass_has_every_pair_once_in_another_order(pair_list):
    pairs = ImageCaptionList(pair_list / "pairs.json", pair_list, ivt_training((32, 16)))
    captions = MaskedCaptions(wordpiece_tokenizer(pair_list / "vocab.txt", 50))
    finish = ivt_training((32, 16)).finish

    def samples(first, count):
        found = PretrainingPairs(pairs, captions, finish, seed=2, first=first, count=count, random=True)
        return [found[i] for i in range(count)]

    passes = [[int(sample["labels"]) for sample in samples(start, 6)] for start in (0, 6)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(6))
    assert passes[0] != passes[1]
    whole, part = samples(0, 12), samples(8, 4)
    for sample, again in zip(whole[8:], part):
        assert all(torch.equal(sample[key], again[key]) for key in sample)
    first, second = (sample for sample in whole if sample["labels"] == 0)
    assert not torch.equal(first["images"], second["images"])


def test_unreadable_pictures_and_wrong_lists_name_the_file(pair_list):
    transform = ivt_training((32, 16))
    (pair_list / "0.png").write_bytes(b"no picture")
    pairs = ImageCaptionList(pair_list / "pairs.json", pair_list, transform)
    with pytest.raises(ImageError, match=r"0\.png"):
        pairs[0]
    wrong = pair_list / "wrong.json"
    for content, message in (
        ([{"image": "a.png", "text": "a"}], "record 0: found image, text; expected the texts"),
        ([{"image": "a.png", "caption": ["a", "b"]}], "record 0: found image, caption; expected the texts"),
    ):
        wrong.write_text(json.dumps(content))
        with pytest.raises(AnnotationError, match=f"wrong.json.*{message}"):
            ImageCaptionList(wrong, pair_list, transform)
    wrong.write_text(json.dumps([{"image": "../a.png", "caption": "a coat"}]))
    with pytest.raises(ImageError, match="leaves the image folder"):
        ImageCaptionList(wrong, pair_list, transform)[0]
