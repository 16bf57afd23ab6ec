"""``python -m jv5kernels``: the command line."""

import sys

from jv5kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
