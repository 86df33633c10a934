"""Pre-train the tiny models on SimPEDES' identity-free stream, as CLIP was pre-trained on the web.

`python -m fmfa.pretrain data/tiny_clip.safetensors --pairs 250000 --seed 0` makes the shipped weights. It resumes
from `OUT.resume` after an interruption and removes that file at the end.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmfa.models.clip import ClipRetriever, Objectives
from fmfa.progress import progress_bar
from fmfa.provenance import device_name, package_versions
from fmfa.simpedes.stream import web_pair
from fmfa.text.tokens import Tokenizer, small_tokenizer
from fmfa.weights.own import save_checkpoint

TINY_CLIP = Path(__file__).parents[1] / "data" / "tiny_clip_config.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
_HELD_OUT = 512  # pairs of another stream seed, for the curve


class WebPairs(Dataset):
    """Pairs `first` to `first + count` of the stream: (image float32 [3, H, W] normalised, ids int64 [L])."""

    def __init__(self, seed: int, first: int, count: int, size: tuple[int, int], tokenizer: Tokenizer):
        self.seed, self.first, self.count, self.size, self.tokenizer = seed, first, count, size, tokenizer

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, text = web_pair(self.seed, self.first + index, self.size)
        return torch.from_numpy(image).permute(2, 0, 1), self.tokenizer([text])[0]


def _normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def pretrain(
    out: str | Path,
    *,
    pairs: int = 250_000,
    seed: int = 0,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    weight_decay: float = 0.05,
    tau: float = 0.07,
    warmup: float = 0.03,
    position_std: float = 0.4,
    precision: str = "bf16",
    workers: int = 1,
    device: str = "cpu",
    config: str | Path = TINY_CLIP,
) -> dict:
    """Train a CLIP from scratch with ITC and write weights and record to `out` (.safetensors, .json).

    Args:
        out: where the weights go.
        pairs: pictures with alt-text seen, each once.
        seed: of weights and stream.
        batch_size: pairs a step.
        learning_rate: peak of AdamW; linear warm-up over the share `warmup` of the steps, then cosine to 0.
        weight_decay: of AdamW, on matrices only.
        tau: temperature of ITC.
        warmup: see `learning_rate`.
        position_std: of the initial image positions.
        precision: bf16 (autocast) or fp32.
        workers: processes that render.
        device: where to train.
        config: open_clip configuration file.

    Returns:
        The record: command, curve, versions, time.
    """
    out, started = Path(out), time.time()
    settings = {k: (str(v) if isinstance(v, Path) else v) for k, v in locals().items() if k not in ("started", "out")}
    settings["config"] = json.loads(Path(config).read_text())
    tokenizer = small_tokenizer()
    objectives = Objectives(itc=1.0, tau=tau)
    model = ClipRetriever(settings["config"], objectives, position_std=position_std, seed=seed).to(device)
    size = tuple(settings["config"]["vision_cfg"]["image_size"])
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)
    steps, step, curve, spent = pairs // batch_size, 0, [], 0.0
    resume = out.with_suffix(".resume")
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        if state["settings"] == settings:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, curve, spent = state["step"], state["curve"], state["seconds"]
    every = max(1, steps // 40)
    unseen = WebPairs(seed + 1_000_000, 0, _HELD_OUT, size, tokenizer)
    held_out = [torch.stack(x) for x in zip(*(unseen[i] for i in range(len(unseen))), strict=True)]
    stream = WebPairs(seed, step * batch_size, (steps - step) * batch_size, size, tokenizer)
    loader = DataLoader(stream, batch_size, num_workers=workers, prefetch_factor=8 if workers else None)
    model.train()
    with progress_bar(steps, "pre-training", "steps", initial=step) as bar:
        for images, ids in loader:
            rate = learning_rate * warmup_cosine_rate(step / steps, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = {"images": _normalise(images.to(device)), "caption_ids": ids.to(device)}
            batch["labels"] = torch.arange(len(ids), device=device)
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = sum(model(batch).losses.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()
            if step % every == 0 or step == steps:
                found = _recall(model, *(x.to(device) for x in held_out))
                seconds = round(spent + time.time() - started, 1)
                curve.append({"pairs": step * batch_size, "loss": round(loss.item(), 4), "held_out_R@1": found,
                              "seconds": seconds})  # fmt: skip
                bar.set_postfix(loss=f"{loss.item():.2f}", held_out=f"{found:.3f}")
                print(json.dumps(curve[-1]), flush=True)
                state = {
                    "settings": settings,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                state |= {"step": step, "curve": curve, "seconds": seconds}
                torch.save(state, resume.with_suffix(".part"))
                os.replace(resume.with_suffix(".part"), resume)
    record = {
        "what": "tiny CLIP pre-trained on the identity-free stream of SimPEDES",
        "command": f"python -m fmfa.pretrain data/{out.name} --pairs {pairs} --seed {seed}",
        "settings": {k: v for k, v in settings.items() if k != "config"},
        "seconds": round(spent + time.time() - started, 1),
        "device": device_name(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": package_versions(),
        "curve": curve,
        "model": model.config,
    }
    save_checkpoint(out, model, record)
    resume.unlink(missing_ok=True)
    return record


def warmup_cosine_rate(progress: float, warmup: float) -> float:
    """Return the learning-rate factor at a share of all steps: linear over the share `warmup`, then cosine to 0."""
    if progress < warmup:
        return (progress + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.no_grad()
def _recall(model: ClipRetriever, images: Tensor, ids: Tensor) -> float:
    """R@1 of text to image among the held-out pairs, in eval mode."""
    model.eval()
    image = nn.functional.normalize(model.encode_image(_normalise(images)).embedding, dim=-1)
    text = nn.functional.normalize(model.encode_text(ids).embedding, dim=-1)
    model.train()
    return round(float(((text @ image.T).argmax(1) == torch.arange(len(ids), device=ids.device)).float().mean()), 4)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.pretrain", description=__doc__)
    parser.add_argument("out")
    defaults = pretrain.__kwdefaults__
    for name, value in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value) if name != "config" else Path, default=value
        )
    options = vars(parser.parse_args())
    record = pretrain(options.pop("out"), **options)
    print(json.dumps(record["curve"][-1]))


if __name__ == "__main__":
    main()
