"""Annotation files of every supported data set, read as one table with one row per caption."""

import csv
import hashlib
import io
import posixpath
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import from_json

from fmfa.data.images import unsafe_path
from fmfa.errors import AnnotationError, ConfigError, told
from fmfa.files import said_plainly
from fmfa.simpedes.generate import DOMAINS
from fmfa.simpedes.truth import Truth, is_simpedes

VALIDATION_IDENTITIES = 200
"""Training identities held out for validation when a data set has none, as many as RSTPReid validates on."""
_DERIVED = ("label", "record", "held_out")
REAL = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
SIMPEDES = "SimPEDES"
_SPELLINGS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}
_GENERIC = {"reid_raw.json": "CUHK-PEDES", "caption_all.json": "CUHK-PEDES", "data_captions.json": "RSTPReid"}
_KEYS = {r"cuhk(?!0\d|sysu)": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as one table.

    Attributes:
        name: "CUHK-PEDES", "ICFG-PEDES", "RSTPReid", "SimPEDES-street" (or "-station", "-night"), or the user's own.
        images: folder that the paths in the table start from.
        table: one row per caption, the captions of an image adjacent and in file order. Columns: `image` (posix
            path relative to `images`), `identity` (int64, as in the file: what evaluation compares), `label`
            (int64, 0..K-1 over the training identities in ascending order, -1 outside training), `split`
            ("train", "val", "test"), `caption`, `record` (int64, position of the source record in the file,
            from 0), then the file's other fields. When validation identities were held out of train, the
            boolean column `held_out` marks their rows.
        notes: plain sentences on what was decided while reading.
        truth: of a SimPEDES; None for real data.
    """

    name: str
    images: Path
    table: pd.DataFrame
    notes: tuple[str, ...] = ()
    truth: Truth | None = None

    def require_truth(self) -> Truth:
        """The ground truth; AnnotationError for a data set that has none."""
        if self.truth is None:
            raise AnnotationError(
                f"{self.name} holds no ground truth, only SimPEDES has it: leave out what needs true phrases and parts "
                "(text_levels 'spans', the objectives grounding and efa_oracle, counterfactuals)"
            )
        return self.truth

    def split(self, name: str) -> pd.DataFrame:
        """The rows of one split, renumbered from 0; AnnotationError when the table has no such split."""
        rows = self.table[self.table["split"] == name]
        if rows.empty:
            splits = ", ".join(self.table["split"].unique())
            raise AnnotationError(f"{self.name} has no split {name!r}; it has {splits}")
        return rows.reset_index(drop=True)


def read_dataset(
    root: str | Path,
    name: str | None = None,
    *,
    images: str | Path | None = None,
    seed: int = 0,
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
        seed: decides which identities become validation when the file has no such split (ICFG-PEDES has none): 200
            of train, but at most a fifth.
        drop_empty_captions: leave rows without a word out, with a note, and not to the check.

    Raises:
        AnnotationError: no such file, several that fit, one of another data set than `name`, or bad content; the
            message names file and record.
        ConfigError: no such `name` (see `canonical_name`).
    """
    file, name = find_annotation(root, name)
    records, notes = read_records(file)
    table = pd.DataFrame([_checked(record, f"{file}, record {n}") for n, record in enumerate(records)])
    table = table.assign(record=np.arange(len(table))).explode("caption", ignore_index=True)
    if drop_empty_captions:
        empty = ~table["caption"].str.contains(r"\w")
        lost = table["image"].nunique() - table["image"][~empty].nunique()
        notes.append(f"{empty.sum():,} empty captions were left out, and with them {lost:,} images.")
        if (table := table[~empty]).empty:
            raise AnnotationError(f"{file}: no caption is left after dropping the empty ones; expected captions")
    codes, _ = pd.factorize(table["image"])
    if (np.diff(codes) < 0).any():
        notes.append("The records of one image were not adjacent in the file; its captions were brought together.")
    table = table.iloc[np.argsort(codes, kind="stable")].reset_index(drop=True)
    table = _hold_out(table, seed, notes)
    train = table["split"] == "train"
    people = np.unique(table["identity"][train])
    table["label"] = np.where(train, np.searchsorted(people, table["identity"]), -1)
    columns = ["image", "identity", "label", "split", "caption", "record"]
    table = table[[*columns, *table.columns.drop(columns)]]
    folder = Path(images).expanduser() if images is not None else file.parent / "imgs"
    truth = Truth(folder.parent) if is_simpedes(folder.parent) else None
    return Dataset(name, folder, table, tuple(notes), truth)


def _picture_path(path: str) -> str:
    if reason := unsafe_path(path):
        raise ValueError(f"{reason}; should be a path relative to the image folder, without '..'")
    return posixpath.normpath(path.replace("\\", "/"))


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # an integer for Python, and for pydantic
        raise ValueError("should be a whole number")
    return value


def _split_name(value: Any) -> Any:
    return _SPELLINGS.get(value.strip().lower(), value) if isinstance(value, str) else value


class _Record(BaseModel, extra="allow", loc_by_alias=False):
    """A record with the names that the data sets give its fields; what it has beside them is carried along."""

    image: Annotated[str, AfterValidator(_picture_path)] = Field(
        validation_alias=AliasChoices("file_path", "img_path", "image"),
        description="Give each record the path of its picture inside the image folder, as file_path, img_path or image",
    )
    identity: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, lt=2**63)] = Field(
        validation_alias=AliasChoices("id", "identity"),
        description="Give each record the number of its person, the same for all pictures of one, as id or identity",
    )
    split: Annotated[Literal["train", "val", "test"], BeforeValidator(_split_name)] = Field(
        description="Give each record train, val or test; of CUHK-PEDES the owners' reid_raw.json has them"
    )
    caption: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        validation_alias=AliasChoices("captions", "caption"),
        description="Give each record a caption, or a list of them, as captions or caption",
    )


