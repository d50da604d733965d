"""Several runs side by side, as a table and a picture: python -m qlora.log outputs/a outputs/b"""

import argparse
import sys
from pathlib import Path

from qlora.errors import InputError
from qlora.run.metrics import compare_table, read_runs
from qlora.run.plots import compare


def compare_runs(folders: list[Path], output: Path) -> None:
    """Print a table over the runs and draw their losses; raises InputError for bad folders and names."""
    if output.suffix != ".png":
        raise InputError(f"--output {output}: the picture is a PNG, its name has to end in .png")
    runs = read_runs(folders)
    print(compare_table(runs))
    try:
        compare(runs, output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}") from error
    print(f"the losses over the steps: {output}")


def comparison_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m qlora.log", description="Compare runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="The --output_dir of a run.")
    parser.add_argument(
        "--output", type=Path, default="compare.png", help="The picture. (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 1 for what the message says, 2 for wrong usage."""
    arguments = comparison_parser().parse_args(argv)
    try:
        compare_runs(arguments.runs, arguments.output)
    except InputError as error:
        sys.exit(f"qlora.log: error: {error}")


if __name__ == "__main__":
    main()
