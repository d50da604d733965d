"""Near-duplicate rows: a MinHash signature of each row's text, and a search for similar signatures."""

import re
import zlib
from collections.abc import Iterable
from functools import cache

import numpy as np

SIGNATURE_SIZE = 32  # minima in a signature
SHINGLE_WORDS = 3  # texts are compared as sets of runs of this many words
SHINGLES_AT_ONCE = 10_000  # bounds memory for a long row: a shingle takes SIGNATURE_SIZE * 8 bytes
BANDS = 8  # signatures are compared only if one of this many parts of them is equal
NEAR = 0.8  # rows are near-duplicates from this Jaccard similarity on; the share of equal minima estimates it

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # a Chinese character counts as a word


def signature(row: dict) -> np.ndarray:
    """MinHash of the row's text, (SIGNATURE_SIZE,) uint32 (Broder, On the resemblance of documents, 1997).

    The share of equal entries of two rows estimates the Jaccard similarity of their shingles. Case and
    punctuation are ignored.
    """
    words = [zlib.crc32(word.encode()) for word in WORD.findall(" ".join(_texts(row)).lower())]
    words = np.array(words or [0], dtype=np.uint64)
    multipliers, increments = _hash_functions()
    shingles = np.zeros(max(1, len(words) - SHINGLE_WORDS + 1), dtype=np.uint64)
    for start in range(min(SHINGLE_WORDS, len(words))):
        shingles = shingles * multipliers[0] + words[start : start + len(shingles)]
    minima = np.full(SIGNATURE_SIZE, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(shingles), SHINGLES_AT_ONCE):
        some = shingles[start : start + SHINGLES_AT_ONCE, None]
        hashes = some * multipliers + increments  # (shingles, SIGNATURE_SIZE), modulo 2^64
        minima = np.minimum(minima, hashes.min(axis=0))
    return (minima >> np.uint64(32)).astype(np.uint32)


def has_earlier_near_duplicate(signatures: np.ndarray, reference_rows: int | None = None) -> np.ndarray:
    """Which rows of `signatures`, (rows, SIGNATURE_SIZE), resemble an earlier row: (rows,) bool.

    With `reference_rows` only the first so many rows count as earlier rows. Locality-sensitive hashing
    (Leskovec et al., Mining of Massive Datasets, chapter 3): rows with an equal band form a group, and each
    row is compared with the first of its groups only.
    """
    row_numbers = np.arange(len(signatures))
    is_reference = row_numbers < (len(signatures) if reference_rows is None else reference_rows)
    is_near = np.zeros(len(signatures), bool)
    for band in np.split(signatures, BANDS, axis=1):
        band_hash = np.zeros(len(band), np.uint64)
        for minima in band.T:
            band_hash = band_hash * np.uint64(0x9E3779B97F4A7C15) + minima.astype(np.uint64)
        _, first_rows, group = np.unique(band_hash, return_index=True, return_inverse=True)
        first = first_rows[group]
        equal_minima = np.zeros(len(band))
        for minima in signatures.T:  # column by column: a million rows at once would take 128 MB
            equal_minima += minima == minima[first]
        is_similar = equal_minima >= NEAR * signatures.shape[1]
        is_near |= is_similar & is_reference[first] & (first != row_numbers)
    return is_near


@cache
def _hash_functions() -> tuple[np.ndarray, np.ndarray]:
    """Odd multipliers and increments, (SIGNATURE_SIZE,) uint64 each, the same on every machine."""
    random = np.random.default_rng(0)
    multipliers, increments = random.integers(2**63, size=(2, SIGNATURE_SIZE), dtype=np.uint64) * 2 + 1
    return multipliers, increments


def _texts(value) -> Iterable[str]:
    """Every string in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
