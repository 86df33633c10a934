"""The notebooks run from the first cell to the last, on rendered and on real formats, by parameters only."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from formats import write_cuhk, write_icfg, write_rstp

from fmfa.gallery import build_gallery
from fmfa.notebook import run_notebook
from fmfa.simpedes.generate import generate, recipe
from fmfa.systems import load_system

ROOT = Path(__file__).parents[1]
DATA = ROOT / "notebooks" / "01_data.ipynb"
# Each run has a kernel, and a kernel has torch: two groups, so that never more than two run side by side.
FIRST, SECOND = pytest.mark.xdist_group("notebooks-1"), pytest.mark.xdist_group("notebooks-2")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a notebook with parameters; returns the record, what it printed, and how many figures it shows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(notebook, **parameters):
        record = run_notebook(notebook, tmp_path / "out" / notebook.name, parameters, timeout=300)
        cells = nbformat.read(record["output"], as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        printed = "".join(
            output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"
        )
        figures = sum("image/png" in output.get("data", {}) for output in outputs)
        return record, printed, figures

    return run


def check(record, printed, dataset):
    assert record["status"] == "finished"
    assert record["error"] is None
    assert f"{dataset} can be used for training" in printed
    page = Path(record["output"]).with_suffix(".html").read_text(encoding="utf-8")
    assert f"{dataset} can be used for training" in page
    assert "data:image/png;base64," in page


@FIRST
def test_01_on_simpedes(run, tmp_path):
    root = generate(tmp_path / "street", recipe("tiny"), workers=1, progress=False)
    record, printed, figures = run(DATA, dataset="SimPEDES-street", root=str(root))
    check(record, printed, "SimPEDES-street")
    assert "SimPEDES-street: 240 images, 480 captions, 60 identities" in printed
    assert figures == 6  # counts, captions, pictures, part maps, families, attributes


@SECOND
@pytest.mark.parametrize(
    ("dataset", "write", "first_line"),
    [
        ("CUHK-PEDES", write_cuhk, "20 images, 40 captions, 10 identities"),
        ("ICFG-PEDES", write_icfg, "16 images, 16 captions, 8 identities"),
        ("RSTPReid", write_rstp, "50 images, 100 captions, 10 identities"),
    ],
)
def test_01_on_a_real_format(run, tmp_path, dataset, write, first_line):
    write(tmp_path / "copy")
    record, printed, figures = run(DATA, dataset=dataset, root=str(tmp_path / "copy"))
    check(record, printed, dataset)
    assert f"{dataset}: {first_line}" in printed
    assert figures == 3  # counts, captions, pictures; the rest is known of SimPEDES alone


@SECOND
@pytest.mark.parametrize("name", ["01_data", "02_methods", "04_evaluate", "05_ablation", "06_visualise", "07_search"])
def test_a_notebook_with_its_defaults_by_nbval(monkeypatch, name):
    by_nbval(monkeypatch, ROOT / "notebooks" / f"{name}.ipynb")


@FIRST
def test_03_with_its_defaults_by_nbval(monkeypatch):
    by_nbval(monkeypatch, ROOT / "notebooks" / "03_train.ipynb")


def by_nbval(monkeypatch, notebook):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    command += ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=900", str(notebook)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(cells)} passed" in done.stdout


@FIRST
def test_07_with_a_query_and_a_gallery_of_ones_own(run, tmp_path):
    root = generate(tmp_path / "street", recipe("tiny"), workers=1, progress=False)
    described = {"source": "", "model": {}}
    build_gallery(tmp_path / "g", str(root / "imgs"), load_system(), described, progress=False)
    notebook, table = ROOT / "notebooks" / "07_search.ipynb", tmp_path / "hits.csv"
    given = {"query": "a man in blue", "where": "vector < 100", "k": 7, "export": str(table), "device": "cpu"}
    record, printed, figures = run(notebook, gallery=str(tmp_path / "g"), **given)
    assert record["status"] == "finished"
    assert "Of 240 pictures the best has cosine" in printed
    assert figures == 3  # hits, more like the best, where it looked
    assert len(pd.read_csv(table)) == 7
