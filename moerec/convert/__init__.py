"""Base language models of other libraries: their folders of weights, read and written."""
