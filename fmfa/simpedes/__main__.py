"""`python -m fmfa.simpedes ROOT --scale small --domain street --seed 0`: write the benchmark to disk."""

import argparse
import json

from fmfa.errors import FmfaError
from fmfa.simpedes.generate import DOMAINS, SCALES, generate, recipe
from fmfa.simpedes.truth import Truth


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.simpedes", description=__doc__)
    parser.add_argument("root", help="folder to write to")
    parser.add_argument("--scale", default="small", choices=SCALES)
    parser.add_argument("--domain", default="street", choices=DOMAINS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    for name in ("train", "val", "test", "images", "captions", "family", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="overrides the scale's number")
    options = vars(parser.parse_args())
    changes = {k: v for k, v in options.items() if v is not None and k not in ("root", "workers")}
    try:
        root = generate(options["root"], recipe(**changes), options["workers"])
    except FmfaError as error:
        parser.exit(1, f"{error}\n")
    print(json.dumps({k: v for k, v in Truth(root).record.items() if k != "files"}, indent=1))


if __name__ == "__main__":
    main()
