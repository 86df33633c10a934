"""Released weights through the notebooks, and a full-size model on a directory in CUHK-PEDES format."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from formats import write_cuhk

from fmfa.models.clip import ClipRetriever
from fmfa.notebook import run_notebook
from fmfa.simpedes.generate import generate, recipe
from fmfa.systems import load_system

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(name, output, **parameters):
    record = run_notebook(NOTEBOOKS / name, output, parameters, timeout=600)
    cells = nbformat.read(record["output"], as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)
    return record, text, figures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("tiny"), recipe("tiny"), workers=1, progress=False)


@pytest.mark.xdist_group("notebooks-2")
def test_released_weights_are_evaluated_and_shown_without_a_training(tiny, tmp_path):
    """A file in IRRA's layout, beside a run that was not trained from the same file."""
    shipped = load_system().model
    state = {name.replace("clip.", "module.base_model.", 1): value for name, value in shipped.state_dict().items()}
    released = tmp_path / "irra.pth"
    torch.save({"model": state, "epoch": 60}, released)
    (tmp_path / "backbone.json").write_text(json.dumps(shipped.config["backbone"]))
    data = {"dataset": "SimPEDES-street", "root": str(tiny)}
    about = {"backbone": str(tmp_path / "backbone.json"), "image_height": 96, "image_width": 32, "stride": 8} | data
    folder = tmp_path / "zero-0"
    record, text, figures = run(
        "03_train.ipynb", folder / "train.ipynb", method="irra", weights=str(released), epochs=0, run=str(folder),
        **data,
    )  # fmt: skip
    assert record["status"] == "finished"
    assert "0 left out" in text
    (recall,) = re.findall(r"best epoch 0 with validation R@1 ([\d.]+) %", text)
    assert figures == 1
    record, text, _ = run(
        "04_evaluate.ipynb", tmp_path / "evaluate.ipynb", run=str(released), split="val", phrases=0,
        counterfactuals=0, **about,
    )  # fmt: skip
    assert record["status"] == "finished"
    assert f"{released} (IRRA layout)" in text
    assert re.search(rf"this system +text to image +{recall} \[", text)
    runs = json.dumps([str(folder), str(released)])
    record, text, figures = run("06_visualise.ipynb", tmp_path / "pictures.ipynb", runs=runs, results="", **about)
    assert record["status"] == "finished"
    assert f"{released} (IRRA layout)" in text
    assert figures > 4


@pytest.mark.xdist_group("notebooks-2")
def test_a_full_size_model_takes_three_steps_on_real_format(tmp_path):
    write_cuhk(tmp_path / "data", identities=(3, 1, 1))
    openai = ClipRetriever("ViT-B-16-quickgelu", seed=5).state_dict()
    weights = {name.removeprefix("clip."): tensor.half() for name, tensor in openai.items()}
    weights |= {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}
    torch.save(weights, tmp_path / "ViT-B-16.pt")
    del openai, weights
    folder = tmp_path / "run"
    record, text, _ = run(
        "03_train.ipynb", folder / "train.ipynb", method="fmfa", dataset="CUHK-PEDES", root=str(tmp_path / "data"),
        backbone="ViT-B-16-quickgelu", weights=str(tmp_path / "ViT-B-16.pt"), epochs=1, batch_size=4,
        log_gradients_every=0, run=str(folder),
    )  # fmt: skip
    assert record["status"] == "finished"
    assert "1 resized" in text
    kept = json.loads((folder / "run.json").read_text())
    assert kept["steps"] == 3
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_height"], config["image_width"]) == (384, 128)
    shutil.rmtree(folder / "checkpoints")
