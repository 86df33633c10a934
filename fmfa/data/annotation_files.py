"""Annotation files as their owners wrote them: found, parsed, and laid out as one frame of records.

The formats: a JSON list of records (CUHK-PEDES, ICFG-PEDES, RSTPReid as published), a JSON object of
split -> list of records (the files that IVT's authors processed), and a CSV with a header (one's own).
"""

import csv
import io
import json
import re
from itertools import chain
from pathlib import Path
from reprlib import repr as short

import pandas as pd

from fmfa.errors import AnnotationError

NAMES = {"cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid", "simpedes": "SimPEDES"}
SPLITS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}
_GENERIC = {"reid_raw.json": "CUHK-PEDES", "caption_all.json": "CUHK-PEDES", "data_captions.json": "RSTPReid"}
_MOST_FIELDS = 200


def canonical_name(text: str) -> str | None:
    """The name of the known data set that a file, folder or user's name speaks of, or None."""
    plain = re.sub(r"[^a-z]", "", text.lower())
    return next((name for key, name in NAMES.items() if key in plain), None)


def find_annotation(root: str | Path, name: str | None) -> Path:
    """The annotation file that `root` means: itself when it is a file, else the one inside the folder.

    In a folder the known file names are looked for, in any case; without one of them, the only CSV or JSON.

    Raises:
        AnnotationError: there is no such path, no annotation file, or more than one that fits `name`.
    """
    root = Path(root)
    try:
        if root.is_file():
            return root
        if not root.is_dir():
            raise AnnotationError(f"{root}: no such file or folder; give the annotation file or its folder")
        files = sorted(file for file in root.iterdir() if file.suffix.lower() in (".json", ".csv"))
    except (OSError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(f"{root}: cannot be looked into ({error})") from None
    known = [file for file in files if _own_name(file)]
    wanted = canonical_name(name or "")
    if wanted and known:
        fitting = [file for file in known if wanted == _own_name(file)]
        # A copy in the layout of CUHK-PEDES (SimPEDES is one) has a generic file name.
        known = fitting or [file for file in known if file.name.lower() in _GENERIC]
        if not known:
            found = ", ".join(file.name for file in files)
            raise AnnotationError(f"{root}: no annotation file of {wanted}; found {found}")
    candidates = known or files
    if not candidates:
        raise AnnotationError(
            f"{root}: no annotation file; expected one of {', '.join(_GENERIC)}, CUHK-PEDES.json, "
            "ICFG-PEDES.json, a processed variant of them, or one's own .csv or .json"
        )
    if len(candidates) > 1:
        found = ", ".join(file.name for file in candidates)
        raise AnnotationError(f"{root}: several annotation files ({found}); give one of them as root, or a name")
    return candidates[0]


def dataset_name(file: Path, name: str | None) -> str:
    """The data set's name: the one given (in its usual spelling), else by the files.

    Raises:
        AnnotationError: `name` says one published data set and the file name another.
    """
    own = _own_name(file)
    if name:
        given = canonical_name(name) or name
        if own and file.name.lower() not in _GENERIC and given in NAMES.values() and given != own:
            raise AnnotationError(f"{file}: looks like {own} by its name, not like {given}; correct the name")
        return given
    if file.name.lower() in _GENERIC:
        rendered = (file.parent / "dataset.json").is_file() and (file.parent / "truth").is_dir()
        return "SimPEDES" if rendered else own
    return own or file.stem


def read_records(file: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """All records of an annotation file in file order, one row each, and notes on what was decided.

    Columns are the file's fields (dtype object, None where a record lacks one). For a file that is an object
    of splits the column `split` holds the key; its lists `query` and `gallery`, which restate `test`, are
    left out and noted.

    Raises:
        AnnotationError: unreadable, not UTF-8, not JSON or CSV, of another shape, duplicate keys, half a surrogate
            pair in any text, no records.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise AnnotationError(f"{file}: cannot be read ({error.strerror})") from None
    if file.suffix.lower() == ".csv":
        records, notes = _parse_csv(text, file), ()
    else:
        records, notes = _flatten(_parse_json(text, file), file)
    if not records:
        raise AnnotationError(f"{file}: holds no records; expected at least one annotated image")
    fields = list(dict.fromkeys(chain.from_iterable(records)))
    if len(fields) > _MOST_FIELDS:
        raise AnnotationError(f"{file}: {len(fields)} different field names; expected records of the same fields")
    columns = {field: pd.Series([record.get(field) for record in records], dtype=object) for field in fields}
    return pd.DataFrame(columns), notes


def _own_name(file: Path) -> str | None:
    own = _GENERIC.get(file.name.lower()) or canonical_name(file.stem)
    return None if own == "SimPEDES" else own  # SimPEDES has CUHK-PEDES's file name.


def _parse_json(text: str, file: Path):
    def unique(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise AnnotationError(f"{file}: key {short(twice)} stands twice in one JSON object; keep one of them")
        return record

    try:
        content = json.loads(text, object_pairs_hook=unique)
        if r"\ud" in text.lower():  # the only way to half a surrogate pair, which no file and no tokenizer can take
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except AnnotationError:
        raise
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 40, 0) : error.end + 40]
        raise AnnotationError(f"{file}: {around!r} is not valid Unicode ({error.reason}); correct it") from None
    except RecursionError:
        raise AnnotationError(f"{file}: JSON nested too deeply; expected a list of records") from None
    except ValueError as error:
        raise AnnotationError(f"{file}: not JSON ({error}); the file may be cut short: fetch it again") from None


def _flatten(content, file: Path) -> tuple[list[dict], tuple[str, ...]]:
    if isinstance(content, list):
        return _only_objects(content, file, ""), ()
    if not isinstance(content, dict):
        raise AnnotationError(
            f"{file}: expected a list of records or an object of splits, found {type(content).__name__}"
        )
    records, repeated = [], {}
    for key, part in content.items():
        split = SPLITS.get(key.lower())
        if split is None and key.lower() not in ("query", "gallery"):
            raise AnnotationError(
                f"{file}: unknown split name {short(key)}; expected a list of records, or an object with the "
                "keys train, val and test (pandas writes the former with to_json(orient='records'))"
            )
        if not isinstance(part, list):
            raise AnnotationError(f"{file}: split {key!r} is {type(part).__name__}, expected a list of records")
        if split is None:
            repeated[key] = _only_objects(part, file, f" of {key!r}")
            continue
        for record in _only_objects(part, file, f" of {key!r}"):
            if SPLITS.get(str(record.get("split", key)).lower()) != split:
                raise AnnotationError(f"{file}: a record under {key!r} says split {short(record['split'])}")
            records.append({**record, "split": split})
    if repeated and not any(SPLITS.get(key.lower()) == "test" for key in content):
        raise AnnotationError(f"{file}: has {' and '.join(repeated)} but no test; name the list of captions 'test'")
    return records, tuple(_left_out(key, part, records, file) for key, part in repeated.items())


def _left_out(key: str, part: list[dict], records: list[dict], file: Path) -> str:
    def image(record):
        return str(record.get("file_path", record.get("img_path")))

    tested = {image(record) for record in records if record["split"] == "test"}
    new = sum(image(record) not in tested for record in part)
    return (
        f"The list '{key}' of {file.name} ({len(part):,} records, {new:,} with an image that 'test' lacks) "
        "was left out: evaluation uses 'test'."
    )


def _only_objects(part: list, file: Path, where: str) -> list[dict]:
    wrong = next((i for i, record in enumerate(part) if not isinstance(record, dict)), None)
    if wrong is not None:
        kind = type(part[wrong]).__name__
        raise AnnotationError(f"{file}: record {wrong}{where} is {kind} ({short(part[wrong])}), expected an object")
    return part


def _parse_csv(text: str, file: Path) -> list[dict]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise AnnotationError(f"{file}: not CSV ({error}); expected commas and a header line") from None
    if not rows:
        raise AnnotationError(f"{file}: empty; expected a CSV with a header line")
    header, *body = rows
    if len(set(header)) < len(header):
        raise AnnotationError(f"{file}: a column name stands twice in the header {short(header)}; rename one")
    wrong = next((i for i, row in enumerate(body) if len(row) != len(header)), None)
    if wrong is not None:
        raise AnnotationError(
            f"{file}: record {wrong} has {len(body[wrong])} cells, the header {len(header)}; "
            "put captions with commas in double quotes"
        )
    return [dict(zip(header, row)) for row in body]
