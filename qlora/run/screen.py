"""What is printed, as text."""


def start_screen(**facts: str) -> str:
    """The facts of a run, one a line."""
    return "\n".join(f"{name:<10}  {value}" for name, value in facts.items())


def side_by_side(samples: list[dict]) -> str:
    """Each prompt, and below it the answers of base and tuned model, as far as there are any."""
    lines = []
    for sample in samples:
        lines.append(f"--- {sample['prompt']}")
        lines += [f"{name:>5}: {sample[name].strip()}" for name in ("base", "tuned") if name in sample]
    return "\n".join(lines)


def table(rows: list[list[str]], text_columns: int = 1) -> str:
    """Aligned columns: the first ones, which hold text, to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number < text_columns else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
