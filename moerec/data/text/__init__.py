"""Texts: words of item descriptions, tokenizers, chat templates."""
