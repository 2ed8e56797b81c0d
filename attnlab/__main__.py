"""``python -m attnlab`` is the console script ``attnlab``."""

from attnlab.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
