"""The four forms of the CPU tile engine, on every instruction set that this machine has, against numpy in float64."""

import numpy as np
import pytest
from scipy.special import logsumexp

from modalign import _host, info

SETS = info.collect()["instruction_sets"]["ran_here"]
SIZES = [(0, 3, 4), (3, 0, 4), (1, 1, 1), (5, 7, 0), (12, 32, 16), (13, 33, 17), (97, 129, 31), (200, 263, 64)]
DTYPES = [np.float32, np.float64]


def matrices(rows, columns, depth, dtype, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, depth)).astype(dtype), generator.standard_normal((columns, depth)).astype(dtype)


def close(got, wanted, dtype, depth):
    assert got.dtype == dtype
    np.testing.assert_allclose(got, wanted, rtol=0, atol=8 * np.finfo(dtype).eps * np.sqrt(depth + 1) * max(1.0, np.abs(wanted).max(initial=0)))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_product(size, dtype, instruction_set):
    a, b = matrices(*size, dtype)
    close(_host.tile_product(a, b, instruction_set), a.astype(float) @ b.astype(float).T, dtype, size[2])


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("rows, results, depth", [(1, 1, 1), (13, 19, 5), (97, 65, 31)])
def test_square_sum(rows, results, depth, group, dtype, instruction_set):
    a, b = matrices(rows, results * group, depth, dtype)
    products = a.astype(float) @ b.astype(float).T
    close(_host.tile_square_sum(a, b, group, instruction_set), (products**2).reshape(rows, results, group).sum(-1), dtype, depth)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [size for size in SIZES if min(size[:2]) > 0])
@pytest.mark.parametrize("scale", [0.1, 1.0, -30.0])
def test_log_sum_exp_of_rows_and_columns(size, scale, dtype, instruction_set):
    a, b = matrices(*size, dtype)
    row, column = _host.tile_log_sum_exp(a, b, scale, instruction_set)
    logits = scale * (a.astype(float) @ b.astype(float).T)
    # the error of a log-sum-exp is that of its largest logit, plus a rounding of the sum
    tolerance = 8 * np.finfo(dtype).eps * (np.abs(logits).max(initial=1) * np.sqrt(size[2] + 1) + 1)
    np.testing.assert_allclose(row, logsumexp(logits, axis=1), rtol=0, atol=tolerance)
    np.testing.assert_allclose(column, logsumexp(logits, axis=0), rtol=0, atol=tolerance)


def test_log_sum_exp_of_nothing_is_minus_infinity():
    row, column = _host.tile_log_sum_exp(np.zeros((3, 4), np.float32), np.zeros((0, 4), np.float32), 1.0)
    assert row.tolist() == [-np.inf] * 3 and column.shape == (0,)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp_confines_a_nan_to_its_row_and_columns(dtype, instruction_set):
    a, b = matrices(30, 70, 8, dtype)
    a[4] = np.nan
    row, column = _host.tile_log_sum_exp(a, b, 1.0, instruction_set)
    assert np.isnan(row[4]) and np.isfinite(np.delete(row, 4)).all() and np.isnan(column).all()


def test_large_logits_do_not_overflow():
    a = np.full((2, 1), 1e4, np.float32)
    row, _ = _host.tile_log_sum_exp(a, a, 1.0)
    np.testing.assert_allclose(row, 1e8 + np.log(2), rtol=1e-6)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [0, 1, 15, 32, 70])
@pytest.mark.parametrize("size", SIZES)
def test_weighted_values(size, width, dtype, instruction_set):
    a, b = matrices(*size, dtype)
    values = np.random.default_rng(1).standard_normal((size[1], width)).astype(dtype)
    wanted = a.astype(float) @ b.astype(float).T @ values.astype(float)
    close(_host.tile_weighted_values(a, b, values, instruction_set), wanted, dtype, size[1] * size[2])


def test_bad_input_is_refused():
    a = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="must be matrices of one width"):
        _host.tile_product(a, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="group must divide"):
        _host.tile_square_sum(a, a, 3)
    with pytest.raises(ValueError, match="instruction_set must be one"):
        _host.tile_product(a, a, "sse9")
