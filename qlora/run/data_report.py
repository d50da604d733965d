"""--data_report: print or write what qlora/data/report.py finds out about the rows."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from qlora import ranks
from qlora.data.report import data_report, full_report, show_rows
from qlora.errors import InputError
from qlora.run.plots import save_lengths

SHOWN_ROWS = 3


def print_data_report(
    kind: str, output_dir: Path, load_data: Callable, batch_size: int, accumulation: int, seed: int
) -> int:
    """Print the report of the rows that `load_data` returns; the exit code is 1 if it finds problems.

    `kind` is text or json. For json, stdout holds nothing else, and the report and a histogram of the row
    lengths are also written to `output_dir`. Raises InputError.
    """
    if not ranks.is_first():  # under torchrun one process does it
        return 0
    with redirect_stdout(sys.stderr if kind == "json" else sys.stdout):
        tokenizer, _, train_rows, validation_rows, *_ = load_data()
        report = data_report(train_rows, validation_rows, batch_size, accumulation, seed)
    if kind == "json":
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / "data_report.json").write_text(json.dumps(report, indent=2) + "\n")
            save_lengths(report, output_dir / "data_report.png")
        except OSError as error:
            raise InputError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error
        print(json.dumps(report, indent=2))
    else:
        print(full_report(report))
        print(show_rows(train_rows, tokenizer, SHOWN_ROWS, use_color=sys.stdout.isatty()))
    return 1 if report["problems"] else 0
