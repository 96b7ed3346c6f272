"""Tables as configs/own_data.py names them, for tests: three shops, a few customers, repeats."""

import csv
from pathlib import Path

import numpy as np

SHOPS = ("food", "books", "garden")
ADJECTIVES = ("green", "старый", "big", "белый")
NOUNS = ("tea", "чай", "lamp", "книга", "rake")


def write_own_tables(folder: Path, n_users: int = 12, n_events: int = 240, n_items: int = 40) -> np.ndarray:
    """Writes visits.csv and products.csv; returns `[n_events, 3]` of user, shop and product numbers, row by row."""
    rng = np.random.default_rng(7)
    rows = rng.integers((n_users, 1, n_items), size=(n_events, 3))
    rows[:, 1] = rows[:, 2] % len(SHOPS)
    rows[: len(SHOPS), 1:] = np.arange(len(SHOPS))[:, None]
    with (folder / "visits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["customer", "product", "shop", "when"])
        for k, (user, shop, item) in enumerate(rows.tolist()):
            writer.writerow([f"c{user}", f"p{item}", SHOPS[shop], 1_767_225_600 + 3_600 * k])
    with (folder / "products.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["product", "shop", "title"])
        for k in range(n_items):
            title = f"{ADJECTIVES[k % len(ADJECTIVES)]} {NOUNS[k % len(NOUNS)]}"
            writer.writerow([f"p{k}", SHOPS[k % len(SHOPS)], title])
    return rows
