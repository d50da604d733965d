"""Text layout of what is printed: the start screen, answers side by side, tables."""


def aligned(**facts: str) -> str:
    """One line for each fact: its name, then its value, aligned. Further lines of a value are indented."""
    return "\n".join(f"{name:<10}  {value}".replace("\n", "\n" + " " * 12) for name, value in facts.items())


def side_by_side(samples: list[dict], titles: dict[str, str]) -> str:
    """Each prompt, followed by its answers: `titles` has a sample's keys and what to print before each."""
    lines = []
    for sample in samples:
        lines.append(f"--- {sample['prompt']}")
        lines += [f"{title:>5}: {sample[key].strip()}" for key, title in titles.items()]
    return "\n".join(lines)


def table(rows: list[list[str]], text_columns: int = 1) -> str:
    """Aligned columns: the first `text_columns` left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
