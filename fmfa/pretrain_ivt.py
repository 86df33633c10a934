"""Pre-train IVT on SimPEDES' identity-free stream, or on any image-caption list, with ITC, ITM and MLM.

`python -m fmfa.pretrain_ivt data/tiny_ivt.safetensors --pairs 700000 --seed 0` makes the shipped weights from the
stream that the tiny CLIP sees. `--list FILE --images FOLDER` reads pairs from a JSON list instead. It resumes from
`OUT.resume` after an interruption and removes that file at the end.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

from fmfa.data.pretraining_pairs import ImageCaptionList, PretrainingPairs, collate_pairs
from fmfa.data.transforms import ivt_evaluation, ivt_training
from fmfa.errors import ConfigError
from fmfa.models.ivt_network import IvtConfig
from fmfa.models.ivt_pretraining import IvtPretrainer
from fmfa.pretrain import warmup_cosine_rate
from fmfa.progress import progress_bar
from fmfa.provenance import device_name, package_versions
from fmfa.simpedes.stream import web_pair
from fmfa.text.span_masking import CONTEXT
from fmfa.text.wordpiece import WordPieceTokenizer, wordpiece_tokenizer
from fmfa.weights.own import save_checkpoint

DATA = Path(__file__).parents[1] / "data"
TINY_IVT, VOCABULARY = DATA / "tiny_ivt_config.json", DATA / "wordpiece.txt"
_HELD_OUT = 512  # pairs of another stream seed, or of the end of a list, for the curve
_COUNTED = 64  # pairs that operations are counted on
_ENCODER = "encoder_vl."


class WebStream(Dataset):
    """The first `count` pairs of the stream of `seed`: picture uint8 [3, H, W] and alt-text."""

    def __init__(self, seed: int, size: tuple[int, int], count: int):
        self.seed, self.size, self.count = seed, size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image, text = web_pair(self.seed, index, self.size)
        return torch.from_numpy(image).permute(2, 0, 1), text


def pretrain(
    out: str | Path,
    *,
    pairs: int = 700_000,
    seed: int = 0,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.03,
    position_std: float = 0.4,
    fusion_depth: int = 2,
    precision: str = "bf16",
    workers: int = 1,
    device: str = "cpu",
    config: str | Path = TINY_IVT,
    vocabulary: str | Path = VOCABULARY,
    list: str = "",
    images: str = "",
) -> dict:
    """Train an IVT from scratch with ITC + ITM + MLM and write encoder and record to `out` (.safetensors, .json).

    Args:
        out: where the encoder's weights go, with the names of released checkpoints.
        pairs: pairs seen.
        seed: of weights, stream, order and masks.
        batch_size: pairs a step.
        learning_rate: peak of AdamW; linear warm-up over the share `warmup` of the steps, then cosine to 0.
        weight_decay: of AdamW, on matrices only.
        warmup: see `learning_rate`.
        position_std: of the initial image positions (released: 0.02, on top of an ImageNet ViT).
        fusion_depth: layers of the fusion encoder, which is not kept.
        precision: bf16 (autocast) or fp32.
        workers: processes that make pairs.
        device: where to train.
        config: JSON file with the fields of `IvtConfig`.
        vocabulary: WordPiece vocabulary.
        list: JSON list of records with `image` and `caption`; empty for the stream.
        images: folder that the list's `image` is relative to.

    Returns:
        The record: command, curve, budget, versions, time.

    Raises:
        ConfigError: vocabulary and model do not fit, a list without its folder, or fewer pairs than a batch.
    """
    settings = {k: (str(v) if isinstance(v, Path) else v) for k, v in locals().items() if k != "out"}
    out, started = Path(out), time.time()
    settings["config"] = sizes = json.loads(Path(config).read_text())
    tokenizer = wordpiece_tokenizer(vocabulary, min(CONTEXT, sizes["positions"]))
    _check(tokenizer, sizes, pairs // batch_size, list, images)
    size = tuple(sizes["image_size"])
    training, unseen = pairs_to_see(tokenizer, size, seed, pairs, list, images)
    model = build(sizes, fusion_depth, position_std, seed).to(device)
    optimizer = _optimizer(model, learning_rate, weight_decay)
    unseen = {key: value.to(device) for key, value in unseen.items()}
    budget = {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "encoder_parameters": sum(p.numel() for p in model.encoder_vl.parameters()),
        "training_flops_a_pair": training_flops(model, {k: v[:_COUNTED] for k, v in unseen.items()}),
    }
    print(json.dumps(budget))
    steps, step, curve, spent = pairs // batch_size, 0, [], 0.0
    resume = out.with_suffix(".resume")
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        if state["settings"] == settings:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, curve, spent = state["step"], state["curve"], state["seconds"]
    every = max(1, steps // 40)
    loader = DataLoader(
        training(first=step * batch_size, count=(steps - step) * batch_size),
        batch_size,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        collate_fn=collate_pairs,
        generator=torch.Generator(),
    )
    with progress_bar(steps, "pre-training", "steps", initial=step) as bar:
        for batch in loader:
            rate = learning_rate * warmup_cosine_rate(step / steps, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = {key: value.to(device) for key, value in batch.items()}
            losses = train_step(model, optimizer, batch, (seed, step), precision)
            step += 1
            bar.update()
            if step % every == 0 or step == steps:
                seconds = round(spent + time.time() - started, 1)
                found = {name: round(value.item(), 4) for name, value in losses.items()}
                curve.append({"pairs": step * batch_size, "losses": found, "temperature": round(model.temp.item(), 4),
                              "held_out_R@1": held_out_recall(model, unseen), "seconds": seconds})  # fmt: skip
                bar.set_postfix(**found, held_out=curve[-1]["held_out_R@1"])
                print(json.dumps(curve[-1]), flush=True)
                state = {"settings": settings, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"step": step, "curve": curve, "seconds": seconds}, resume.with_suffix(".part"))
                os.replace(resume.with_suffix(".part"), resume)
    record = {
        "what": f"IVT's encoder pre-trained on {list or 'the identity-free stream of SimPEDES'}",
        "command": _command(out, {**settings, "config": str(config)}),
        "settings": {k: v for k, v in settings.items() if k != "config"},
        "seconds": round(spent + time.time() - started, 1),
        "device": device_name(device),
        "budget": budget,
        "versions": package_versions(),
        "curve": curve,
        "model": {k: v for k, v in model.config.items() if k != "fusion_depth"},
    }
    encoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_ENCODER)}
    save_checkpoint(out, encoder, record)
    resume.unlink(missing_ok=True)
    return record


def pairs_to_see(
    tokenizer: WordPieceTokenizer, size: tuple[int, int], seed: int, count: int, pair_list: str = "", images: str = ""
) -> tuple[Callable[..., PretrainingPairs], dict[str, Tensor]]:
    """The training pairs, and the held-out pairs as one batch that is not augmented.

    Without a list: the first `count` pairs of the stream, each once as it is, and the first 512 of another stream. A
    list is shuffled at each pass and augmented as in fine-tuning; its last tenth, at most 512 pairs, is held out.

    Returns:
        A function of `first` and `count` that gives the dataset of those positions, and the batch.

    Raises:
        ConfigError: a list of fewer than four pairs.
    """
    plain, transform = ivt_evaluation(size), ivt_training(size)
    if pair_list:
        found = ImageCaptionList(pair_list, images, transform)
        if len(found) < 4:
            raise ConfigError(f"{pair_list}: {len(found)} pairs with a caption; pre-training needs four or more")
        kept = len(found) - min(_HELD_OUT, max(2, len(found) // 10))
        source, unseen = Subset(found, range(kept)), Subset(found, range(kept, len(found)))
    else:
        source, unseen = WebStream(seed, size, count), WebStream(seed + 1_000_000, size, _HELD_OUT)
    finish, random = (transform.finish, True) if pair_list else (plain.finish, False)
    training = partial(PretrainingPairs, source, tokenizer, finish, seed=seed, shuffle=random, flip=random)
    held_out = PretrainingPairs(unseen, tokenizer, plain.finish, seed=seed, first=0, count=len(unseen))
    return training, collate_pairs([held_out[i] for i in range(len(held_out))])


def build(sizes: Mapping, fusion_depth: int, position_std: float, seed: int) -> IvtPretrainer:
    """The model with the weights that pre-training starts from."""
    sizes = IvtConfig(**{**sizes, "image_size": tuple(sizes["image_size"])})
    model = IvtPretrainer(sizes, fusion_depth=fusion_depth, seed=seed)
    positions = model.encoder_vl.pos_embed
    with torch.no_grad():
        nn.init.normal_(positions, std=position_std, generator=torch.Generator().manual_seed(seed + 2))
    return model.train()


def train_step(
    model: IvtPretrainer,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    seed: tuple[int, int],
    precision: str,
) -> dict[str, Tensor]:
    """One update; everything random in it derives from `seed` alone. Returns the losses."""
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    model.reseed(number)
    with torch.random.fork_rng():  # dropout and drop path draw from the default generators
        torch.manual_seed(number)
        with torch.autocast(batch["images"].device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = model(batch).losses
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses


def training_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Floating-point operations a pair of one forward and backward pass on a batch.

    Matrix products and convolutions are counted, a multiplication and an addition as two. For every model whose forward
    takes a batch. Gradients are cleared; the default generators are left as they were, the model's own are not.
    """
    # The plain attention consists of matrix products, which the counter knows on every device.
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model(batch).losses.values()).backward()
    model.zero_grad(set_to_none=True)
    return round(counter.get_total_flops() / len(batch["images"]))


