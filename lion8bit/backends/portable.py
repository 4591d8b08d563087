"""The backend for devices without a kernel: the reference, run on pieces so that temporaries stay small."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from lion8bit.layout import Hyper, blocks_per_row, bytes_per_row, in_memory_order
from lion8bit.reference import lion_step
from lion8bit.table import Work

PIECE = 1 << 17  # elements at a time: half a megabyte for each temporary, of which some ten live at once


def pieces(rows: int, cols: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Cuts [rows, cols] into parts of at most `PIECE` elements that hold whole blocks."""
    wide = max(block_size, PIECE // block_size * block_size)
    tall = max(1, PIECE // max(1, min(cols, wide)))
    for top in range(0, rows, tall):
        for left in range(0, cols, wide):
            yield slice(top, min(top + tall, rows)), slice(left, min(left + wide, cols))


def update_(table: Work, hypers: ctypes.Array[Hyper], counter: torch.Tensor) -> None:
    """One Lion step in place for every parameter of the table, in plain torch; see `select.update_`.

    Args:
        table: parameters on any device that torch has, checked by `make_entry`.
        hypers: constants of the groups.
        counter: [1] int64 on that device; the number of skipped elements is added to it.
    """
    applied, seen = len(table.done), 0
    for entry, grad_of_entry, row in zip(table.entries, table.grads, table.rows, strict=True):
        writes = 3 + (entry.scales is not None) + (entry.residual is not None)  # of a piece
        hyper = hypers[entry.hyper]
        shape = (entry.rows, entry.cols)
        param, grad = (in_memory_order(t, entry.order).view(shape) for t in (entry.param, grad_of_entry))
        packing = 2 if entry.momentum_bits == 4 else 1  # codes in a byte
        if packing == 2:
            momentum = entry.momentum.view(entry.rows, bytes_per_row(entry.cols, 4))
        else:
            momentum = in_memory_order(entry.momentum, entry.order).view(shape)
        residual = None if entry.residual is None else in_memory_order(entry.residual, entry.order).view(shape)
        scales = entry.scales
        if scales is not None:
            scales = scales.view(entry.rows, blocks_per_row(entry.cols, hyper.block_size))
        for vertical, horizontal in pieces(entry.rows, entry.cols, hyper.block_size):
            seen += writes
            if seen <= applied:
                continue
            first = horizontal.start // hyper.block_size
            blocks = slice(first, first + blocks_per_row(horizontal.stop - horizontal.start, hyper.block_size))
            skipped, targets, values = lion_step(
                param[vertical, horizontal],
                grad[vertical, horizontal],
                momentum[vertical, horizontal.start // packing : -(-horizontal.stop // packing)],
                None if scales is None else scales[vertical, blocks],
                hyper,
                residual=None if residual is None else residual[vertical, horizontal],
                seed=row.seed,
                step=row.step,
                first=row.first + vertical.start * row.row_stride + horizontal.start,
                row_stride=row.row_stride,
            )
            table.done.extend(map(torch.Tensor.copy_, (*targets, counter), (*values, counter + skipped)))
