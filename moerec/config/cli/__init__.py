"""The shell around every command: `cli.run(main)` reads the flags and the configuration, and exits with a code."""

from moerec.config.cli.flags import ExtraFlags, repeat_arguments
from moerec.config.cli.run import Main, execute, run
from moerec.config.python_file import load_config

__all__ = ["ExtraFlags", "Main", "execute", "load_config", "repeat_arguments", "run"]
