"""fp16's loss scaler, for real on a CPU: torch has one there, which Accelerate does not use; and bf16."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from toy_training import ToyModel, pairs_train, pairs_train_ivt, toy_fit

import fmfa.training.fit
from fmfa.errors import TrainingError
from fmfa.records import read_metrics, read_record
from fmfa.training.checkpoints import OPTIMIZER, find_checkpoint

SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "factors": "flat"}


class Crash(BaseException):
    """Stands for a process that ends between two instructions."""


@pytest.fixture
def half(monkeypatch):
    """A function that sets the scaler's first scale; from then on fp16 trains on this CPU as on a GPU."""

    def start(scale):
        class HalfOnCpu(Accelerator):
            def __init__(self, **settings):
                super().__init__(**(settings | {"mixed_precision": "no"}))
                self.state._mixed_precision, self.native_amp = "fp16", True
                self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)

        monkeypatch.setattr(fmfa.training.fit, "Accelerator", HalfOnCpu)
        monkeypatch.setattr(fmfa.training.fit, "_on_cpu", lambda config: True)

    return start


class Watched(ToyModel):
    """Remembers the precision of its layers and its weights before every step."""

    def __init__(self, crash_at=-1):
        super().__init__(dropout=0.0)
        self.types, self.weights, self.crash_at = set(), [], crash_at

    def forward(self, batch):
        if self.calls == self.crash_at:
            raise Crash
        self.types.add(self.image(batch["images"]).dtype)
        self.weights.append(self.image.weight.detach().clone())
        return super().forward(batch)


def values(folder, metric):
    metrics = read_metrics(folder)
    return metrics[(metrics["split"] == "train") & (metrics["metric"] == metric)]["value"].tolist()


def test_fp16_leaves_out_the_steps_that_overflow_until_the_scale_fits(half, tmp_path):
    half(2.0**24)
    model = toy_fit(tmp_path, Watched(), precision="fp16")
    assert model.types == {torch.float16}
    assert model.image.weight.dtype == torch.float32
    still = [torch.equal(a, b) for a, b in zip(model.weights, model.weights[1:])]
    skipped = still.index(False)
    assert skipped > 2
    shares = values(tmp_path, "skipped_steps")
    assert shares[0] >= skipped / 6 or shares[0] == 1
    losses = values(tmp_path, "loss/total")
    assert losses[-1] < losses[0]
    assert read_record(tmp_path)["steps"] == 18
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
def test_fp16_clips_and_logs_the_gradient_without_the_scale(clip_norm, half, tmp_path):
    changes = SGD | {"learning_rate": 1.0, "epochs": 1, "size": 24, "validate": None, "clip_norm": clip_norm}
    toy_fit(tmp_path / "single", Watched(), **changes)
    (expected,) = values(tmp_path / "single", "gradient_norm")
    half(64.0)
    start, model = ToyModel(), toy_fit(tmp_path / "half", Watched(), precision="fp16", **changes)
    (norm,) = values(tmp_path / "half", "gradient_norm")
    assert norm == pytest.approx(expected, rel=0.01)
    squares = [(a - b).detach().square().sum() for a, b in zip(model.parameters(), start.parameters())]
    assert float(sum(squares).sqrt()) == pytest.approx(clip_norm or expected, rel=0.01)


def scaler(run):
    return torch.load(find_checkpoint(run, "last") / OPTIMIZER, weights_only=True)["scaler"]


def test_fp16_resumes_with_the_scale_it_had(half, tmp_path):
    half(2.0**20)
    toy_fit(tmp_path / "whole", Watched(), precision="fp16")
    with pytest.raises(Crash):
        toy_fit(tmp_path / "cut", Watched(crash_at=9), precision="fp16")
    assert scaler(tmp_path / "cut")["scale"] != 2.0**20
    toy_fit(tmp_path / "cut", Watched(), precision="fp16")
    whole, cut = (find_checkpoint(tmp_path / name, "last") for name in ("whole", "cut"))
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert scaler(tmp_path / "whole") == scaler(tmp_path / "cut")


def test_fp16_stops_when_no_scale_makes_the_gradient_finite(half, tmp_path):
    class Broken(Watched):
        def forward(self, batch):
            output = super().forward(batch)
            output.losses["id"] = output.losses["id"] + (self.text.bias * 0).abs().sqrt().sum()
            return output

    half(1.0)
    model = Broken()
    with pytest.raises(TrainingError, match=r"gradient is not finite.*in fp16.*picture-"):
        toy_fit(tmp_path, model, precision="fp16")
    assert all(torch.equal(model.weights[0], later) for later in model.weights)


def test_bf16_trains_on_a_cpu(tmp_path):
    model = toy_fit(tmp_path, Watched(), precision="bf16", epochs=5)
    assert model.types == {torch.bfloat16}
    losses = values(tmp_path, "loss/total")
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("run", [pairs_train, pairs_train_ivt])
def test_both_systems_train_in_bf16_near_fp32(run, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for precision in ("fp32", "bf16"):
        run(tmp_path / precision, pictures, precision=precision)
    single, brain = (values(tmp_path / name, "loss/total") for name in ("fp32", "bf16"))
    assert brain == pytest.approx(single, rel=0.05)
    assert brain != single
    weights = load_file(find_checkpoint(tmp_path / "bf16", "last") / "model.safetensors")
    assert all(w.dtype != torch.bfloat16 and bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 as users run it needs a GPU; none here")
def test_fp16_trains_on_a_gpu(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for precision in ("fp32", "fp16"):
        pairs_train(tmp_path / precision, pictures, precision=precision, device="cuda")
    single, half = (values(tmp_path / name, "loss/total") for name in ("fp32", "fp16"))
    assert half == pytest.approx(single, rel=0.05)