@torch.no_grad()
def held_out_recall(model: IvtPretrainer, batch: Mapping[str, Tensor]) -> float:
    """R@1 of text to image among the pairs of a batch, in eval mode."""
    model.eval()
    image = nn.functional.normalize(model.encode_image(batch["images"]).embedding, dim=-1)
    text = nn.functional.normalize(model.encode_text(batch["caption_ids"]).embedding, dim=-1)
    model.train()
    return round(float(((text @ image.T).argmax(1) == torch.arange(len(text), device=text.device)).float().mean()), 4)


def _command(out: Path, settings: Mapping) -> str:
    defaults = {k: str(v) if isinstance(v, Path) else v for k, v in pretrain.__kwdefaults__.items()}
    told = {k: v for k, v in settings.items() if k in ("pairs", "seed") or v != defaults[k]}
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in told.items())
    return f"python -m fmfa.pretrain_ivt data/{out.name} {options}"


def _check(tokenizer: WordPieceTokenizer, sizes: Mapping, steps: int, pair_list: str, images: str) -> None:
    if tokenizer.vocab_size != sizes["vocab_size"]:
        raise ConfigError(
            f"the vocabulary has {tokenizer.vocab_size} pieces, the configuration vocab_size {sizes['vocab_size']}; "
            "give the vocabulary that belongs to the configuration"
        )
    if bool(pair_list) != bool(images):
        raise ConfigError("a list of pairs and the folder of its pictures (--list, --images) go together; give both")
    if steps < 1:
        raise ConfigError("fewer pairs than one batch; ask for more pairs or a smaller batch_size")


def _optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.pretrain_ivt", description=__doc__)
    parser.add_argument("out")
    for name, value in pretrain.__kwdefaults__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    record = pretrain(options.pop("out"), **options)
    print(json.dumps(record["curve"][-1]))


if __name__ == "__main__":
    main()
