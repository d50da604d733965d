"""Tokenized rows of random ids, for tests that need no text."""

import numpy as np
from datasets import Dataset

from qlora.data.formatting import Formatting
from qlora.data.segments import IGNORE_INDEX
from qlora.data.tokenize import TOKENS, token_columns
from qlora.data.tokenized import TokenizedRows


def random_rows(lengths, seed: int = 0) -> TokenizedRows:
    """Rows of these lengths; about half of the tokens are targets, the last always and the first never."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, 400, size=length) for length in lengths]
    labels = [np.where(generator.random(len(row)) < 0.5, row, IGNORE_INDEX) for row in ids]
    for row_ids, row_labels in zip(ids, labels):
        row_labels[0], row_labels[-1] = IGNORE_INDEX, row_ids[-1]
    columns = [
        token_columns("", *pair, {"n": number}, [], bos_id=1, eos_id=2)
        for number, pair in enumerate(zip(ids, labels))
    ]
    table = Dataset.from_list(columns, features=TOKENS)
    return TokenizedRows(
        table, Formatting("text"), np.arange(len(ids)), np.zeros(len(ids), int), rows_read=len(ids)
    )
