"""The ways in which a command may end badly without a traceback."""


class InputError(ValueError):
    """Wrong use or bad input: one line that names the file, row, column or field. Exit code 2."""


class WorkError(RuntimeError):
    """The work was well defined and failed, with the reason in one line. Exit code 1."""


class Terminated(RuntimeError):
    """The process was asked to end (SIGTERM), and what was done is saved. Exit code `TERMINATED`."""


TERMINATED = 143  # as shells tell of a process that SIGTERM ended
