"""The command line `python -m fmfa.parity FILE.npz`."""

import sys

from fmfa.parity import main

if __name__ == "__main__":
    sys.exit(main())
