"""The data report: what the rows hold, what --max_length and padding cost, and what would ruin a training."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from qlora.data.batch import PAD_MULTIPLE
from qlora.data.formats import IGNORE_INDEX
from qlora.data.order import StepOrder
from qlora.data.prepare import load_data
from qlora.data.tokenize import TokenizedRows
from qlora.errors import InputError
from qlora.run.plots import save_lengths

PERCENTILES = {"min": 0, "median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
HISTOGRAM_BINS = 16
SHOWN_ROWS = 3
NEAR = 0.8  # share of equal minima from which two rows count as near-duplicates: about the Jaccard similarity
BANDS = 8  # signatures are compared where one of that many parts is equal


def report_data(config) -> int:
    """--data_report: print the report of a TrainConfig's data; returns the exit code, 1 for problems.

    For json, standard output holds nothing else, and the report and its histogram go to --output_dir too.
    """
    is_json = config.data_report == "json"
    with redirect_stdout(sys.stderr if is_json else sys.stdout):
        tokenizer, _, train_rows, validation_rows = load_data(config)
        batch = config.per_device_train_batch_size, config.gradient_accumulation_steps
        report = data_report(train_rows, validation_rows, *batch, config.seed)
    if is_json:
        folder = Path(config.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "data_report.json").write_text(json.dumps(report, indent=2) + "\n")
            save_lengths(report, folder / "data_report.png")
        except OSError as error:
            raise InputError(f"--output_dir {folder} cannot be written: {error.strerror}") from error
        print(json.dumps(report, indent=2))
    else:
        print(full_report(report))
        print(show_rows(train_rows, tokenizer, SHOWN_ROWS, in_colour=sys.stdout.isatty()))
    return 1 if report["problems"] else 0


def data_report(
    train_rows: TokenizedRows,
    validation_rows: TokenizedRows | None,
    batch_size: int,
    accumulation: int,
    seed: int,
) -> dict:
    """Everything the report says, as values that JSON knows; steps are of `accumulation` x `batch_size`."""
    train = describe_rows(train_rows, batch_size, accumulation, seed)
    report = {"max_length": train_rows.max_length, "train": train}
    if validation_rows is not None:
        report["validation"] = describe_rows(validation_rows, batch_size, accumulation, seed)
        report["in_both"] = count_leaks(train_rows, validation_rows)
    report["problems"] = problems(train)
    return report


def describe_rows(rows: TokenizedRows, batch_size: int, accumulation: int, seed: int) -> dict:
    """One split's part of the report."""
    whole = np.concatenate([rows.whole_lengths, rows.lost_lengths])
    counts, edges = np.histogram(whole, bins=HISTOGRAM_BINS, range=(0, whole.max()))
    duplicates, near = count_duplicates(rows)
    padded = 0
    order = StepOrder(rows.lengths, batch_size * accumulation, seed)
    for step in range(order.steps_in(0)):
        lengths = rows.lengths[[row for (row,) in order.packs(step)]]
        for few in np.split(lengths, range(batch_size, len(lengths), batch_size)):
            padded += len(few) * -(-int(few.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
    packs = StepOrder(rows.lengths, 1, seed, pack_length=rows.max_length).steps_in(0)
    tokens = int(rows.lengths.sum())
    return {
        "format": rows.row_format,
        "rows_read": rows.rows_read,
        "rows_used": len(rows),
        "rows_dropped": dict(rows.dropped),
        "first_dropped": rows.first_dropped,
        "tokens": tokens,
        "targets": rows.targets,
        "lengths": {
            name: int(np.percentile(whole, p, method="inverted_cdf")) for name, p in PERCENTILES.items()
        },
        "histogram": {"edges": edges.round().astype(int).tolist(), "rows": counts.tolist()},
        "rows_truncated": rows.truncated + len(rows.lost_lengths),
        "answers_cut": rows.truncated,
        "answers_lost": len(rows.lost_lengths),
        "tokens_lost": int(whole.sum()) - tokens,
        "padded_full": tokens / padded,
        "packed_full": tokens / (packs * rows.max_length),
        "packs": packs,
        "ends_in_trained_eos": float((rows.column("ends_in_eos") & ~rows.is_cut).mean()),
        "starts_with_bos": float((rows.column("leading_bos") > 0).mean()),
        "double_bos": int((rows.column("leading_bos") > 1).sum()),
        "duplicates": duplicates,
        "near_duplicates": near,
    }


def problems(split: dict) -> list[str]:
    """What would ruin a training on these rows."""
    found = []
    if split["targets"] == 0:
        found.append("no token is trained")
    if split["ends_in_trained_eos"] == 0:
        found.append("no row trains the end-of-sequence token: the model would never learn to stop")
    if split["double_bos"]:
        found.append(f"{split['double_bos']:,} rows start with two BOS tokens")
    return found


def count_duplicates(rows: TokenizedRows) -> tuple[int, int]:
    """(rows whose tokens stand in an earlier row, other rows whose text is nearly that of an earlier row)."""
    _, first = np.unique(rows.column("digest"), return_index=True)
    is_duplicate = np.ones(len(rows), bool)
    is_duplicate[first] = False
    return int(is_duplicate.sum()), int((_near_an_earlier(rows.signatures) & ~is_duplicate).sum())


def count_leaks(train_rows: TokenizedRows, validation_rows: TokenizedRows) -> dict:
    """Validation rows that stand in the training rows too: exactly, and nearly."""
    exact = np.isin(validation_rows.column("digest"), train_rows.column("digest"))
    both = np.concatenate([train_rows.signatures, validation_rows.signatures])
    is_near = _near_an_earlier(both, len(train_rows))[len(train_rows) :]
    return {"exact": int(exact.sum()), "near": int((is_near & ~exact).sum())}


def _near_an_earlier(signatures: np.ndarray, references: int | None = None) -> np.ndarray:
    """Which rows of (rows, minima) agree in NEAR of them with an earlier row, one of the first `references`.

    Compared are rows of which a whole band of minima is equal (locality-sensitive hashing, Leskovec et al.,
    Mining of Massive Datasets, chapter 3), each with the first row of such a group.
    """
    is_near = np.zeros(len(signatures), bool)
    for band in np.split(signatures, BANDS, axis=1):
        key = np.zeros(len(band), np.uint64)
        for minimum in band.T:
            key = key * np.uint64(0x9E3779B97F4A7C15) + minimum.astype(np.uint64)
        _, first, group = np.unique(key, return_index=True, return_inverse=True)
        first = first[group]
        agreement = np.zeros(len(band))
        for column in signatures.T:  # a column at a time: there may be a million rows
            agreement += column == column[first]
        is_earlier = first < (np.arange(len(first)) if references is None else references)
        is_near |= (agreement >= NEAR * signatures.shape[1]) & is_earlier & (first != np.arange(len(first)))
    return is_near


def short_report(report: dict) -> dict[str, str]:
    """The report in a few lines for every start: subject -> text."""
    facts = _costs(report["train"], report["max_length"])
    if "in_both" in report:
        leaks = report["in_both"]
        facts["leaks"] = f"{leaks['exact']:,} validation rows are trained on, {leaks['near']:,} nearly"
    if report["problems"]:
        facts["PROBLEM"] = "; ".join(report["problems"])
    return facts


def _costs(split: dict, max_length: int) -> dict[str, str]:
    lengths = ", ".join(f"{name} {tokens:,}" for name, tokens in split["lengths"].items())
    cut = "nothing is cut"
    if split["tokens_lost"]:
        cut = (
            f"{split['answers_cut']:,} answers cut, {split['answers_lost']:,} lost, "
            f"{split['tokens_lost']:,} tokens lost"
        )
    return {
        "lengths": f"{lengths} tokens; at --max_length {max_length}: {cut}",
        "padding": f"{split['packs']:,} packs, {split['packed_full']:.1%} full; padded batches would be "
        f"{split['padded_full']:.1%} full",
        "content": f"EOS trained in {split['ends_in_trained_eos']:.1%} of the rows, BOS in "
        f"{split['starts_with_bos']:.1%}; {split['duplicates']:,} duplicates, "
        f"{split['near_duplicates']:,} near-duplicates",
    }


def full_report(report: dict) -> str:
    """The whole report as text."""
    lines = []
    for name in ("train", "validation"):
        if name not in report:
            continue
        split = report[name]
        dropped = sum(split["rows_dropped"].values())
        lines += [
            f"{name}: {split['rows_read']:,} rows read = {split['rows_used']:,} used + {dropped:,} dropped",
            *(
                f"  dropped: {count:,} {reason}, first: {split['first_dropped'][reason]}"
                for reason, count in split["rows_dropped"].items()
            ),
            f"  format {split['format']}; {split['tokens']:,} tokens, {split['targets']:,} trained",
            *(f"  {what}: {text}" for what, text in _costs(split, report["max_length"]).items()),
            *_bars(split["histogram"]),
        ]
    if "in_both" in report:
        lines.append(f"of the validation rows {report['in_both']['exact']:,} are trained on too, ")
        lines[-1] += f"{report['in_both']['near']:,} nearly"
    lines += [f"PROBLEM {problem}" for problem in report["problems"]]
    return "\n".join(lines)


def _bars(histogram: dict) -> list[str]:
    most = max(histogram["rows"])
    edges = histogram["edges"]
    return [
        f"  {low:>7,} to {high:>7,} tokens  {'#' * -(-40 * rows // most):<40} {rows:,}"
        for low, high, rows in zip(edges, edges[1:], histogram["rows"])
    ]


def show_rows(rows: TokenizedRows, tokenizer, count: int, in_colour: bool) -> str:
    """The first rows as they are trained: trained text green or in ⟦ ⟧, special tokens spelled out."""
    before, after = ("\033[32m", "\033[0m") if in_colour else ("⟦", "⟧")
    shown = []
    for number, (ids, labels) in enumerate(rows.fetch(list(range(min(count, len(rows)))))):
        is_trained = (labels != IGNORE_INDEX).tolist()
        pieces, start = [], 0
        for position in range(1, len(ids) + 1):
            if position == len(ids) or is_trained[position] != is_trained[start]:
                text = tokenizer.decode(ids[start:position], skip_special_tokens=False)
                pieces.append(f"{before}{text}{after}" if is_trained[start] else text)
                start = position
        where = rows.table[int(rows.rows[number])]["where"]
        shown.append(f"--- {where}: {len(ids)} tokens, {sum(is_trained)} trained\n{''.join(pieces)}")
    return "\n".join(shown)
