"""`python -m flextok <command>`."""

import sys

from flextok.cli import main

if __name__ == "__main__":
    sys.exit(main())
