"""One short file a command: `python -m experiments.NAME --help`."""
