"""Annotation files of every supported data set, read as one table with one row per caption."""

import csv
import hashlib
import io
import json
import posixpath
import re
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from reprlib import repr as short

import numpy as np
import pandas as pd

from fmfa.data.images import unsafe_path
from fmfa.errors import AnnotationError, ConfigError
from fmfa.simpedes.generate import DOMAINS
from fmfa.simpedes.truth import is_simpedes, read_dataset_record

VALIDATION_IDENTITIES = 200
"""Training identities held out for validation when a data set has none, as many as RSTPReid validates on."""
_FIELDS = {
    "image": ("file_path", "img_path", "image"),
    "identity": ("id", "identity"),
    "split": ("split",),
    "caption": ("captions", "caption"),
}
_ADVICE = {
    "image": "Give each record the path of its picture inside the image folder",
    "identity": "Give each record the number of its person, the same for all pictures of one",
    "split": "Give each record train, val or test; of CUHK-PEDES the owners' reid_raw.json has them",
    "caption": "Give each record a caption, or a list of them",
}
_DERIVED = ("label", "record", "held_out")
_WHOLE = re.compile(r"\s*(\d{1,19})(?:\.0+)?\s*", re.ASCII)
REAL = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
SIMPEDES = "SimPEDES"
SPLITS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}
_GENERIC = {"reid_raw.json": "CUHK-PEDES", "caption_all.json": "CUHK-PEDES", "data_captions.json": "RSTPReid"}
_KEYS = {r"cuhk(?!0\d|sysu)": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}
_MOST_FIELDS = 200


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as one table.

    Attributes:
        name: "CUHK-PEDES", "ICFG-PEDES", "RSTPReid", "SimPEDES-street", "SimPEDES-station", or the user's own.
        images: folder that the paths in the table start from.
        table: one row per caption, the captions of an image adjacent and in file order. Columns: `image` (posix
            path relative to `images`), `identity` (int64, as in the file: what evaluation compares), `label`
            (int64, 0..K-1 over the training identities in ascending order, -1 outside training), `split`
            ("train", "val", "test"), `caption`, `record` (int64, position of the source record in the file,
            from 0), then the file's other fields. When validation identities were held out of train, the
            boolean column `held_out` marks their rows.
        notes: plain sentences on what was decided while reading.
    """

    name: str
    images: Path
    table: pd.DataFrame
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> pd.DataFrame:
        """The rows of one split, renumbered from 0; AnnotationError when the table has no such split."""
        rows = self.table[self.table["split"] == name]
        if rows.empty:
            found = ", ".join(self.table["split"].unique())
            raise AnnotationError(f"{self.name} has no split {name!r}; it has {found}")
        return rows.reset_index(drop=True)


def read_dataset(
    root: str | Path,
    name: str | None = None,
    *,
    images: str | Path | None = None,
    seed: int = 0,
    validation_identities: int | None = None,
    drop_empty_captions: bool = False,
) -> Dataset:
    """Read CUHK-PEDES, ICFG-PEDES, RSTPReid or one's own pictures into one table.

    Accepted are the files that the owners distribute, the files processed for IVT (an object of splits), and
    a CSV or JSON list with the columns image, identity, split, caption. Only the annotation file is opened:
    whether the pictures exist and can be read is the business of `fmfa.data.check`.

    Args:
        root: the annotation file, or the folder that holds it.
        name: the data set's name in any spelling; picks the file when `root` holds several, and must agree with what
            the file says; by default what it says.
        images: the image folder; by default `imgs` beside the annotation file.
        seed: decides which identities are held out for validation, and nothing else.
        validation_identities: how many training identities become validation when the file has no validation
            split (ICFG-PEDES has none); 0 for none; by default 200, but at most a fifth of the identities.
        drop_empty_captions: leave rows without a word out, with a note, and not to the check.

    Raises:
        AnnotationError: no such file, several that fit, one of another data set than `name`, or bad content; the
            message names file and record.
        ConfigError: no such `name` (see `canonical_name`), or `validation_identities` is negative or leaves no
            identity to train on.
    """
    file, name = find_annotation(root, name)
    records, file_notes = read_records(file)
    notes = list(file_notes)
    captions = _rows(records, file, notes)
    if drop_empty_captions:
        empty = ~captions["caption"].str.contains(r"\w")
        lost = len(set(captions["image"])) - len(set(captions["image"][~empty]))
        captions = captions[~empty]
        notes.append(f"{empty.sum():,} empty captions were left out, and with them {lost:,} images.")
    table = _images_together(captions, notes)
    table = _hold_out(table, validation_identities, seed, notes)
    table.insert(2, "label", _labels(table))
    folder = Path(images).expanduser() if images is not None else file.parent / "imgs"
    return Dataset(name, folder, table, tuple(notes))


def _rows(records: pd.DataFrame, file: Path, notes: list[str]) -> pd.DataFrame:
    """One row per caption: the standard fields, then the file's others; a record without captions has an empty one."""
    derived = [field for field in _DERIVED if field in records]
    if derived:
        notes.append(f"The file's own {' and '.join(derived)} were replaced by what its records say.")
    standard = []
    for number, record in enumerate(records.to_dict("records") or [{}]):  # pandas has no records without columns
        try:
            standard.append(_standard_fields(record))
        except ValueError as error:
            raise AnnotationError(f"{file}, record {number}: {error}") from None
    used = {*chain.from_iterable(_FIELDS.values()), *derived}
    extra = records[[field for field in records if field not in used]]
    table = pd.DataFrame(standard).assign(record=np.arange(len(records))).join(extra)
    by_caption = ["caption"]
    if "processed_tokens" in table:  # one list of tokens per caption in the published files, where they fit
        tokens = zip(table["processed_tokens"], table["caption"])
        table["processed_tokens"] = [
            own if isinstance(own, list) and list(map(type, own)) == [list] * len(captions) else [own] * len(captions)
            for own, captions in tokens
        ]
        by_caption.append("processed_tokens")
    table = table.explode(by_caption, ignore_index=True)
    return table.assign(caption=table["caption"].infer_objects())


def _standard_fields(record: dict) -> dict:
    """Image path, identity, split and captions of a record; ValueError says what is wrong with it."""
    values = {}
    for field, aliases in _FIELDS.items():
        given = [name for name in aliases if (value := record.get(name)) is not None and value == value]
        if len(given) > 1:
            raise ValueError(f"has {' and '.join(given)}; keep one of them")
        if not given:
            names = " or ".join(f"'{name}'" for name in aliases)
            others = ", ".join(name for name, value in record.items() if value is not None)[:200]
            raise ValueError(f"the field {names} is missing or null; found {others}. {_ADVICE[field]}")
        values[field] = record[given[0]]
    image, identity, split, captions = values.values()
    if not isinstance(image, str):
        raise ValueError(f"found {short(image)}, expected an image path as text")
    if reason := unsafe_path(image):
        raise ValueError(
            f"the image path {short(image)} {reason}; expected a path relative to the image folder, without '..'"
        )
    number = _whole_number(identity)
    if number is None:
        raise ValueError(f"found {short(identity)}, expected an identity: a whole number from 0 up, as number or text")
    split_name = SPLITS.get(split.strip().lower()) if isinstance(split, str) else None
    if split_name is None:
        raise ValueError(f"found {short(split)}, expected a split name: train, val or test")
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"found {short(captions)}, expected a caption, or a list of captions, as text")
    path = posixpath.normpath(image.replace("\\", "/"))
    return {"image": path, "identity": number, "split": split_name, "caption": texts or [""]}


def _whole_number(value: object) -> int | None:
    if isinstance(value, str):
        match = _WHOLE.fullmatch(value)
        value = int(match[1]) if match else None
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if valid else None


def _images_together(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    if table.empty:
        raise AnnotationError("no caption is left after dropping the empty ones; expected captions with words")
    codes, _ = pd.factorize(table["image"])
    if (np.diff(codes) < 0).any():
        notes.append("Records of one image stood apart in the file; their captions were brought together.")
        table = table.iloc[np.argsort(codes, kind="stable")]
    return table.reset_index(drop=True)


def _hold_out(table: pd.DataFrame, wanted: int | None, seed: int, notes: list[str]) -> pd.DataFrame:
    if wanted is not None and wanted < 0:
        raise ConfigError(f"validation_identities is {wanted}; expected 0 or more")
    train = table["split"] == "train"
    identities = np.unique(table["identity"][train])
    if wanted == 0 or identities.size == 0 or (table["split"] == "val").any():
        return table
    if wanted is None:
        wanted = min(VALIDATION_IDENTITIES, max(1, identities.size // 5))
        if identities.size == 1:
            notes.append("No validation split, and a single training identity: nothing was held out.")
            return table
    elif wanted >= identities.size:
        raise ConfigError(
            f"validation_identities is {wanted}, but train has {identities.size} identities; hold out fewer"
        )
    chosen = np.random.default_rng(seed).choice(identities, wanted, replace=False)
    held_out = train & table["identity"].isin(chosen)
    notes.append(
        f"The file has no validation split: {wanted:,} of {identities.size:,} training identities "
        f"({held_out.sum():,} captions) were held out for validation with seed {seed}; see column 'held_out'."
    )
    return table.assign(split=table["split"].mask(held_out, "val"), held_out=held_out)


def _labels(table: pd.DataFrame) -> np.ndarray:
    train = (table["split"] == "train").to_numpy()
    identity = table["identity"].to_numpy()
    known = np.unique(identity[train])
    return np.where(train, np.searchsorted(known, identity), -1).astype(np.int64)


def canonical_name(text: str) -> str:
    """The one name of a data set, by which presets, objectives, text levels and records know it.

    `icfg`, `RSTP-Reid` and `cuhk_pedes` become the published spelling, `simpedes_street` "SimPEDES-street"; any other
    name is the user's own and stays.

    Raises:
        ConfigError: a domain that SimPEDES does not have, a name that is a misspelt known one, or one with half a
            surrogate pair (bytes that are not UTF-8), which cannot be printed or recorded.
    """
    if re.search("[\ud800-\udfff]", text):
        raise ConfigError(f"the name of the data set is {text!r}, which is not valid Unicode; correct it")
    plain = _letters(text)
    if known := _published(text):
        return known
    domain = plain.removeprefix(_letters(SIMPEDES)) if plain.startswith(_letters(SIMPEDES)) else None
    if domain is not None and domain in ("", *DOMAINS):
        return "-".join([SIMPEDES, *filter(None, [domain])])
    names = {_letters(name): name for name in (*REAL, SIMPEDES, *(f"{SIMPEDES}-{domain}" for domain in DOMAINS))}
    near = get_close_matches(plain, names, n=1, cutoff=0.85)
    if near or domain:
        hint = f"did you mean {names[near[0]]}? " if near else ""
        raise ConfigError(
            f"no data set {text!r}; {hint}known are {', '.join(names.values())}; a name of your own must not look like "
            "one of them"
        )
    return text.strip()


def find_annotation(root: str | Path, name: str | None = None) -> tuple[Path, str]:
    """The annotation file that `root` means, and the data set's canonical name.

    The file is `root` itself, or lies in that folder: the one with a known file name, in any case, else the only CSV or
    JSON. What is said by a file's name, and of SimPEDES by what lies beside the file, must agree with `name`; without
    a name the file decides, by its own name where that is no known one. One's own data may have CUHK-PEDES' file names,
    whose layout is the field's. The owners' `caption_all.json`, without splits, gives way to `reid_raw.json` beside it.

    Args:
        root: file or folder; `~` is the user's home.
        name: the data set's, in any spelling; picks the file where a folder holds several.

    Raises:
        AnnotationError: there is no such path, no annotation file, more than one that fits, or one of another data
            set than `name`.
        ConfigError: see `canonical_name`.
    """
    root, wanted = Path(root).expanduser(), canonical_name(name or "")
    files = _annotation_files(root)
    said = {file: _said(file) for file in files}
    known = [file for file in files if said[file]]
    if not wanted:
        fitting = known or files
    elif wanted in REAL or wanted.startswith(SIMPEDES):
        fitting = [file for file in known if said[file] == wanted or said[file].startswith(f"{wanted}-")]
        fitting = fitting or (files if wanted in REAL and not known else [])
    else:
        fitting = [file for file in files if not said[file]]
        fitting = fitting or [file for file in files if said[file] == _GENERIC.get(file.name.lower()) == "CUHK-PEDES"]
    lower = [file.name.lower() for file in fitting]
    if "reid_raw.json" in lower and "caption_all.json" in lower:
        del fitting[lower.index("caption_all.json")]
    found = ", ".join(file.name + f" ({said[file]})" * bool(said[file]) for file in files)
    if not fitting:
        marks = f"{SIMPEDES} has dataset.json and truth/ beside its reid_raw.json"
        advice = marks if wanted.startswith(SIMPEDES) else "a set of your own needs a file name like mine.json"
        raise AnnotationError(
            f"{root}: no annotation file of {wanted}; found {found}. Correct the name of the data set or leave it out; "
            f"{advice}"
        )
    if len(fitting) > 1:
        raise AnnotationError(f"{root}: several annotation files ({found}); give one of them as root, or a name")
    file = fitting[0]
    named = (wanted if wanted != SIMPEDES else "") or said[file] or canonical_name(file.stem)
    if named.startswith(SIMPEDES) and not said[file]:
        raise AnnotationError(f"{file}: {SIMPEDES} by its name, but dataset.json and truth/ do not lie beside it")
    return file, named


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


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _published(text: str) -> str:
    """The published data set that a text speaks of, or ""."""
    return next((name for key, name in _KEYS.items() if re.search(key, _letters(text))), "")


def _annotation_files(root: Path) -> list[Path]:
    try:
        if root.is_file():
            return [root]
        if is_simpedes(root):
            return [root / "reid_raw.json"]
        files = sorted(file for file in root.iterdir() if file.suffix.lower() in (".json", ".csv"))
    except (FileNotFoundError, ValueError):
        raise AnnotationError(f"{root}: no such file or folder; give the annotation file or its folder") from None
    except OSError as error:
        raise AnnotationError(f"{root}: cannot be looked into ({error})") from None
    if not files:
        raise AnnotationError(
            f"{root}: no annotation file; expected one of {', '.join(_GENERIC)}, CUHK-PEDES.json, "
            "ICFG-PEDES.json, a processed variant of them, or one's own .csv or .json"
        )
    return files


def _said(file: Path) -> str:
    """The known data set that a file is of: by its name, SimPEDES by its folder; "" for the user's own."""
    if is_simpedes(file.parent):
        return f"{SIMPEDES}-{read_dataset_record(file.parent)['recipe']['domain']}"
    return _GENERIC.get(file.name.lower()) or _published(file.stem)


def _parse_json(text: str, file: Path):
    def unique(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise AnnotationError(f"{file}: key {short(twice)} occurs twice in one JSON object; keep one of them")
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
        raise AnnotationError(f"{file}: a column name occurs twice in the header {short(header)}; rename one")
    wrong = next((i for i, row in enumerate(body) if len(row) != len(header)), None)
    if wrong is not None:
        raise AnnotationError(
            f"{file}: record {wrong} has {len(body[wrong])} cells, the header {len(header)}; "
            "put captions with commas in double quotes"
        )
    return [dict(zip(header, row)) for row in body]


def data_fingerprint(dataset: Dataset) -> str:
    """SHA-256 (hex) over the table's image, identity, split and caption columns and the bytes of 64 pictures.

    These are evenly spaced over the sorted paths; a missing file counts as such, so that the fingerprint exists for any
    data set.
    """
    digest = hashlib.sha256()
    for column in ("image", "identity", "split", "caption"):
        values = [str(value).encode() for value in dataset.table[column]]
        digest.update(f"{column} {len(values)}\n".encode())
        for value in values:
            digest.update(len(value).to_bytes(8, "little") + value)
    paths = sorted(set(dataset.table["image"]))
    for index in np.unique(np.linspace(0, len(paths) - 1, min(64, len(paths))).astype(int)):
        file = Path(dataset.images) / paths[index]
        content = file.read_bytes() if file.is_file() else b"missing"
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
