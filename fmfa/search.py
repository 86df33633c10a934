"""Search a gallery: `python -m fmfa.search GALLERY "a woman in a red coat" -k 20 --where "camera == 'entrance'"`.

Galleries are made by `python -m fmfa.gallery`.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import pandas as pd

from fmfa.errors import ConfigError, FmfaError
from fmfa.evaluation.evaluate import encode_images, encode_sentence
from fmfa.gallery import Gallery, open_gallery
from fmfa.systems import System


def search_gallery(
    gallery: Gallery,
    system: System,
    sentences: list[str],
    pictures: list[str],
    k: int = 10,
    where: str = "",
    approximate: bool | None = None,
) -> pd.DataFrame:
    """The k best pictures of a gallery for each sentence and each picture, best first.

    Args:
        gallery: an open gallery.
        system: the one that encoded it.
        sentences: descriptions of people.
        pictures: files; their likes are searched.
        k: hits per query.
        where: condition on the gallery's columns; see `Gallery.rows`.
        approximate: see `Gallery.search`.

    Returns:
        One row per hit: `query`, `rank` (from 1), then the columns of `Gallery.search`.

    Raises:
        ConfigError: an empty sentence or a condition that is not valid.
        ImageError: a picture that cannot be read.
    """
    queries = [(text, encode_sentence(system.model, text, system.tokenizer)) for text in sentences]
    if pictures:
        queries += zip(pictures, encode_images(system.model, pictures, system.transform, progress=False), strict=True)
    hits = []
    for name, query in queries:
        found = gallery.search(query, k, where, approximate).drop(columns="vector")
        found.insert(0, "query", name)
        found.insert(1, "rank", range(1, len(found) + 1))
        hits.append(found)
    return pd.concat(hits, ignore_index=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 searched, 2 a mistake in what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.search", description="Search a gallery of pictures.")
    parser.add_argument("gallery", help="folder made by python -m fmfa.gallery build")
    parser.add_argument("sentences", nargs="*", metavar="sentence", help="description of a person")
    parser.add_argument("--file", help="text file with one sentence per line")
    parser.add_argument("--like", action="append", default=[], metavar="PICTURE", help="search for more like this")
    parser.add_argument("-k", type=int, default=10, help="hits per query")
    parser.add_argument("--where", default="", help="SQL condition on the columns, such as \"camera == 'entrance'\"")
    parser.add_argument(
        "--approximate",
        action=argparse.BooleanOptionalAction,
        help="see only near cells; of large galleries the default",
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument("--weights", default="", help="where the gallery's weights are now, if they were moved")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    try:
        sentences = [*options.sentences, *_lines(options.file)]
        if not sentences and not options.like:
            raise ConfigError("nothing to search for; give a sentence, --file or --like")
        if options.k < 1:
            raise ConfigError(f"-k is {options.k}; expected 1 or more")
        gallery = open_gallery(options.gallery)
        system = gallery.system(options.device, options.weights)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            hits = search_gallery(
                gallery, system, sentences, options.like, options.k, options.where, options.approximate
            )
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(_written(hits, options.format))
    return 0


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error


def _written(hits: pd.DataFrame, form: str) -> str:
    if form == "csv":
        return hits.to_csv(index=False).rstrip("\n")
    if form == "json":
        return json.dumps(json.loads(hits.to_json(orient="records")), indent=1, ensure_ascii=False)
    shown = hits.drop(columns=["size", "changed"]).rename(columns={"deviations": "deviations above mean"})
    inside = [path if (near := os.path.relpath(path)).startswith("..") else near for path in shown["path"]]
    shown = shown.assign(path=inside).drop(columns=[] if shown["query"].nunique() > 1 else "query")
    return shown.to_string(index=False, float_format="{:.3f}".format)


if __name__ == "__main__":
    sys.exit(main())
