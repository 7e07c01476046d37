"""The CPU kernels as `_host` runs them, at ragged sizes and on every instruction set: what AddressSanitizer looks at. That their numbers are right is
tested op by op."""

import numpy as np
import pytest

from modalign import _host, info

SETS = info.collect()["instruction_sets"]["ran_here"]
DTYPES = [np.float32, np.float64]


def inputs(kernel, n, D, dtype):
    generator = np.random.default_rng(n)

    def rows(count):
        return generator.standard_normal((count, D)).astype(dtype)

    name = kernel.removesuffix("_bwd")
    if name == "paired_gram_volume":
        given, gradient = [generator.standard_normal((n, 3, D)).astype(dtype)], (n,)
    elif name == "segment_max_similarity":
        given, gradient = [rows(2 * n), rows(n + 3)], (n, n + 3)
    elif "attention" in name:
        given, gradient = [generator.standard_normal(shape).astype(dtype) for shape in ((4, n, D), (2, n + 5, D), (2, n + 5, D + 2))], (4, n, D + 2)
    elif name == "knn":
        given, gradient = [rows(n), rows(n + 5)], ()
    elif name in ("clip_loss", "siglip_loss"):
        given, gradient = [rows(n), rows(n)], (n,)
    elif "loss" in name:
        given, gradient = [rows(n) for _ in range(3)], (n,)
    else:
        given, gradient = [rows(n), rows(n + 5), rows(n + 5)], (n, n + 5)
    return [*given, generator.standard_normal(gradient).astype(dtype)] if kernel.endswith("_bwd") else given


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [name for name in _host.cpu_kernels() if not name.startswith("tile_")])
def test_ragged_sizes(kernel, dtype, instruction_set):
    for n, D in ((1, 1), (7, 3), (33, 19), (150, 5)):
        _, outputs = _host.time_cpu_kernel(kernel, inputs(kernel, n, D, dtype), instruction_set=instruction_set)
        assert all(np.isfinite(output).all() for output in outputs), (n, D)
