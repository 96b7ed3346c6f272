"""One file an experiment; each docstring gives the command, the hardware and the result to expect."""
