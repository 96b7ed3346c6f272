"""Items and those nearest to them: by the words of their texts, and by what follows what in training."""

from moerec.data.neighbors.best import Neighbors
from moerec.data.neighbors.table import NEIGHBOR_FILES, ItemNames, NeighborTable, load_neighbors, save_neighbors
from moerec.data.neighbors.text import WordCounts, count_words, make_text_vectors
from moerec.data.neighbors.text_neighbors import extend_text_neighbors, find_text_neighbors, make_text_table
from moerec.data.neighbors.transitions import (
    count_transitions,
    find_transition_neighbors,
    make_item_graph,
    weigh_transitions,
)

__all__ = [
    "NEIGHBOR_FILES",
    "ItemNames",
    "NeighborTable",
    "Neighbors",
    "WordCounts",
    "count_transitions",
    "count_words",
    "extend_text_neighbors",
    "find_text_neighbors",
    "find_transition_neighbors",
    "load_neighbors",
    "make_item_graph",
    "make_text_table",
    "make_text_vectors",
    "save_neighbors",
    "weigh_transitions",
]
