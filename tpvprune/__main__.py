"""Run the command line as ``python -m tpvprune``."""

from tpvprune.cli.entry import main

if __name__ == "__main__":
    raise SystemExit(main())
