"""Values of any type that a table may hold, as bytes."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EXACT_FLOAT = {"halffloat": 1 << 11, "float": 1 << 24, "double": 1 << 53}  # from here on whole numbers are rounded


def is_list(kind: pa.DataType) -> bool:
    """Whether the values of this type are lists (or maps, which are lists of pairs)."""
    if pa.types.is_dictionary(kind):
        return is_list(kind.value_type)
    return _is_list_view(kind) or any(
        is_kind(kind)
        for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_map)
    )


def as_binary(array: pa.Array, separator: str = ",") -> pa.Array:
    """Values as bytes: null and NaN become empty, the elements of a list are joined by `separator`, others are printed.

    A null in a list is left out. Raises pa.ArrowException for a type without a printed form.
    """
    array = _plain(array)
    if is_list(array.type):
        array = pc.binary_join(as_lists(array), pa.scalar(separator.encode(), pa.binary()))
    elif pa.types.is_floating(array.type):
        array = _print_floats(array)
    elif not (pa.types.is_binary(array.type) or pa.types.is_string(array.type)):
        array = array.cast(pa.string())
    array = array.cast(pa.binary())
    return array.fill_null(b"") if array.null_count else array


def as_lists(array: pa.Array) -> pa.Array:
    """Lists as lists of bytes, without nulls: what is null or NaN in one is left out, a null list has no element."""
    array = _plain(array)
    values = _plain(array.flatten())
    n_values = pc.if_else(array.is_valid(), pc.list_value_length(array), 0)
    owner = np.repeat(np.arange(len(array)), pc.fill_null(n_values, 0).to_numpy(zero_copy_only=False))
    filled = values.is_valid()
    if pa.types.is_floating(values.type):
        filled = pc.and_(filled, pc.invert(pc.fill_null(pc.is_nan(values), True)))
    kept = as_binary(values.filter(filled))
    lengths = np.bincount(owner[filled.to_numpy(zero_copy_only=False)], minlength=len(array))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), kept)


def find_inexact(array: pa.Array) -> np.ndarray:
    """`[n]` bool: the floats that are no whole numbers, or so large that neighbors are the same float."""
    array = _plain(array)
    if not pa.types.is_floating(array.type):
        return np.zeros(len(array), bool)
    values = pc.fill_null(array.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
    return ~np.isnan(values) & ~((np.abs(values) < EXACT_FLOAT[str(array.type)]) & (values == np.rint(values)))


def print_any(array: pa.Array) -> list[str]:
    """Each value as text, whatever its type."""
    try:
        return [value.decode("utf-8", "backslashreplace") for value in as_binary(array).to_pylist()]
    except (pa.ArrowException, UnicodeDecodeError):
        return [_print_scalar(value) for value in array]


def _print_scalar(value: pa.Scalar) -> str:
    try:
        return str(value.as_py())
    except (ValueError, OverflowError, pa.ArrowException):
        return f"a value of type {value.type}"  # bad UTF-8 within it, or a date that Python does not have


def _plain(array: pa.Array) -> pa.Array:
    """The same values in a type that arrow's functions know: no dictionary, view or extension."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _plain(array.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return _plain(pc.run_end_decode(array))
    if pa.types.is_string_view(kind):
        return array.cast(pa.string())
    if pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return array.cast(pa.binary())
    return array


def _is_list_view(kind: pa.DataType) -> bool:
    return pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def _print_floats(array: pa.Array) -> pa.Array:
    """Whole numbers without a fraction or an exponent, as far as they are exact; NaN is null."""
    values = pc.fill_null(array.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
    whole = (np.abs(values) < EXACT_FLOAT["double"]) & (values == np.rint(values))
    integers = pa.array(np.where(whole, values, 0).astype(np.int64)).cast(pa.string())
    if pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    printed = pc.if_else(pa.array(whole), integers, array.cast(pa.string()))
    return pc.if_else(pa.array(np.isnan(values)), pa.scalar(None, pa.string()), printed)
