"""Checks of values, told with the field's name."""

from moerec.errors import InputError


def require(condition: bool, field: str, rule: str):
    """Raises: InputError, where the rule does not hold for the field."""
    if not condition:
        raise InputError(f"config.{field}: {rule}")


def require_seed(value: int, field: str):
    """Raises: InputError, where it is no unsigned 32-bit number."""
    if isinstance(value, int):  # another type is named by who reads the config
        require(0 <= value < 2**32, field, "must lie in [0, 2^32)")


def one_of(value: str, field: str, allowed: tuple[str, ...]):
    """Raises: InputError, where the value is not allowed."""
    require(value in allowed, field, f"{value!r} is none of {', '.join(allowed)}")
