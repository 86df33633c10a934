"""Score any system on a split: `python -m fmfa.score SYSTEM --dataset CUHK-PEDES --root /data/CUHK-PEDES`.

SYSTEM is a run folder, a weight file (with its --backbone), a model of open_clip (`ViT-B-16-quickgelu/openai`), a
features file, a TREC run or a table of scores, a callable `module:function`, or a folder of runs or exported results
of the study. Printed is the table with 95 % intervals over identities; written is a record, which holds no picture and
no caption, for `python -m fmfa.compare`. data/score.md has the formats.
"""

import argparse
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from torch import Tensor, nn

from fmfa.data.annotations import Dataset
from fmfa.data.images import load_image, resolve_image
from fmfa.devices import choose_device
from fmfa.errors import ConfigError, FmfaError
from fmfa.evaluation.cost import encoding_operations
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation, gallery_of
from fmfa.evaluation.features import is_features, read_features, read_qrels, read_scores, scores_only, write_trec
from fmfa.evaluation.score_record import Cost, ScoreRecord, describe_split, queries_of, write_record
from fmfa.files import said_plainly, whole_file
from fmfa.models.outputs import Encoded, Retriever
from fmfa.records import RECORD, read_record, row_of
from fmfa.study.levels import readable, result_table
from fmfa.study.results import METRICS, study_records
from fmfa.systems import System, add_model_options, load_system, model_options, open_test_data

SCORES = (".csv", ".run", ".trec", ".txt")
_CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class CalledModel(Retriever):
    """Two functions as a model: `encode_image` [B, ...] and `encode_text` [B, L], each to [B, D]."""

    def __init__(self, encode_image: Callable[..., Tensor], encode_text: Callable[..., Tensor], device: torch.device):
        """Run both on a device."""
        super().__init__()
        self.place = nn.Parameter(torch.empty(0, device=device))
        self.functions = {"encode_image": encode_image, "encode_text": encode_text}

    def encode_image(self, images: Tensor) -> Encoded:
        """Encode prepared pictures."""
        return self._call("encode_image", images)

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Encode tokens."""
        return self._call("encode_text", ids)

    def _call(self, name: str, batch: Tensor) -> Encoded:
        features = _called(name, self.functions[name], batch)
        if features.ndim != 2 or len(features) != len(batch):
            raise ConfigError(f"{name} returned shape {tuple(features.shape)} for {len(batch)} items; expected [N, D]")
        if not bool(features.isfinite().all()):
            raise ConfigError(f"{name} returned NaN or infinity")
        return Encoded(features[:, None], features)


def _called(name: str, function: Callable[..., Tensor], argument: object) -> Tensor:
    """What a user's function returns; ConfigError if it fails or returns no tensor."""
    try:
        result = function(argument)
    except Exception as error:
        raise ConfigError(f"{name} failed ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if not isinstance(result, Tensor):
        raise ConfigError(f"{name} returned {type(result).__name__}; expected a tensor")
    return result


def call_system(source: str, checkpoint: str = "", device: str = "cpu") -> System:
    """The system that a callable returns.

    Args:
        source: `module:function`; the module may lie in the working folder. The function takes a checkpoint (text) and
            a device (`torch.device`) and returns encode_image, encode_text, preprocess (a PIL picture to a tensor
            [3, H, W]) and tokenize (a list of captions to an int tensor [N, L]).
        checkpoint: handed to it.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: there is no such function, or it fails or returns something else.
    """
    module, _, name = source.partition(":")
    place, folder = choose_device(device), os.getcwd()
    sys.path.insert(0, folder)
    try:
        encode_image, encode_text, preprocess, tokenize = getattr(importlib.import_module(module), name)(
            checkpoint, place
        )
    except Exception as error:  # it is the user's code
        raise ConfigError(
            f"{source} gave no system ({type(error).__name__}: {' '.join(str(error).split())}); expected a function "
            "of a checkpoint and a device that returns encode_image, encode_text, preprocess and tokenize"
        ) from error
    finally:
        sys.path.remove(folder)
    shapes: set[torch.Size] = set()

    def read(path: str | Path) -> Tensor:
        picture = _called("preprocess", preprocess, load_image(path))
        shapes.add(picture.shape)
        if len(shapes) > 1:
            raise ConfigError(f"preprocess returned the shapes {', '.join(map(str, map(tuple, shapes)))}; expected one")
        return picture

    transform: Any = SimpleNamespace(read=read, finish=lambda pictures: pictures)
    tokenizer: Any = functools.partial(_called, "tokenize", tokenize)
    return System(CalledModel(encode_image, encode_text, place), tokenizer, transform)


def score_system(system: System, data: Dataset, split: str) -> tuple[Evaluation, Cost]:
    """Encode and score a split with a system, and say what a query costs."""
    evaluation = system.evaluate(data, split)
    pictures = [resolve_image(data.images, evaluation.gallery["image"][0])]
    captions = evaluation.rows["caption"].tolist()[:64]
    operations = encoding_operations(system.model, system.tokenizer, system.transform, pictures, captions)
    return evaluation, Cost(evaluation.image_features.shape[1], 0, 1, *(count or None for count in operations))


def eval_results(record: ScoreRecord, values: pd.DataFrame, benchmark: str, task: str = "default") -> str:
    """A record's R@1 as the YAML of `.eval_results/` on the Hugging Face hub.

    Args:
        record: of the system.
        values: `Evaluation.table()`.
        benchmark: the hub's data set, ORGANISATION/NAME.
        task: as the benchmark's `eval.yaml` names it.
    """
    shown = values[values["direction"] == TEXT_TO_IMAGE].set_index("metric")
    first = shown.loc[METRICS[0]]
    others = ", ".join(f"{name} {shown.loc[name, 'value']:.2f}" for name in METRICS[1:])
    notes = (
        f"R@1 in percent, 95 % interval over identities {first['low']:.2f} to {first['high']:.2f}; {others}; "
        f"{record.cost}; selected on: {record.selected}; split {record.split.fingerprint[:12]}"
    )
    entry = EvalResultEntry(benchmark, task, round(float(first["value"]), 2), notes=notes)
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)


def _opened(options: argparse.Namespace) -> tuple[Dataset, pd.DataFrame, pd.DataFrame]:
    """The data set, the rows of the split and its gallery."""
    if options.qrels:
        rows, gallery = read_qrels(options.qrels)
        return Dataset(options.dataset or Path(options.qrels).stem, Path(), rows), rows, gallery
    run = options.system if (Path(options.system) / RECORD).is_file() else ""
    data = open_test_data([run], options.dataset, options.root, options.scale, options.data_seed)
    rows = data.split(options.split)
    return data, rows, gallery_of(rows)


def _evaluated(
    options: argparse.Namespace, data: Dataset, rows: pd.DataFrame, gallery: pd.DataFrame
) -> tuple[Evaluation, Cost]:
    source = options.system
    if Path(source).suffix in SCORES and not os.path.isdir(source):
        return scores_only(read_scores(source, rows, gallery), rows, gallery), Cost(0, 0, options.model_calls or 1)
    if is_features(source):
        if not Path(source).exists():
            raise ConfigError(f"{source}: no such file")
        evaluation = read_features(source, rows, gallery, _branches(options.branch))
        cost = Cost(evaluation.image_features.shape[1], 0, 1)
    elif options.qrels:
        raise ConfigError(f"{source}: --qrels names no pictures and captions; give a features file or scores with it")
    else:
        if _CALLABLE.fullmatch(source) and not Path(source).exists():
            system = call_system(source, options.checkpoint, options.device)
        else:
            system = load_system(source, options.device, dataset=data.name, **model_options(options))
            print(system.report or "", end="\n" * bool(system.report))
        evaluation, cost = score_system(system, data, options.split)
    if options.scores:
        scores = read_scores(options.scores, rows, gallery)
        depth = int(scores["query"].value_counts().max())
        evaluation = replace(evaluation, reranked=scores)
        cost = replace(cost, rerank_depth=depth, model_calls=1 + depth)
    return evaluation, replace(cost, model_calls=options.model_calls or cost.model_calls)


