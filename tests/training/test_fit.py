import contextlib
import csv
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy_training import (
    TOKENIZER,
    ToyBatches,
    ToyModel,
    pairs_train,
    pairs_train_ivt,
    toy_config,
    toy_fit,
    toy_validation,
    write_pairs,
)

from fmfa.errors import CheckpointError, ConfigError, TrainingError
from fmfa.models.clip import ClipRetriever
from fmfa.models.ivt import IvtRetriever
from fmfa.models.weights import read_checkpoint
from fmfa.records import read_metrics, read_record
from fmfa.training.checkpoints import WEIGHTS, epoch_checkpoints, find_checkpoint, read_state, selected_checkpoint
from fmfa.training.config import TrainConfig
from fmfa.training.fit import run_config, train
from fmfa.training.loop import gradient_norms
from fmfa.training.optimizer import build_optimizer, learning_rate, parameter_groups, rate_factor

HERE = Path(__file__).parents[1]


class Crash(BaseException):
    """Stands for a process that ends between two instructions."""


class CrashingModel(ToyModel):
    def __init__(self, at, error=Crash):
        super().__init__()
        self.at, self.error = at, error

    def forward(self, batch):
        if self.calls == self.at:
            raise self.error
        return super().forward(batch)


@pytest.fixture(scope="module", autouse=True)
def _no_power_cut():
    """Flushing to the disk takes most of a small run's time and matters only when the power fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def last_weights(folder):
    return (find_checkpoint(folder, "last") / "model.safetensors").read_bytes()


def metric_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.reader(file) if row[4] != "seconds"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    toy_fit(folder, log_gradients_every=4)
    return folder


def test_a_run_leaves_a_complete_folder(whole):
    record = read_record(whole)
    assert record["status"] == "finished"
    assert record["config"]["epochs"] == 3
    assert record["steps"] == 18
    assert torch.__version__.startswith(record["versions"]["torch"])
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert len(names) == 2
    assert names[1] == "last-00000018"
    metrics = read_metrics(whole)
    assert set(metrics["run"]) == {"toy"}
    validation = metrics[(metrics["split"] == "val") & (metrics["metric"] == "R@1")]
    assert validation["epoch"].tolist() == [0, 1, 2, 3]
    assert validation["step"].tolist() == [0, 6, 12, 18]
    train = metrics[metrics["split"] == "train"].pivot(index="epoch", columns="metric", values="value")
    assert (train["loss/total"] - train["loss/match"] - train["loss/id"]).abs().max() < 1e-6
    assert train["loss/total"].is_monotonic_decreasing
    assert train["constant"].tolist() == [2, 2, 2]
    assert train["learning_rate"].tolist() == pytest.approx([0.005, 0.05, 0.025])


def test_the_best_epoch_is_chosen_on_validation_and_ties_go_to_the_earlier(tmp_path):
    scores = iter([90.0, 10.0, 30.0, 30.0, 20.0])
    toy_fit(tmp_path, epochs=4, validate=lambda model: {"R@1": next(scores)})
    best = selected_checkpoint(tmp_path)
    assert best.name == "best-00000012"
    assert read_record(tmp_path)["best"] == 30
    assert read_record(tmp_path)["best_epoch"] == 2


def test_a_run_without_validation_selects_its_last_checkpoint(tmp_path):
    toy_fit(tmp_path, epochs=1, validate=None)
    assert selected_checkpoint(tmp_path) == find_checkpoint(tmp_path, "last")


def test_validation_must_return_the_selection_metric(tmp_path):
    with pytest.raises(TrainingError, match=r"returned mAP; expected R@1"):
        toy_fit(tmp_path, validate=lambda model: {"mAP": 1.0})


def test_validation_is_rarer_on_request_but_never_skips_the_last_epoch(tmp_path):
    toy_fit(tmp_path, epochs=5, evaluate_every=2)
    metrics = read_metrics(tmp_path)
    assert metrics[metrics["split"] == "val"]["epoch"].unique().tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("calls", [0, 1, 6, 9, 17])
def test_resuming_after_a_crash_ends_with_the_same_bytes(calls, whole, tmp_path):
    folder = tmp_path / "toy"
    with pytest.raises(Crash):
        toy_fit(folder, CrashingModel(calls), log_gradients_every=4)
    assert read_record(folder)["status"] == "failed"
    toy_fit(folder, log_gradients_every=4)
    assert last_weights(folder) == last_weights(whole)
    assert metric_rows(folder) == metric_rows(whole)
    assert read_record(folder)["status"] == "finished"
    assert len(read_record(folder)["resumed"]) == 1
    best, expected = selected_checkpoint(folder), selected_checkpoint(whole)
    assert best.name == expected.name
    assert (best / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_a_rate_by_step_is_the_same_after_a_crash_within_an_epoch(tmp_path):
    changes = {"schedule": "linear", "epochs": 1, "warmup_epochs": 0.5}
    toy_fit(tmp_path / "whole", **changes)
    with pytest.raises(Crash):
        toy_fit(tmp_path / "resumed", CrashingModel(5), **changes)
    toy_fit(tmp_path / "resumed", **changes)
    assert last_weights(tmp_path / "resumed") == last_weights(tmp_path / "whole")
    metrics = read_metrics(tmp_path / "resumed")
    rates = metrics[metrics["metric"] == "learning_rate"]["value"].tolist()
    assert rates == pytest.approx([0.05 / 3])  # of the last of six steps


@pytest.mark.parametrize("calls", [6, 9, 17])
def test_every_epoch_is_kept_on_request_through_a_crash(calls, whole, tmp_path):
    folder = tmp_path / "toy"
    with pytest.raises(Crash):
        toy_fit(folder, CrashingModel(calls), log_gradients_every=4, keep_epochs=True)
    toy_fit(folder, log_gradients_every=4, keep_epochs=True)
    kept = epoch_checkpoints(folder)
    assert list(kept) == [1, 2, 3]
    weights = {epoch: (path / "model.safetensors").read_bytes() for epoch, path in kept.items()}
    assert len(set(weights.values())) == 3
    assert weights[3] == last_weights(folder) == last_weights(whole)
    assert (
        weights[read_record(folder)["best_epoch"]] == (selected_checkpoint(folder) / "model.safetensors").read_bytes()
    )
    assert epoch_checkpoints(whole) == {}


NAMES, OTHERS = ("mkdir", "replace", "unlink", "rmdir"), ("open", "fsync", "chmod")


def die_at(patch, number):
    """End the process, as it were, at its change of a name `number`: nothing later reaches the disk either."""
    count = 0

    def mortal(name, real):
        def operation(*arguments, **options):
            nonlocal count
            count += name in NAMES
            if count >= number:
                raise Crash
            return real(*arguments, **options)

        return operation

    for name in (*NAMES, *OTHERS):
        patch.setattr(os, name, mortal(name, getattr(os, name)))


def assert_same_run(folder, whole):
    assert last_weights(folder) == last_weights(whole)
    assert metric_rows(folder) == metric_rows(whole)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (folder, whole)]
    assert names[0] == names[1]
    assert (selected_checkpoint(folder) / WEIGHTS).read_bytes() == (selected_checkpoint(whole) / WEIGHTS).read_bytes()
    assert read_record(folder)["status"] == "finished"


def test_a_kill_between_file_operations_costs_only_the_steps_since(tmp_path, monkeypatch):
    """Every third place of a run is tried; the folder is then started again as it is."""
    short = {"size": 12, "checkpoint_every": 1, "epochs": 2}
    toy_fit(tmp_path / "whole" / "toy", **short)
    for number in itertools.count(1, 3):
        folder = tmp_path / str(number) / "toy"
        with monkeypatch.context() as patch:
            die_at(patch, number)
            try:
                toy_fit(folder, **short)
                break
            except Crash:
                pass
        toy_fit(folder, **short)
        assert_same_run(folder, tmp_path / "whole" / "toy")
    assert number > 60


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(whole, tmp_path, monkeypatch):
    folder = tmp_path / "toy"
    for number in itertools.count(20, 4):
        with monkeypatch.context() as patch:
            die_at(patch, number)
            try:
                toy_fit(folder, log_gradients_every=4)
                break
            except Crash:
                pass
    assert len(read_record(folder)["resumed"]) > 5
    assert_same_run(folder, whole)


@pytest.fixture
def interrupted(whole, tmp_path):
    """A run that stopped after step 9 of 18 and has a best checkpoint."""
    with pytest.raises(Crash):
        toy_fit(tmp_path / "toy", CrashingModel(9), log_gradients_every=4)
    return tmp_path / "toy"


def resume(folder):
    toy_fit(folder, log_gradients_every=4)


def test_a_folder_without_its_record_is_no_checkpoint(whole, interrupted):
    checkpoints = interrupted / "checkpoints"
    for name in ("best-00000001", "last-00000099", "epoch-00000003"):
        (checkpoints / name).mkdir()
        (checkpoints / name / WEIGHTS).write_bytes(b"left by a kill")
    (checkpoints / ".best-00000006.old").mkdir()
    (checkpoints / "notes").mkdir()  # the user's own
    resume(interrupted)
    (checkpoints / "notes").rmdir()
    assert_same_run(interrupted, whole)


@pytest.mark.parametrize("first", [WEIGHTS, "state.json"])
@pytest.mark.parametrize("deletion", [1, 2, 3])
def test_a_kill_while_a_checkpoint_is_deleted_leaves_a_run_that_goes_on(whole, tmp_path, monkeypatch, first, deletion):
    deleted, rmtree = [], shutil.rmtree

    def killed(path, **options):
        if (path / first).is_file():
            deleted.append(path)
            if len(deleted) == deletion:
                (path / first).unlink()
                raise Crash
        rmtree(path, **options)

    monkeypatch.setattr("fmfa.training.checkpoints.shutil.rmtree", killed)
    with pytest.raises(Crash):
        toy_fit(tmp_path / "toy", log_gradients_every=4)
    monkeypatch.undo()
    named = [path for path in (tmp_path / "toy/checkpoints").iterdir() if not path.name.startswith(".")]
    assert all((path / name).is_file() for path in named for name in (WEIGHTS, "state.json"))
    resume(tmp_path / "toy")
    assert_same_run(tmp_path / "toy", whole)


@pytest.mark.parametrize("file", [WEIGHTS, "optimizer.pt", "metrics.csv", "state.json", f"best {WEIGHTS}"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.99])
def test_a_flipped_bit_is_found_before_training_goes_on(file, place, interrupted):
    kind, _, name = f"last {file}".rpartition(" ")
    path = find_checkpoint(interrupted, kind.split()[-1]) / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file() and "run" not in path.name}
    with pytest.raises(CheckpointError, match=rf"{name}.*(is damaged|cannot be read|expected).*begins from the start"):
        resume(interrupted)
    assert before == {path: path.read_bytes() for path in before}
    shutil.rmtree(interrupted / "checkpoints")  # as the message says
    resume(interrupted)
    assert read_record(interrupted)["status"] == "finished"


def test_no_flipped_bit_of_the_state_changes_what_is_read(interrupted):
    path = find_checkpoint(interrupted, "last") / "state.json"
    good, state = path.read_bytes(), read_state(path.parent)
    for place in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            with contextlib.suppress(CheckpointError):
                assert read_state(path.parent) == state  # such as an E of an exponent


@pytest.mark.parametrize("content", [None, b"", b"run,split,epo", b"\0" * 9000, b"x" * 9000])
def test_lost_or_damaged_metrics_are_rebuilt_on_resume(content, whole, interrupted):
    path = interrupted / "metrics.csv"
    path.unlink() if content is None else path.write_bytes(content)
    resume(interrupted)
    assert_same_run(interrupted, whole)


def test_a_lost_best_checkpoint_is_an_error_and_not_the_last_one(interrupted):
    shutil.rmtree(find_checkpoint(interrupted, "best"))
    for action in (resume, selected_checkpoint):
        with pytest.raises(CheckpointError, match="has lost its best checkpoint, of epoch 1"):
            action(interrupted)


def test_a_second_training_in_a_run_folder_is_refused(whole, tmp_path):
    def validate(model):
        with pytest.raises(TrainingError, match=rf"toy is in use by process {os.getpid()} on "):
            resume(tmp_path / "toy")
        return toy_validation(model)

    toy_fit(tmp_path / "toy", validate=validate, log_gradients_every=4)
    assert_same_run(tmp_path / "toy", whole)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("name", "number"), [("run.json", 1), ("run.json", 2), ("config.json", 1), ("metrics.csv", 1)])
def test_a_full_disk_at_a_record_is_one_sentence_and_loses_nothing(name, number, whole, tmp_path, monkeypatch):
    folder, count, real = tmp_path / "toy", 0, os.replace

    def full(source, target):
        nonlocal count
        count += Path(target).parent == folder and Path(target).name == name
        if count == number and Path(target).name == name:
            raise FULL
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(TrainingError, match=rf"({name}|toy) cannot be written.*: No space left"):
            resume(folder)
    resume(folder)
    assert_same_run(folder, whole)


def test_a_full_disk_at_a_line_of_metrics_is_one_sentence_and_loses_nothing(whole, tmp_path):
    class Filling(ToyModel):
        def forward(self, batch):
            if self.calls == 11:
                (tmp_path / "toy" / "metrics.csv").unlink()
                (tmp_path / "toy" / "metrics.csv").symlink_to("/dev/full")
            return super().forward(batch)

    with pytest.raises(TrainingError, match=r"metrics.csv cannot be written; .*last checkpoint: No space left"):
        toy_fit(tmp_path / "toy", Filling(), log_gradients_every=4)
    resume(tmp_path / "toy")
    assert_same_run(tmp_path / "toy", whole)


def test_a_run_folder_that_cannot_be_made_or_written_to_is_one_sentence(whole, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run folder .*file/toy cannot be made: Not a directory"):
        toy_fit(tmp_path / "file" / "toy")

    real = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *arguments, **options)

    (tmp_path / "toy").mkdir()
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(TrainingError, match="toy cannot be written to: Read-only file system"):
        toy_fit(tmp_path / "toy")
    resume(whole)  # which is finished


NO_RECORDS = ["null", "[]", "3", '"x"', "{", "[" * 100_000, '{"a": ' * 100_000, "\0"]


@pytest.mark.parametrize(
    "content",
    [*NO_RECORDS, '{"epochs": null}', '{"epochs": [1]}', f'{{"learning_rate": {10**400}}}', f'{{"epochs": {10**400}}}'],
)
def test_a_damaged_configuration_is_one_sentence(content, interrupted):
    (interrupted / "config.json").write_text(content)
    with pytest.raises(TrainingError, match=r"config.json is no run's configuration \("):
        resume(interrupted)


@pytest.mark.parametrize("content", [*NO_RECORDS, '{"status": null}', '{"status": "finished", "started": 3}'])
def test_a_damaged_record_is_one_sentence_and_the_run_goes_on_without(content, whole, interrupted):
    path = interrupted / "run.json"
    path.write_text(content)
    with pytest.raises(TrainingError, match=r"run.json.*\. Restore it, or delete it"):
        resume(interrupted)
    path.unlink()
    resume(interrupted)
    assert_same_run(interrupted, whole)


@pytest.mark.parametrize("content", [*NO_RECORDS, "{}", *(f'{{"best": {x}}}' for x in ("null", "[]", "NaN"))])
def test_a_damaged_state_is_one_sentence(content, interrupted):
    path = find_checkpoint(interrupted, "last") / "state.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json.*begins from the start"):
        resume(interrupted)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x, max_size=3)
)
FIELDS = (
    "epoch",
    "batch",
    "step",
    "best",
    "best_epoch",
    "sums",
    "metrics_size",
    "sha256",
    "status",
    "started",
    "config",
)


@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON | st.dictionaries(st.text(), JSON, max_size=3)))
def test_states_and_records_of_any_values_are_read_or_refused(changes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    good = {"epoch": 1, "batch": 0, "step": 6, "best": 0.5, "best_epoch": 1, "sums": {}, "metrics_size": 9}
    for name in ("state.json", "run.json", "config.json"):
        (folder / name).write_text(json.dumps(good | changes))
    with contextlib.suppress(CheckpointError):
        assert read_state(folder).step >= 0
    with contextlib.suppress(TrainingError):
        run_config(folder)
    record = read_record(folder)
    assert isinstance(record.get("status", ""), str)
    assert isinstance(record.get("config", {}), dict)


@pytest.mark.parametrize("found", [math.nan, math.inf, ValueError("a similarity is not finite")])
def test_a_validation_that_is_not_finite_says_where(found, tmp_path):
    scores = iter([10.0, 20.0, found])

    def validate(model):
        score = next(scores)
        if isinstance(score, ValueError):
            raise score
        return {"R@1": score}

    said = r"R@1 of the validation after epoch 2, step 12 is (nan|inf).*learning rate 0.05 in fp32"
    with pytest.raises(TrainingError, match=said):
        toy_fit(tmp_path, validate=validate)
    assert find_checkpoint(tmp_path, "last").name == "last-00000010"


def test_a_statistic_that_is_not_finite_is_named(tmp_path):
    class Broken(ToyModel):
        def forward(self, batch):
            output = super().forward(batch)
            if self.calls == 5:
                output.stats["noise"] = torch.tensor(math.inf)
            return output

    with pytest.raises(TrainingError, match=r"the statistic noise is not finite .*epoch 1, step 5"):
        toy_fit(tmp_path, Broken())


def test_a_process_killed_from_outside_resumes_to_the_same_bytes(whole, tmp_path):
    folder = tmp_path / "toy"
    command = [sys.executable, str(HERE / "toy_training.py"), str(folder)]
    killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "KILL_AT": "10 0"})
    assert killed.returncode == -signal.SIGKILL
    assert read_record(folder)["status"] == "running"
    assert find_checkpoint(folder, "last").name == "last-00000010"
    toy_fit(folder, tensorboard=True)
    assert last_weights(folder) == last_weights(whole)
    assert read_record(folder)["status"] == "finished"
    assert len(list((folder / "logs").rglob("events.*"))) == 2


@pytest.mark.parametrize(
    ("run", "model_class", "crash_at"), [(pairs_train, ClipRetriever, 5), (pairs_train_ivt, IvtRetriever, 4)]
)
def test_both_systems_resume_bit_identically_on_real_pictures(run, model_class, crash_at, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    changes = {"optimizer": "adam", "learning_rate": 1e-3, "checkpoint_every": 1, "epochs": 2}
    model = run(tmp_path / "a" / "run", pictures, **changes)
    real, calls = model_class.forward, 0

    def crash(self, batch):
        nonlocal calls
        calls += 1
        if calls == crash_at:
            raise Crash
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(model_class, "forward", crash)
        with pytest.raises(Crash):
            run(tmp_path / "b" / "run", pictures, **changes)
    assert read_state(find_checkpoint(tmp_path / "b" / "run", "last")).batch == 1
    run(tmp_path / "b" / "run", pictures, **changes)
    assert last_weights(tmp_path / "a" / "run") == last_weights(tmp_path / "b" / "run")
    weights, record = read_checkpoint(find_checkpoint(tmp_path / "a" / "run", "last") / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert record["class"] == model_class.__name__
    assert record["model"]


def test_training_refuses_what_the_data_check_calls_fatal(tmp_path):
    dataset = write_pairs(tmp_path)
    (tmp_path / "3.png").unlink()
    with pytest.raises(TrainingError, match=r"cannot be used for training.*3\.png"):
        train(toy_config(), ToyModel(), dataset, TOKENIZER, tmp_path / "run")


def test_training_prints_the_data_checks_warnings_once(tmp_path, monkeypatch, capsys):
    dataset = write_pairs(tmp_path)
    captions = dataset.table["caption"].mask(dataset.table.index == 3, "这名年轻女子穿着一件鲜艳的红色羽绒服" * 3)
    dataset = replace(dataset, table=dataset.table.assign(caption=captions))
    monkeypatch.setattr("fmfa.training.fit.fit", lambda *_, **__: None)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        train(toy_config(), ToyModel(), dataset, TOKENIZER, tmp_path / "run")
        cut = [line for line in capsys.readouterr().out.splitlines() if "longer than the context" in line]
        assert len(cut) == lines
        assert all(line.startswith("warning: ") and f"the {TOKENIZER.context_length} positions" in line for line in cut)


def test_the_bytes_depend_on_the_seed(whole, tmp_path):
    toy_fit(tmp_path, seed=6)
    assert last_weights(tmp_path) != last_weights(whole)


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.random.get_rng_state()
    toy_fit(tmp_path, epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_finished_run_is_left_alone(whole):
    before = (whole / "run.json").read_bytes()
    model = ToyModel()
    toy_fit(whole, model)
    assert model.calls == 0
    assert (whole / "run.json").read_bytes() == before


def test_a_folder_of_another_run_is_refused(whole):
    with pytest.raises(TrainingError, match=r"holds another run: learning_rate 0.05 there, 0.1 now"):
        toy_fit(whole, learning_rate=0.1)


def test_ctrl_c_says_where_the_run_goes_on(whole, tmp_path):
    folder = tmp_path / "toy"
    with pytest.raises(KeyboardInterrupt, match=r"epoch 2 of 3 after step 9.*goes on from last-00000008"):
        toy_fit(folder, CrashingModel(9, KeyboardInterrupt))
    assert read_record(folder)["status"] == "interrupted"
    toy_fit(folder)
    assert last_weights(folder) == last_weights(whole)


def test_a_full_disk_leaves_the_earlier_checkpoint(whole, tmp_path, monkeypatch):
    folder, real = tmp_path / "toy", torch.save

    def full(data, path):
        real(data, path)
        if len(list(path.parent.parent.glob("last-*"))):
            with path.open("r+b") as file:
                file.truncate(100)
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"No space left.*complete before it: last-00000002"):
            toy_fit(folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last-00000002"]
    toy_fit(folder)
    assert last_weights(folder) == last_weights(whole)


def test_a_non_finite_loss_names_step_parts_and_records(tmp_path):
    class Broken(ToyModel):
        def forward(self, batch):
            output = super().forward(batch)
            if self.calls == 5:
                output.losses["id"] = output.losses["id"] * float("nan")
            return output

    with pytest.raises(TrainingError, match=r"not finite .*match \d.*id nan.*epoch 1, step 5") as caught:
        toy_fit(tmp_path, Broken())
    fifth = next(iter(ToyBatches(4).read(0, 4)))["rows"]
    assert f"picture-{fifth[0]}.jpg" in str(caught.value)
    assert find_checkpoint(tmp_path, "last").name == "last-00000004"
    assert "not finite" in read_record(tmp_path)["error"]


@pytest.mark.parametrize("calls", [0, 9, 17])
def test_what_is_read_every_few_steps_is_what_is_read_in_each(calls, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("fmfa.training.loop._steps_unread", lambda accelerator: 4)
    folder = tmp_path / "toy"
    with pytest.raises(Crash):
        toy_fit(folder, CrashingModel(calls), log_gradients_every=4)
    toy_fit(folder, log_gradients_every=4)
    assert last_weights(folder) == last_weights(whole)
    assert metric_rows(folder) == metric_rows(whole)


def test_a_non_finite_loss_that_is_read_later_names_its_own_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("fmfa.training.loop._steps_unread", lambda accelerator: 4)

    class Broken(ToyModel):
        def forward(self, batch):
            output = super().forward(batch)
            if self.calls == 3:
                output.losses["id"] = output.losses["id"] * float("nan")
            return output

    model = Broken()
    with pytest.raises(TrainingError, match=r"not finite .*match \d.*id nan.*epoch 1, step 3") as caught:
        toy_fit(tmp_path, model, checkpoint_every=0)
    assert model.calls == 4
    third = next(iter(ToyBatches(4).read(0, 2)))["rows"]
    assert f"picture-{third[0]}.jpg" in str(caught.value)
    assert find_checkpoint(tmp_path, "last") is None


def test_a_non_finite_gradient_stops_before_it_reaches_the_weights(tmp_path):
    class Broken(ToyModel):
        def forward(self, batch):
            output = super().forward(batch)
            output.losses["id"] = output.losses["id"] + (self.text.bias * 0).abs().sqrt().sum()
            return output

    model = Broken()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match="gradient is not finite"):
        toy_fit(tmp_path, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_clipping_bounds_the_step_and_is_off_by_default(tmp_path):
    start = ToyModel()
    sgd = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "epochs": 1, "schedule": "constant"}
    sgd |= {"factors": "flat", "learning_rate": 1.0, "size": 24, "validate": None}
    for name, clip_norm in (("off", 0.0), ("on", 1e-3)):
        model = toy_fit(tmp_path / name, clip_norm=clip_norm, **sgd)
        moved = (
            sum(float((a - b).detach().square().sum()) for a, b in zip(model.parameters(), start.parameters())) ** 0.5
        )
        norm = read_metrics(tmp_path / name).set_index("metric")["value"]["gradient_norm"]
        assert moved == pytest.approx(1e-3 if clip_norm else norm, rel=1e-4)
        assert norm > 0.1


def test_accumulation_averages_the_gradients_of_its_batches(tmp_path):
    sgd = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "epochs": 1, "schedule": "constant"}
    sgd |= {"factors": "flat", "learning_rate": 0.1, "validate": None, "checkpoint_every": 0}
    model = toy_fit(tmp_path, ToyModel(dropout=0.0), accumulate=4, **sgd)
    expected = ToyModel(dropout=0.0)
    batches = list(ToyBatches(4).read(0, 0))
    assert len(batches) == 6
    noise = iter(read_noise(steps=2, batches=(4, 2)))
    for group in (batches[:4], batches[4:]):
        expected.zero_grad()
        for batch in group:
            image, text = expected.image(batch["images"]), expected.text(batch["captions"])
            loss = torch.nn.functional.cross_entropy(text @ image.T * next(noise), torch.arange(4))
            loss = loss + torch.nn.functional.cross_entropy(expected.classifier(image), batch["labels"])
            (loss / len(group)).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    assert read_record(tmp_path)["steps"] == 2


def read_noise(steps, batches):
    """The toy model's draws: one generator a step, started from (seed, step)."""
    import numpy as np

    for step, count in zip(range(steps), batches, strict=True):
        seed = int(np.random.SeedSequence((5, step)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield 1 + 0.1 * torch.rand((), generator=generator)


def test_gradient_norms_by_loss_are_the_norms_of_their_gradients():
    model, batch = ToyModel(dropout=0.0), next(iter(ToyBatches(6).read(0, 0)))
    output = model(batch)
    norms = gradient_norms(output)
    assert norms["id/text_tokens"] == 0
    for loss in output.losses:
        (gradient,) = torch.autograd.grad(output.losses[loss], [output.features["image_tokens"]], retain_graph=True)
        assert norms[f"{loss}/image_tokens"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_gradient_norms_are_logged_at_the_configured_steps(whole):
    metrics = read_metrics(whole)
    logged = metrics[metrics["split"] == "gradient"]
    assert logged["step"].unique().tolist() == [0, 4, 8, 12, 16]
    assert set(logged["metric"]) == {f"{a}/{b}_tokens" for a in ("match", "id") for b in ("image", "text")}


IRRA_NAMES = {
    "base.visual.conv1.weight": (1, True),
    "base.ln_final.bias": (2, False),
    "irr.cross_attn.in_proj_weight": (5, True),
    "irr.cross_attn.in_proj_bias": (2, False),
    "irr.cross_modal_transformer.resblocks.0.mlp.c_fc.weight": (5, True),
    "irr.ln_pre_t.weight": (1, True),
    "irr.ln_post.bias": (2, False),
    "irr.mlm_head.fc.weight": (5, True),
    "irr.mlm_head.fc.bias": (5, False),
    "classifier.weight": (5, True),
    "classifier.bias": (5, False),
}


def test_rate_factors_go_by_name():
    assert {name: rate_factor(name, "irra") for name in IRRA_NAMES} == IRRA_NAMES
    assert rate_factor("classifier.bias", "flat") == (1, True)
    assert rate_factor("encoder_vl.blocks.0.attn.qkv.bias", "ivt") == (2, True)
    assert rate_factor("classifier.weight", "ivt") == (1, True)


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = ToyModel()
    model.image.weight.requires_grad_(False)
    groups = parameter_groups(model, toy_config().resolved())
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters() if n != "image.weight")


def test_a_frozen_model_is_refused():
    model = ToyModel().requires_grad_(False)
    with pytest.raises(TrainingError, match="every parameter"):
        parameter_groups(model, toy_config().resolved())


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizers_have_the_configured_settings(name, kind):
    config = toy_config(optimizer=name, eps=1e-3, weight_decay=0.1, momentum=0.5, beta1=0.8).resolved()
    optimizer = build_optimizer(ToyModel(), config)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        biases = {"bias" in parameter for parameter in group["param_names"]}
        assert group["weight_decay"] == (0.0 if biases == {True} else 0.1)
        assert group["lr"] == pytest.approx(0.1 * 0.05 * group["factor"])
        expected = {"momentum": 0.5} if name == "sgd" else {"eps": 1e-3, "betas": (0.8, 0.999)}
        assert {key: group[key] for key in expected} == expected


def test_the_ivt_schedule_warms_up_to_each_groups_own_rate():
    config = toy_config(schedule="ivt", learning_rate=0.005, epochs=120, warmup_epochs=5)
    assert learning_rate(config, 1, 1.0) == pytest.approx(1.04e-3)
    assert learning_rate(config, 1, 2.0) == pytest.approx(2.04e-3)


def test_ivts_released_epochs_run_from_1_to_120_on_cuhk_pedes():
    released, paper = (
        TrainConfig(method="ivt", preset=preset, dataset="CUHK-PEDES").resolved() for preset in ("released", "paper")
    )
    table = json.loads((HERE / "fixtures" / "schedules.json").read_text())["ivt"]
    for group, factor in (("weight_group", 1.0), ("bias_group", 2.0)):
        rates = [learning_rate(released, epoch, factor) for epoch in range(120)]
        assert rates == pytest.approx(table[group][1:], rel=1e-9)
        assert [learning_rate(paper, epoch, factor) for epoch in range(120)] == pytest.approx(table[group][:-1])


def test_half_precision_on_a_cpu_is_refused_and_bfloat16_runs(tmp_path):
    with pytest.raises(ConfigError, match="'fp16' needs a GPU"):
        toy_fit(tmp_path / "half", precision="fp16", device="cpu")
    seen = []

    class Watched(ToyModel):
        def forward(self, batch):
            seen.append(self.image(batch["images"]).dtype)
            return super().forward(batch)

    model = toy_fit(tmp_path / "brain", Watched(), precision="bf16", epochs=1)
    assert set(seen) == {torch.bfloat16}
    assert model.image.weight.dtype == torch.float32
    assert model(next(iter(ToyBatches(4).read(0, 0)))).losses["id"].dtype == torch.float32
    toy_fit(tmp_path / "again", epochs=1)  # another precision in the same process


def test_the_checkpoint_state_says_where_the_run_stands(whole):
    state = read_state(find_checkpoint(whole, "last"))
    assert (state.epoch, state.batch, state.step) == (3, 0, 18)
    assert state.metrics_size == (whole / "metrics.csv").stat().st_size
    weights = load_file(find_checkpoint(whole, "last") / "model.safetensors")
    assert set(weights) == set(ToyModel().state_dict())


def test_weights_of_another_shape_are_refused(whole, tmp_path):
    class Wider(ToyModel):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    folder = tmp_path / "toy"
    with pytest.raises(Crash):
        toy_fit(folder, CrashingModel(5))
    with pytest.raises(CheckpointError, match="does not fit this Wider"):
        toy_fit(folder, Wider())


def test_the_bar_is_quiet_when_stderr_is_no_terminal(tmp_path, capfd):
    toy_fit(tmp_path, epochs=2, validate=toy_validation)
    out, err = capfd.readouterr()
    assert "it/s" not in err
    assert [line.split(":")[0] for line in out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
