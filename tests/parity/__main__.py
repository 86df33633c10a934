"""The command line `python -m tests.parity FILE.npz`."""

import sys

from tests.parity import main

if __name__ == "__main__":
    sys.exit(main())
