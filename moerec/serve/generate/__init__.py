"""Text generation: a cache of keys and values, a program that reads prompts and one that makes tokens."""

from moerec.serve.generate.sampling import Sampling
from moerec.serve.generate.session import Generated, Generator

__all__ = ["Generated", "Generator", "Sampling"]
