"""Bytes by block specs, against examples worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.cost import count_bytes, count_moved_bytes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("grid", "spec", "shape", "elements"),
    [
        pytest.param((4,), pl.BlockSpec((8, 16), lambda i: (i, 0)), (32, 16), 32 * 16, id="each block once"),
        pytest.param((4,), pl.BlockSpec((32, 16), lambda i: (0, 0)), (32, 16), 32 * 16, id="one block stays"),
        pytest.param((4,), pl.BlockSpec(), (32, 16), 32 * 16, id="no block shape"),
        pytest.param((4,), pl.BlockSpec((32, 16)), (32, 16), 32 * 16, id="no index map"),
        # Rows of a matmul: outer steps change them, the inner ones find them there.
        pytest.param((4, 3), pl.BlockSpec((8, 16), lambda i, j: (i, 0)), (32, 16), 32 * 16, id="reused inside"),
        # Its columns: the inner steps run through all of them, and begin anew with each outer step.
        pytest.param((4, 3), pl.BlockSpec((16, 8), lambda i, j: (0, j)), (16, 24), 4 * 16 * 24, id="fetched anew"),
        # Back and forth: the last block of one outer step is the first of the next, so 3 + 2 + 2 + 2 fetches.
        pytest.param(
            (4, 3),
            pl.BlockSpec((8,), lambda i, j: (jnp.where(i % 2 == 0, j, 2 - j),)),
            (24,),
            9 * 8,
            id="back and forth",
        ),
        pytest.param((6,), pl.BlockSpec((8,), lambda i: (i // 2,)), (24,), 24, id="two steps a block"),
        pytest.param((6,), pl.BlockSpec((8,), lambda i: (i % 2,)), (16,), 6 * 8, id="visited by turns"),
        pytest.param((3,), pl.BlockSpec((None, 8), lambda i: (i, 0)), (3, 8), 24, id="squeezed"),
        pytest.param((3,), pl.BlockSpec((8, 16), lambda i: (i, 0)), (20, 16), 20 * 16, id="last one sticks out"),
        pytest.param((), pl.BlockSpec((8,), lambda: (0,)), (8,), 8, id="no grid"),
    ],
)
def test_moved_bytes(grid, spec, shape, elements):
    assert count_moved_bytes(grid, [spec], [array(*shape)]) == 4 * elements
    assert count_moved_bytes(grid, [spec], [array(*shape, dtype=jnp.bfloat16)]) == 2 * elements


def test_operands_and_results_add_up_also_under_jit():
    def matmul(x, w):
        grid, out = (4, 3), array(32, 24)
        specs = [
            pl.BlockSpec((8, 16), lambda i, j: (i, 0)),
            pl.BlockSpec((16, 8), lambda i, j: (0, j)),
            pl.BlockSpec((8, 8), lambda i, j: (jnp.maximum(i, 0), j)),
        ]
        return count_moved_bytes(grid, specs, [x, w, out]) + 0 * jnp.sum(x)

    moved = jax.jit(matmul)(jnp.zeros((32, 16)), jnp.zeros((16, 24)))
    assert moved == 4 * (32 * 16 + 4 * 16 * 24 + 32 * 24)
    assert count_bytes([array(32, 16), array(16, 24), array(32, 24)]) == 4 * (32 * 16 + 16 * 24 + 32 * 24)


def test_specs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="block"):
        count_moved_bytes((4,), [pl.BlockSpec((8,), lambda i: (i,))], [array(32, 16)])
    with pytest.raises(ValueError, match="block"):
        count_moved_bytes((4,), [pl.BlockSpec((pl.Element(8),), lambda i: (i,))], [array(32)])
