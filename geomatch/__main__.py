"""`python -m geomatch` and the `geomatch` command."""

from geomatch.cli.commands import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
