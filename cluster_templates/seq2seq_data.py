"""Strings of three to six digits, and the same backwards. No two of them are the same."""

import numpy as np

PAD, START, END, DIGIT = 0, 1, 2, 3
LENGTH, TRAIN, TEST = 6, 8000, 500


def load():
    rng = np.random.default_rng(0)
    strings = {}  # a set in the order in which they were made
    while len(strings) < TRAIN + TEST:
        strings[tuple(rng.integers(10, size=rng.integers(3, LENGTH + 1)).tolist())] = True
    x, y = map(np.array, zip(*map(pair, strings), strict=True))
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def pair(string):
    """What the model reads, with what it has written before each word; and what it should write."""
    digits = [DIGIT + digit for digit in string]
    backwards = digits[::-1]
    read = padded(digits, LENGTH)
    return read + padded([START, *backwards], LENGTH + 1), padded([*backwards, END], LENGTH + 1)


def padded(words, length):
    return words + [PAD] * (length - len(words))