def _branches(given: Sequence[str]) -> dict[str, float] | None:
    try:
        return {name: float(weight) for name, weight in (entry.split("=") for entry in given)} or None
    except ValueError:
        raise ConfigError(f"--branch {' '.join(given)}: expected NAME=WEIGHT, such as tse=0.5") from None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 scored, 2 a mistake in what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.score", description="Score any system on a split.")
    parser.add_argument("system", help="run, weight file, open_clip model, features file, scores, module:function")
    add = parser.add_argument
    add("--dataset", default="", help="such as CUHK-PEDES; default: what --root says, or SimPEDES")
    add("--root", default="", help="folder of the data set")
    add("--split", default="test")
    add("--scale", default="", help="of SimPEDES without a root")
    add("--data-seed", type=int, default=-1, help="of SimPEDES, and of held-out identities")
    add("--qrels", default="", help="TREC judgements in place of a data set")
    add("--to", default="", help="record to write; default NAME.record (of several: a folder)")
    add("--name", default="", help="of the system; default: of its file")
    add("--seed", type=int, help="of its training; default: the run's, or 0")
    add("--selected", default="", help="on what its weights were selected: validation, test, nothing ...")
    add("--branch", action="append", default=[], metavar="NAME=WEIGHT", help="of a features file; once per branch")
    add("--scores", default="", help="re-ranked scores: TREC run, or table with query, item, score")
    add("--model-calls", type=int, default=0, help="networks run per query; default 1 and one per re-ranked picture")
    add("--checkpoint", default="", help="handed to module:function")
    add("--device", default="auto", help="auto, cpu or cuda")
    add_model_options(parser)
    add("--trec", default="", metavar="PREFIX", help="also write PREFIX.run and PREFIX.qrels")
    add("--trec-depth", type=int, default=1000, help="pictures per query in the TREC run, 0 for all")
    add("--eval-results", default="", metavar="FILE", help="also write the YAML of the Hugging Face hub")
    add("--hub", default="", metavar="ORG/NAME[:TASK]", help="benchmark on the hub that --eval-results is for")
    options = parser.parse_args(arguments)
    try:
        _score(options)
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _score(options: argparse.Namespace) -> None:
    if options.trec_depth < 0:
        raise ConfigError(f"--trec-depth is {options.trec_depth}; expected pictures per query, or 0 for all")
    folder = Path(options.system)
    if (folder / "runs.csv").is_file() or (options.system and any(folder.glob(f"*/{RECORD}"))):
        target = Path(options.to or "records")
        with said_plainly(f"{target} cannot be written"):
            target.mkdir(parents=True, exist_ok=True)
        for run, record in study_records(folder, options.split, options.root, options.scale, options.data_seed):
            write_record(record, target / f"{run}.record")
            print(target / f"{run}.record")
        return
    if options.eval_results and not re.fullmatch(r"[^/:\s]+/[^/:\s]+(:\S+)?", options.hub):
        raise ConfigError("--eval-results needs --hub ORGANISATION/NAME[:TASK], the benchmark that the result is for")
    data, rows, gallery = _opened(options)
    evaluation, cost = _evaluated(options, data, rows, gallery)
    stem = folder.name if folder.is_dir() else folder.stem if folder.exists() else options.system
    stem = re.sub("[/:]", "-", stem) or "tiny_clip"
    is_run = (folder / RECORD).is_file()
    name = options.name or (row_of(folder) if is_run else stem)
    seed = options.seed if options.seed is not None else read_record(folder).get("seed", 0) if is_run else 0
    selected = options.selected or ("validation" if is_run else "not told")
    split = describe_split(data.name, options.split, rows, gallery)
    record = ScoreRecord(name, seed, selected, split, cost, queries_of(evaluation))
    print(readable(result_table({name: evaluation}, data, options.split)).to_string(index=False))
    version = f" ({split.version})" * bool(split.version)
    print(f"split {split.fingerprint[:12]}{version}, cost: {cost}, selected on: {selected}")
    path = Path(options.to or f"{options.name or stem}.record")
    write_record(record, path)
    print(f"{path}: {path.stat().st_size / 1024:.0f} kB")
    with said_plainly("the results cannot be written"):
        if options.trec:
            write_trec(evaluation, options.trec, name, options.trec_depth)
        if options.eval_results:
            benchmark, _, task = options.hub.partition(":")
            with whole_file(options.eval_results) as file:
                file.write_text(eval_results(record, evaluation.table(), benchmark, task or "default"), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
