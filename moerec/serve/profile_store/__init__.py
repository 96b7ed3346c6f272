"""Profile states of many users on disk, for serving: TensorStore arrays, sharded by user, with atomic batches.

    profile_store.json      what is in the folder; written last
    users.bin              a head, then 32 bytes a row: version, and where the id is
    ids.bin                 the ids, UTF-8, one after another
    states/                 a Zarr v3 array uint8 [rows, bytes of a state]: zarr.json, and a file c.K.0 for each shard
    journal                 the batch that is being written; there only while it is
    lock, queue             locked shared by readers, exclusively by writers

Why so. TensorStore's OCDBT driver commits many keys atomically, but only appends: what is deleted stays in its data
files, so it cannot keep the promise of `delete`. Its Zarr driver writes a whole shard anew for one user, and each
shard for itself. So the array is Zarr v3, which TensorStore makes and reads, but it is made longer, and a batch is
written, by us, in place: the rows lie uncompressed at fixed places, and a shard's index never changes. A batch goes to
a journal first, whose renaming is the commit, and then into the files; whoever next takes the lock finishes what a
killed writer left. No link in the folder is followed: nothing outside is ever written.
Nothing is kept of what was overwritten or deleted, and a batch costs twice its own bytes, however large the store is.

The lock is `flock`: the folder must be on one machine's file system. Memory: about 200 bytes a user, for the ids.
"""

from moerec.serve.profile_store.store import ProfileStore
from moerec.serve.profile_store.users import VersionConflict

__all__ = ["ProfileStore", "VersionConflict"]
