"""The data report: lengths, padding, truncation, duplicates, leaks, and problems that would ruin a run."""

import numpy as np

from qlora import ranks
from qlora.data.batch import padded_length
from qlora.data.order import StepOrder
from qlora.data.segments import IGNORE_INDEX
from qlora.data.similarity import has_earlier_near_duplicate
from qlora.data.tokenized import TokenizedRows

PERCENTILES = {"min": 0, "median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
HISTOGRAM_BINS = 16
BAR_WIDTH = 40  # characters of the longest bar in the text's histogram


def data_report(
    train_rows: TokenizedRows,
    validation_rows: TokenizedRows | None,
    batch_size: int,
    accumulation: int,
    seed: int,
) -> dict:
    """The whole report as JSON values, for steps of `accumulation` micro-batches of `batch_size` rows.

    Only the first rank makes it, and prints and saves it: it takes time and memory. Others get {}.
    """
    if not ranks.is_first():
        return {}
    train = describe_rows(train_rows, batch_size, accumulation, seed)
    report = {"max_length": train_rows.max_length, "train": train}
    if validation_rows is not None:
        report["validation"] = describe_rows(validation_rows, batch_size, accumulation, seed)
        report["in_both"] = count_leaks(train_rows, validation_rows)
    report["problems"] = problems(train)
    return report


def describe_rows(rows: TokenizedRows, batch_size: int, accumulation: int, seed: int) -> dict:
    """One split's part of the report."""
    lengths = np.concatenate([rows.full_lengths, rows.lost_lengths])
    counts, edges = np.histogram(lengths, bins=HISTOGRAM_BINS, range=(0, lengths.max()))
    duplicates, near_duplicates = count_duplicates(rows)
    packs = StepOrder(rows.lengths, 1, seed, pack_length=rows.max_length).steps_in(0)
    tokens = int(rows.lengths.sum())
    return {
        "files": rows.files,
        "format": rows.row_format,
        "rows_read": rows.rows_read,
        "rows_used": len(rows),
        "rows_dropped": dict(rows.dropped),
        "first_dropped": rows.first_dropped,
        "notes": {note: {"count": count, "first": first} for note, (count, first) in rows.notes.items()},
        "tokens": tokens,
        "targets": rows.targets,
        "lengths": {
            name: int(np.percentile(lengths, percent, method="inverted_cdf"))
            for name, percent in PERCENTILES.items()
        },
        "histogram": {"edges": edges.round().astype(int).tolist(), "rows": counts.tolist()},
        "rows_truncated": rows.answers_cut + len(rows.lost_lengths),
        "answers_cut": rows.answers_cut,
        "answers_lost": len(rows.lost_lengths),
        "tokens_lost": int(lengths.sum()) - tokens,
        "padded_full": tokens / count_padded_tokens(rows.lengths, batch_size, accumulation, seed),
        "packed_full": tokens / (packs * rows.max_length),
        "packs": packs,
        "ends_in_trained_eos": float((rows.column("ends_in_eos") & ~rows.is_cut).mean()),
        "starts_with_bos": float((rows.column("leading_bos") > 0).mean()),
        "double_bos": int((rows.column("leading_bos") > 1).sum()),
        "duplicates": duplicates,
        "near_duplicates": near_duplicates,
    }


def count_padded_tokens(lengths: np.ndarray, batch_size: int, accumulation: int, seed: int) -> int:
    """Tokens of an epoch of padded micro-batches, the padding included."""
    order = StepOrder(lengths, batch_size * accumulation, seed)
    padded = 0
    for step in range(order.steps_in(0)):
        step_lengths = lengths[[row for (row,) in order.packs(step)]]
        for batch in np.split(step_lengths, range(batch_size, len(step_lengths), batch_size)):
            padded += len(batch) * padded_length(int(batch.max()))
    return padded


def problems(split: dict) -> list[str]:
    """What would ruin a run on these rows."""
    messages = []
    if split["targets"] == 0:
        messages.append("no token is trained")
    if split["ends_in_trained_eos"] == 0:
        messages.append("no row trains the end-of-sequence token: the model would never learn to stop")
    if split["double_bos"]:
        messages.append(f"{split['double_bos']:,} rows start with two BOS tokens")
    return messages


def count_duplicates(rows: TokenizedRows) -> tuple[int, int]:
    """(rows with the same tokens as an earlier row, other rows with almost the same text as one)."""
    _, first = np.unique(rows.column("digest"), return_index=True)
    is_duplicate = np.ones(len(rows), bool)
    is_duplicate[first] = False
    is_near = has_earlier_near_duplicate(rows.signatures)
    return int(is_duplicate.sum()), int((is_near & ~is_duplicate).sum())


def count_leaks(train_rows: TokenizedRows, validation_rows: TokenizedRows) -> dict[str, int]:
    """Validation rows that are training rows too: with the same tokens, and with almost the same text."""
    is_exact = np.isin(validation_rows.column("digest"), train_rows.column("digest"))
    signatures = np.concatenate([train_rows.signatures, validation_rows.signatures])
    is_near = has_earlier_near_duplicate(signatures, len(train_rows))[len(train_rows) :]
    return {"exact": int(is_exact.sum()), "near": int((is_near & ~is_exact).sum())}


def short_report(report: dict) -> dict[str, str]:
    """The report in a few lines for the start screen: subject -> text."""
    facts = {}
    if files := [line for name in ("train", "validation") for line in report.get(name, {}).get("files", [])]:
        facts["files"] = "\n".join(files)
    if notes := report["train"]["notes"]:
        facts["notes"] = "\n".join(_notes(notes))
    facts |= _summary(report["train"], report["max_length"])
    if "in_both" in report:
        facts["leaks"] = _leaks(report["in_both"])
    if report["problems"]:
        facts["PROBLEM"] = "; ".join(report["problems"])
    return facts


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
            *(f"  note: {note}" for note in _notes(split["notes"])),
            *(f"  files: {line}" for line in split["files"]),
            f"  format {split['format']}; {split['tokens']:,} tokens, {split['targets']:,} trained",
            *(f"  {subject}: {text}" for subject, text in _summary(split, report["max_length"]).items()),
            *_histogram_bars(split["histogram"]),
        ]
    if "in_both" in report:
        lines.append(f"leaks: {_leaks(report['in_both'])}")
    lines += [f"PROBLEM {problem}" for problem in report["problems"]]
    return "\n".join(lines)


