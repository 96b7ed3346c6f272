"""Texts of the city in Russian and English, for language models: what is said in them holds in its world."""

from moerec.data.city.texts.corpus import KINDS, write_documents

__all__ = ["KINDS", "write_documents"]
