"""Readers of TSV, CSV (both gzipped too), Parquet and RecBole's atomic files, as streams of record batches.

Memory is one batch of the columns asked for, whatever the length of the table. Rows are numbered from 1 below the
header. Text columns come as raw bytes, so that a row with bad UTF-8 can be named; a row with the wrong number of fields
is handed over beside the batch.
"""

from moerec.data.prepare.tables.reading import open_table, read_batches
from moerec.data.prepare.tables.source import Ragged, RowBatch, SourceTable
from moerec.data.prepare.tables.values import as_binary, as_lists, find_inexact, print_any

__all__ = [
    "Ragged",
    "RowBatch",
    "SourceTable",
    "as_binary",
    "as_lists",
    "find_inexact",
    "open_table",
    "print_any",
    "read_batches",
]
