"""One short file a command: `python -m experiments.NAME --help`.

Here stands what must hold while a command is still importing: one line, not a traceback, for an interruption and for a
Python without our packages.
"""

import sys

import moerec  # noqa: F401 - before jax: what it sets is read when that is imported


def _tell(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError) and error.name in ("absl", "jax", "ml_collections", "numpy"):
        hint = "use .venv/bin/python, or activate .venv (`make demo` makes it)"
        print(f"error: {error.name} is not installed for {sys.executable}: {hint}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell
