"""The noise of the draws, in numpy: Philox4x32-10 and standard Gumbel numbers, written from the paper and not from our kernels."""

import numpy as np


def philox(counter, key):
    """uint32 [4, ...], two ints -> uint32 [4, ...]"""
    counter = [np.asarray(word, np.uint64) for word in counter]
    key = list(key)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        products = [np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]]
        counter = [
            (products[1] >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            products[1] & low,
            (products[0] >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            products[0] & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return np.stack(counter)


def pair_noise(seed, rows, columns):
    """Of every pair: [2, rows, columns], for the draw of the row and for that of the column."""
    i, j = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    bits = philox([j, i, 0 * i, 0 * i], (seed % 2**32, (seed % 2**64) >> 32))[:2]
    uniform = ((bits >> np.uint64(1)).astype(float) + 0.5) / 2**31
    return -np.log(-np.log1p(-uniform))
