"""Names of what can be extended: losses, tasks, memories and baselines register themselves under the name that configs
give, ours and those of a user's own module alike.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from moerec.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """`{name: implementation}` of one kind of thing."""

    def __init__(self, kind: str, field: str):
        """Args: what it is called in messages; the field of the configuration that names one."""
        self.kind, self.field = kind, field
        self._found: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that files an implementation under a name.

        Raises:
          InputError: the name is taken by another one. (A module that is read twice, under another name as configs are,
            registers itself anew.)
        """

        def add(value: T) -> T:
            other = self._found.get(name)
            if other is not None and _origin(other) != _origin(value):
                raise InputError(f"{self.kind} {name!r}: the name is taken by {_origin(other)[1]}")
            self._found[name] = value
            return value

        return add

    def __getitem__(self, name: str) -> T:
        """Raises: InputError, where nothing is called so."""
        if name not in self._found:
            own = f"a {self.kind} of one's own needs --plugin=MODULE, the module that registers it"
            raise InputError(f"config.{self.field}: {name!r} is none of {', '.join(self._found)}; {own}")
        return self._found[name]

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def names(self) -> tuple[str, ...]:
        return tuple(self._found)


def _origin(value: Any) -> tuple[str, str]:
    """Where a function or class was written: its file and its name in there."""
    wrapped = getattr(value, "function", getattr(value, "__wrapped__", value))
    code = getattr(wrapped, "__code__", None)
    if code is None:  # a class: any of its own functions says where it is written
        codes = (
            (getattr(member, "__code__", None) for member in vars(wrapped).values())
            if isinstance(wrapped, type)
            else ()
        )
        code = next((found for found in codes if found), None)
    file = code.co_filename if code else getattr(wrapped, "__module__", "")
    return file, getattr(wrapped, "__qualname__", repr(value))
