"""RecBole's atomic files: tab-separated, no quoting, each name in the header followed by its type (`user_id:token`)."""

from moerec.errors import InputError

ENDINGS = (".inter", ".item", ".user")
TYPES = ("token", "float", "token_seq", "float_seq")
SEQUENCE_SEPARATOR = " "


def parse_header(fields: list[str], label: str) -> dict[str, str]:
    """Types of the columns by their bare names, in order. Raises InputError for a name without a known type."""
    types: dict[str, str] = {}
    for field in fields:
        name, colon, kind = field.rpartition(":")
        if not colon or not name:
            raise InputError(f"{label}, header, column {field!r}: no type, such as in 'item_id:token'")
        if kind not in TYPES:
            raise InputError(f"{label}, header, column {name}: type {kind!r} is none of {', '.join(TYPES)}")
        if name in types:
            raise InputError(f"{label}, header, column {name}: the name occurs twice")
        types[name] = kind
    return types


def sequence_separators(types: dict[str, str]) -> dict[str, str]:
    """The separator inside the values of each column that holds a sequence."""
    return {name: SEQUENCE_SEPARATOR for name, kind in types.items() if kind.endswith("_seq")}