def _checked(record: dict[str, Any], place: str) -> dict[str, Any]:
    """The standard fields of a record and its others."""
    try:
        fields = _Record.model_validate(record)
    except ValidationError as error:
        advice = _Record.model_fields[str(error.errors()[0]["loc"][0])].description
        raise AnnotationError(f"{place}: {told(error)}. {advice}") from None
    others = {name: value for name, value in (fields.model_extra or {}).items() if name not in _DERIVED}
    standard = {name: getattr(fields, name) for name in _Record.model_fields}
    return others | standard | {"caption": fields.caption or [""]}


def _hold_out(table: pd.DataFrame, seed: int, notes: list[str]) -> pd.DataFrame:
    train = table["split"] == "train"
    identities = np.unique(table["identity"][train])
    if identities.size < 2 or (table["split"] == "val").any():
        return table
    count = min(VALIDATION_IDENTITIES, max(1, identities.size // 5))
    people = np.random.default_rng(seed).choice(identities, count, replace=False)
    held_out = train & table["identity"].isin(people)
    notes.append(
        f"The file has no validation split: {count:,} of {identities.size:,} training identities "
        f"({held_out.sum():,} captions) were held out for validation with seed {seed}; see column 'held_out'."
    )
    return table.assign(split=table["split"].mask(held_out, "val"), held_out=held_out)


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
    if published := _published(text):
        return published
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


def find_annotation(root: str | Path, name: str | None) -> tuple[Path, str]:
    """The annotation file that `root` means, and the data set's canonical name.

    The file is `root` itself, or lies in that folder: the one with a known file name, in any case, else the only CSV or
    JSON. What is said by a file's name, and of SimPEDES by what lies beside the file, must agree with `name`; without
    a name the file decides, by its own name where that is no known one. One's own data may have CUHK-PEDES' file names,
    whose layout is the field's. The owners' `caption_all.json`, without splits, gives way to `reid_raw.json` beside it.

    Args:
        root: file or folder; `~` is the user's home.
        name: the data set's, in any spelling, if known; picks the file where a folder holds several.

    Raises:
        AnnotationError: there is no such path, no annotation file, more than one that fits, or one of another data
            set than `name`.
        ConfigError: see `canonical_name`.
    """
    root, name = Path(root).expanduser(), canonical_name(name or "")
    files = _annotation_files(root)
    said = {file: _said(file) for file in files}
    published = [file for file in files if said[file]]
    if not name:
        fitting = published or files
    elif name in REAL or name.startswith(SIMPEDES):
        fitting = [file for file in published if said[file] == name or said[file].startswith(f"{name}-")]
        fitting = fitting or (files if name in REAL and not published else [])
    else:
        fitting = [file for file in files if not said[file]]
        fitting = fitting or [file for file in files if said[file] == _GENERIC.get(file.name.lower()) == "CUHK-PEDES"]
    lower = [file.name.lower() for file in fitting]
    if "reid_raw.json" in lower and "caption_all.json" in lower:
        del fitting[lower.index("caption_all.json")]
    listing = ", ".join(file.name + f" ({said[file]})" * bool(said[file]) for file in files)
    if not fitting:
        marks = f"{SIMPEDES} has dataset.json and truth/ beside its reid_raw.json"
        advice = marks if name.startswith(SIMPEDES) else "a set of your own needs a file name like mine.json"
        raise AnnotationError(
            f"{root}: no annotation file of {name}; found {listing}. Correct the name of the data set or leave it out; "
            f"{advice}"
        )
    if len(fitting) > 1:
        raise AnnotationError(f"{root}: several annotation files ({listing}); give one of them as root, or a name")
    file = fitting[0]
    named = (name if name != SIMPEDES else "") or said[file] or canonical_name(file.stem)
    if named.startswith(SIMPEDES) and not said[file]:
        raise AnnotationError(f"{file}: {SIMPEDES} by its name, but dataset.json and truth/ do not lie beside it")
    return file, named


def read_records(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All records of an annotation file in file order, and notes on what was decided.

    For a file that is an object of splits the field `split` holds the key; its lists `query` and `gallery`, which
    restate `test`, are left out and noted.

    Raises:
        AnnotationError: unreadable, not JSON or CSV in UTF-8, of another shape, no records.
    """
    notes: list[str] = []
    with said_plainly(f"{file}: cannot be read", AnnotationError):
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        if file.suffix.lower() == ".csv":
            records = _parse_csv(content.decode(), file)
        else:
            records = _flatten(from_json(content), file, notes)
    except AnnotationError:
        raise
    except (ValueError, csv.Error) as error:
        raise AnnotationError(
            f"{file}: not {file.suffix[1:].upper()} in UTF-8 ({error}); the file may be cut short: fetch it again"
        ) from None
    if not records:
        raise AnnotationError(f"{file}: holds no records; expected at least one annotated image")
    return records, notes


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
        return f"{SIMPEDES}-{Truth(file.parent).record['recipe']['domain']}"
    return _GENERIC.get(file.name.lower()) or _published(file.stem)


def _flatten(content: Any, file: Path, notes: list[str]) -> list[dict[str, Any]]:
    parts = content if isinstance(content, dict) else {"": content}
    records: list[dict[str, Any]] = []
    for key, part in parts.items():
        split = _SPELLINGS.get(key.lower())
        if not isinstance(part, list) or not all(isinstance(record, dict) for record in part):
            raise AnnotationError(
                f"{file}: expected a list of records, or an object with the keys train, val and test that holds one "
                f"each{f', not under {key!r}' if key else ''} (pandas writes a list with to_json(orient='records'))"
            )
        if split is None and key.lower() in ("query", "gallery"):
            notes.append(
                f"The list '{key}' of {file.name} ({len(part):,} records) was left out: evaluation uses 'test'."
            )
            continue
        if split is None and key:
            raise AnnotationError(f"{file}: unknown split name {key!r}; expected train, val or test")
        for record in part if split else ():
            if _SPELLINGS.get(str(record.get("split", key)).lower()) != split:
                raise AnnotationError(f"{file}: a record under {key!r} says split {record['split']!r:.100}")
        records += [{**record, "split": split} for record in part] if split else part
    if notes and not any(_SPELLINGS.get(key.lower()) == "test" for key in parts):
        raise AnnotationError(f"{file}: has {' and '.join(parts)} but no test; name the list of captions 'test'")
    return records


def _parse_csv(text: str, file: Path) -> list[dict[str, Any]]:
    rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True))
    for number, row in enumerate(rows):
        if "" in row or None in row.values():
            raise AnnotationError(
                f"{file}, record {number}: not as many cells as the header; put captions with commas in double quotes"
            )
    return rows


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
