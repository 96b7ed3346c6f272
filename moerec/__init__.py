"""moerec: a multi-expert personalised language model that recommends across services."""

__version__ = "0.1.0"
