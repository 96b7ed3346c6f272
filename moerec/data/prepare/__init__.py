"""From tables to a prepared folder: readers, validation of rows, vocabularies, ArrayRecord shards."""