def _summary(split: dict, max_length: int) -> dict[str, str]:
    lengths = ", ".join(f"{name} {tokens:,}" for name, tokens in split["lengths"].items())
    loss = "nothing is cut"
    if split["tokens_lost"]:
        loss = (
            f"{split['answers_cut']:,} answers cut, {split['answers_lost']:,} lost, "
            f"{split['tokens_lost']:,} tokens lost"
        )
    return {
        "lengths": f"{lengths} tokens; at --max_length {max_length}: {loss}",
        "padding": f"{split['packs']:,} packs, {split['packed_full']:.1%} full; padded batches would be "
        f"{split['padded_full']:.1%} full",
        "content": f"EOS trained in {split['ends_in_trained_eos']:.1%} of the rows, BOS in "
        f"{split['starts_with_bos']:.1%}; {split['duplicates']:,} duplicates, "
        f"{split['near_duplicates']:,} near-duplicates",
    }


def _notes(notes: dict[str, dict]) -> list[str]:
    return [f"{text} ({note['count']:,}, first: {note['first']})" for text, note in notes.items()]


def _leaks(in_both: dict[str, int]) -> str:
    return (
        f"{in_both['exact']:,} validation rows are also training rows, {in_both['near']:,} more are "
        "near-duplicates of training rows"
    )


def _histogram_bars(histogram: dict) -> list[str]:
    most = max(histogram["rows"])
    edges = histogram["edges"]
    return [
        f"  {low:>7,} to {high:>7,} tokens  {'#' * -(-BAR_WIDTH * count // most):<{BAR_WIDTH}} {count:,}"
        for low, high, count in zip(edges, edges[1:], histogram["rows"])
    ]


def show_rows(rows: TokenizedRows, tokenizer, count: int, use_color: bool) -> str:
    """The first rows as they are trained: trained text green or in ⟦ ⟧, special tokens spelled out."""
    before, after = ("\033[32m", "\033[0m") if use_color else ("⟦", "⟧")
    texts = []
    for row, (ids, labels) in enumerate(rows.fetch(list(range(min(count, len(rows)))))):
        is_trained = (labels != IGNORE_INDEX).tolist()
        pieces, start = [], 0
        for position in range(1, len(ids) + 1):
            if position == len(ids) or is_trained[position] != is_trained[start]:
                text = tokenizer.decode(ids[start:position], skip_special_tokens=False)
                pieces.append(f"{before}{text}{after}" if is_trained[start] else text)
                start = position
        text = "".join(pieces)
        texts.append(f"--- {rows.location(row)}: {len(ids)} tokens, {sum(is_trained)} trained\n{text}")
    return "\n".join(texts)
