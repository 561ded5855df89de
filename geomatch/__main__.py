"""`python -m geomatch` and the `geomatch` command."""

import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command line."""
    from geomatch.cli.commands import app  # here, for worker processes import this module too

    if isinstance(sys.stdout, TextIOWrapper):  # else names that are not UTF-8 cannot be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
