"""Compare runs in a table and a plot: python -m qlora.log outputs/a outputs/b"""

import argparse
from pathlib import Path

from qlora.config import PLACE_FLAGS
from qlora.errors import InputError
from qlora.run.metrics import compare_table, read_runs
from qlora.run.plots import save_comparison
from qlora.run.terminal import command


def compare_runs(folders: list[Path], output: Path) -> None:
    """Print a table of the runs and plot their losses; raises InputError."""
    if output.suffix != ".png":
        raise InputError(f"--output {output}: the plot is a PNG file, so its name must end in .png")
    runs = read_runs(folders)
    print(compare_table(runs, ignored=PLACE_FLAGS))
    try:
        save_comparison(runs, output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}") from error
    print(f"losses over the steps: {output}")


def comparison_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m qlora.log", description="Compare runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="A run's --output_dir.")
    parser.add_argument(
        "--output", type=Path, default="compare.png", help="File for the plot. (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit code 1: unusable runs or output, explained in one line; 2: wrong usage."""
    with command("qlora.log"):
        arguments = comparison_parser().parse_args(argv)
        compare_runs(arguments.runs, arguments.output)


if __name__ == "__main__":
    main()
