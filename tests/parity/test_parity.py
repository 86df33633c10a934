import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fmfa.losses import efa
from fmfa.losses import matching as losses
from fmfa.models import clip as heads
from tests import parity
from tests.parity.row import compare

FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = ("fmfa_narrow.npz", "fmfa_short.npz")


@pytest.mark.parametrize("name", FILES)
def test_every_quantity_of_the_released_code(name, capsys):
    assert parity.main([str(FIXTURES / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    with np.load(FIXTURES / name) as arrays:
        given = ("config/", "clip/", "batch/", "model/")
        given_ends = ("/image", "/text", "/pid", "/similarity", "_pid")
        expected = {k for k in arrays if not k.startswith(given)}
        expected -= {k for k in expected if k.startswith(("batchloss/", "rank/")) and k.endswith(given_ends)}
    assert {line.split()[0] for line in lines[:-1]} == expected | {"model/base_model.visual.positional_embedding"}
    assert lines[-1].startswith(f"{len(lines) - 1} quantities, 0 above the limit")


def above(name="fmfa_short.npz"):
    return {quantity for quantity, difference, limit in parity.parity_rows(FIXTURES / name) if difference > limit}


def heavier_weights(function):
    return lambda *arguments, **keywords: function(*arguments, **{**keywords, "alpha": 0.11})


def test_it_fails_when_adaptive_weights_are_wrong(monkeypatch):
    monkeypatch.setattr(losses, "asdm", heavier_weights(losses.asdm))
    broken = above()
    assert {"loss/a-sdm_loss", "loss/total", "gradnorm/base_model.visual.proj"} <= broken
    assert "loss/efa_loss" not in broken


def test_it_fails_when_the_sparse_step_is_wrong(monkeypatch):
    original = efa.sparsify
    monkeypatch.setattr(efa, "sparsify", lambda s, *, sigma, keep: original(s, sigma=0.2, keep=keep))
    assert "efa/grouped" in above()


def test_it_fails_when_the_pooling_is_wrong(monkeypatch):
    original = efa.pooled_similarity
    monkeypatch.setattr(efa, "pooled_similarity", lambda *given, **named: original(*given, **named | {"sharpness": 2}))
    broken = above()
    assert {"loss/efa_loss", "efa/text_term", "efa/patch_term", "loss/total"} <= broken
    assert "efa/grouped" not in broken


def test_it_fails_when_padding_is_hidden_from_irr(monkeypatch):
    original = heads.CrossModalHead.forward
    shown = torch.arange(20) < 10
    monkeypatch.setattr(
        heads.CrossModalHead,
        "forward",
        lambda self, text, image, chosen, valid=None: original(self, text, image, chosen, shown.expand(len(text), -1)),
    )
    broken = above()
    assert {"loss/mlm_loss", "loss/total"} <= broken
    assert "loss/a-sdm_loss" not in broken


def test_it_fails_when_a_batch_loss_is_wrong_by_a_millionth_in_float64(monkeypatch):
    original = losses.sdm
    monkeypatch.setattr(losses, "sdm", lambda *a, **k: original(*a, **k) * (1 + 2e-6))
    assert above("fmfa_narrow.npz") == {f"batchloss/{i}/sdm" for i in range(4)}


def changed(tmp_path, fixture="fmfa_short.npz", **entries):
    with np.load(FIXTURES / fixture) as file:
        arrays = {**dict(file), **{name: value for name, value in entries.items() if value is not None}}
    for name in [name for name, value in entries.items() if value is None]:
        del arrays[name]
    np.savez(tmp_path / "changed.npz", **arrays)
    return str(tmp_path / "changed.npz")


def test_a_quantity_that_is_not_known_counts_as_failed(tmp_path, capsys):
    path = changed(tmp_path, **{"loss/new_loss": np.float32(1)})
    assert parity.main([path]) == 1
    out = capsys.readouterr().out
    assert "loss/new_loss" in next(line for line in out.splitlines() if "ABOVE" in line)
    assert "1 above the limit" in out


@pytest.mark.parametrize("content", [None, b"junk"])
def test_other_files_are_errors(tmp_path, capsys, content):
    path = tmp_path / "file.npz"
    if content:
        path.write_bytes(content)
    assert parity.main([str(path)]) == 2
    assert "expected a .npz file of reference numbers" in capsys.readouterr().err


def test_files_of_another_layout_are_errors(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    assert parity.main([str(tmp_path / "other.npz")]) == 2
    assert "of no known layout" in capsys.readouterr().err
    assert parity.main([changed(tmp_path, **{"batch/images": None})]) == 2
    assert "lacks the entry 'batch/images'" in capsys.readouterr().err


TABLES = ("clip/visual.positional_embedding", "clip/positional_embedding", "state_dict/encoder_vl.type_embed")


@pytest.mark.parametrize("name", TABLES)
def test_a_position_table_of_another_size_is_an_error(tmp_path, capsys, name):
    """15 positions of a picture, or 21 of a caption, would be resized, and every quantity with them."""
    shapes = {TABLES[0]: (1 + 15, 64), TABLES[1]: (21, 64), TABLES[2]: (1, 1 + 3, 64)}
    fixture = "ivt_small.npz" if name.startswith("state") else "fmfa_short.npz"
    path = changed(tmp_path, fixture, **{name: np.ones(shapes[name], dtype=np.float32)})
    assert parity.main([path]) == 2
    said = capsys.readouterr().err
    assert path in said
    assert "position_grid is 4 x 4, but the file has 15" in said or "do not have the sizes of its config" in said


def test_differences_are_relative_to_the_largest_reference():
    reference = np.array([1.0, -4.0])
    assert compare("x", np.array([1.0, -3.0]), reference) == ("x", 0.25, 1e-6)
    assert compare("x", torch.tensor([1.0, -4.0]), reference.astype(np.float32)) == ("x", 0.0, 1e-4)
    assert compare("x", 0.5, np.array(0.0)) == ("x", 0.5, 1e-6)
    for wrong in (None, np.ones(3), np.array([1.0, np.nan]), np.array([1.0, np.inf])):
        assert compare("x", wrong, reference)[1] == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_finite_never_passes(value, dtype, tmp_path, capsys):
    reference = np.array([1.0, value], dtype=dtype)
    for ours in (np.array([1.0, 2.0]), torch.tensor([1.0, value]), reference.copy()):
        assert compare("x", ours, reference)[1] == np.inf
    path = changed(tmp_path, **{"loss/total": np.array(value, dtype=dtype)})
    assert parity.main([path]) == 1
    assert "1 above the limit; closest to it: loss/total (inf" in capsys.readouterr().out


def test_the_command_line_runs_as_a_module():
    command = [sys.executable, "-m", "tests.parity", str(FIXTURES / "fmfa_short.npz")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "quantities, 0 above the limit" in run.stdout
