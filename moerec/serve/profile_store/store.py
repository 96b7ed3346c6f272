"""The store itself: create, open, update, read, delete, export."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moerec.errors import InputError
from moerec.files import write_text
from moerec.serve.profile_store import export, journal
from moerec.serve.profile_store.folder import META, find_folder, refuse_links, remove_leftovers
from moerec.serve.profile_store.layout import StoreLayout
from moerec.serve.profile_store.shards import Shards
from moerec.serve.profile_store.users import Change, Users, check_ids, check_unique_ids

USERS_PER_SHARD = 1 << 14


class ProfileStore:
    """Users's states by id. Any number of threads and processes may read and write one folder at a time.

    A state is a tree of arrays of numbers, of fixed shapes; `update` takes and `read` gives trees with a leading axis
    of users. Every user has a version: 1 after the first update, and one more after each further one. A user who
    was deleted and comes back begins at 1 again.
    """

    def __init__(self, folder: Path, layout: StoreLayout, treedef: Any):
        """Use `create` or `open`."""
        self._folder, self._layout, self._treedef = folder, layout, treedef
        self._users, self._shards = Users(folder), Shards(folder, layout)
        self._mutex = threading.Lock()

    @classmethod
    def create(
        cls, folder: Path | str, template: Any, users_per_shard: int = USERS_PER_SHARD, label: str = ""
    ) -> "ProfileStore":
        """Makes an empty store, and opens it.

        folder: must not exist, or be an empty directory.
        template: one user's state; of its leaves only shape and dtype count.
        users_per_shard: rows of one file; each batch flushes every file that it touches.
        label: what the states are, such as the model that they belong to; `label` gives it back.
        Raises InputError for a template that cannot be stored, and where the folder is taken.
        """
        folder = find_folder(folder)
        layout = StoreLayout.of(template, users_per_shard, label)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists and is not empty")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            Shards(partial, layout).create()
            Users.create(partial)
            write_text(partial / META, layout.to_json())
            for path in (*partial.rglob("*"), partial):
                journal.sync(path)
            partial.rename(folder)  # fails where somebody else has just made a store there
            journal.sync(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return cls.open(folder, template)

    @classmethod
    def open(cls, folder: Path | str, template: Any = None) -> "ProfileStore":
        """Opens a store, finishes the batch that a killed writer has committed and removes what it left otherwise.

        Reads the ids and versions, and no state. With a `template`, which must fit, states are trees like it; without
        one they are `{name: array}`, a name being the leaf's path with slashes.
        Raises InputError where the folder is not a store of a known version, or not one of such states, or holds a
        link; WorkError where it is damaged.
        """
        folder = find_folder(folder)
        layout = StoreLayout.load(folder)
        if template is None:
            template = {leaf.name: 0 for leaf in layout.leaves}
        else:
            layout.check_template(template, str(folder))
        store = cls(folder, layout, jax.tree.structure(template))
        refuse_links(folder)
        with store._locked(exclusive=True):
            remove_leftovers(folder)
            store._shards.check(store._users.n_rows)
        return store

    @property
    def label(self) -> str:
        """What `create` was told."""
        return self._layout.label

    def __len__(self) -> int:
        """How many users there are."""
        with self._locked():
            return len(self._users)

    def ids(self) -> list[str]:
        """The ids of all users."""
        with self._locked():
            return self._users.list_users()[0]

    def update(
        self, ids: Sequence[str], states: Any, expected_versions: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """Writes the states of users, known or new, all or none; returns their versions int64 [P].

        When it returns the batch is on disk. Nothing that was written before it remains there.

        ids: [P] strings, none twice.
        states: a tree of [P, ...].
        expected_versions: [P] integers; 0 for a user who must not be there yet.
        Raises InputError for states that do not fit or are not finite, and VersionConflict where a user's version is
        not the expected one; nothing is written then.
        """
        names = check_unique_ids(ids)
        leaves = self._layout.check_states(names, states)
        expected = None if expected_versions is None else _check_expected(expected_versions, len(names))
        if not names:
            return np.zeros(0, np.int64)
        with self._locked(exclusive=True):
            change, order = self._users.plan_update(names, expected)
            self._shards.grow(int(change.head["n_rows"]))
            self._commit(change, self._layout.pack(leaves)[order])
        versions = np.empty(len(names), np.int64)
        versions[order] = change.records["version"]
        return versions

    def read(self, ids: Sequence[str], default: Any = None) -> tuple[Any, np.ndarray, np.ndarray]:
        """States of users as one batch left them, a tree of [P, ...]; versions int64 [P]; whether found, bool [P].

        Who is not in the store has the state `default`, or zeros, and version 0. An id may occur twice.
        """
        names = check_ids(ids)
        with self._locked():
            rows = self._users.find(names)
            versions = self._users.versions(rows)
            states = np.zeros((len(rows), self._layout.n_bytes), np.uint8)
            states[rows >= 0] = self._shards.read(rows[rows >= 0])
        found = jax.tree.unflatten(self._treedef, self._layout.unpack(states))
        if default is not None:
            for leaf_P, nothing in zip(jax.tree.leaves(found), jax.tree.leaves(default), strict=True):
                leaf_P[rows < 0] = nothing
        return found, versions, rows >= 0

    def delete(self, ids: Sequence[str]) -> np.ndarray:
        """Removes users, all or none; returns who was there, bool [P].

        When it returns, neither their states nor their ids are in any file of the folder.
        """
        names = check_unique_ids(ids)
        with self._locked(exclusive=True):
            rows = self._users.find(names)
            gone = np.sort(rows[rows >= 0])
            if len(gone):
                self._commit(self._users.plan_delete(gone), np.zeros((len(gone), self._layout.n_bytes), np.uint8))
        return rows >= 0

    def export(self, path: Path | str) -> None:
        """Writes everything to an .npz file: `id_bytes` uint8 and `id_offsets` int64 [N + 1], the ids in UTF-8, one
        after another, and where each begins; `versions` int64 [N]; `states/NAME` [N, ...].

        Needs memory for the ids and for few states. bfloat16, which .npz does not know, becomes float32. Writers wait.
        Raises InputError for a path within the store, where `delete` would have to keep its promise.
        """
        path = Path(os.path.realpath(path))
        if path.is_relative_to(self._folder):
            raise InputError(f"{path}: is inside the store; an export goes elsewhere")
        with self._locked():
            names, rows = self._users.list_users()
            arrays = {**export.encode_ids(names), "versions": self._users.versions(rows)}
            export.write_npz(path, arrays, self._layout, lambda lo, hi: self._shards.read(rows[lo:hi]))

    def _commit(self, change: Change, states: np.ndarray) -> None:
        """Writes a change of the table, and the states uint8 [P, n_bytes] of its rows."""
        journal.commit(self._folder, [*change.writes, *self._shards.plan(change.rows, states)])
        self._users.accept(change)

    @contextlib.contextmanager
    def _locked(self, exclusive: bool = False) -> Iterator[None]:
        """Holds the store; within, no batch is half done, and the table of users is that of the disk."""
        with self._mutex, journal.hold(self._folder, exclusive) as make_exclusive:
            if journal.has_journal(self._folder):
                make_exclusive()
                journal.recover(self._folder)
            self._users.refresh()
            yield


def _check_expected(versions: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    found = np.asarray(versions)
    if found.shape != (n,) or (n and found.dtype.kind not in "iu"):
        raise InputError(f"expected_versions is {found.dtype}{list(found.shape)}, not whole numbers for {n} users")
    return found.astype(np.int64)
