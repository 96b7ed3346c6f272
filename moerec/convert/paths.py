"""Paths of leaves, such as `groups/0/attention/q_DNH`: in checkpoints, and in the patterns of configs."""

import fnmatch
from collections.abc import Iterable
from typing import Any

import jax


def name_path(path: tuple[Any, ...]) -> str:
    """The path of a leaf, as JAX gives it, in one string."""
    names = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    return "/".join(names[:-1] if len(names) > 1 and names[-1] == "value" else names)


def flatten(tree: Any) -> dict[str, Any]:
    """`{path: leaf}`."""
    return {name_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(like: Any, leaves: dict[str, Any]) -> Any:
    """The tree of `like` with other leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name_path(path)], like)


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern (`*`, `?` and `[…]` as in file names; `*` takes any number of levels) names the path, or a part
    of the tree that it lies in.
    """
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern.rstrip('/')}/*")


def first_match(path: str, patterns: Iterable[str]) -> str | None:
    """The first of the patterns that names the path."""
    return next((pattern for pattern in patterns if matches(path, pattern)), None)
