"""Folders of weights, against the library of the format; damages, each in one line; and that a folder is whole."""

import itertools
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from moerec.convert.hf_folder import SIDE_FILES, copy_side_files, open_folder
from moerec.convert.hf_writer import TensorPlan, plan_files, write_folder
from moerec.errors import InputError, WorkError
from tests.full_disk import file_size_limit

BF16 = np.dtype(ml_dtypes.bfloat16)
KINDS = {"F32": np.dtype(np.float32), "BF16": BF16, "F16": np.dtype(np.float16)}
CONFIG = {"model_type": "llama"}
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def make_array(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# In the order in which the library lays them: 24 bytes, 8 and 16.
TENSORS = {"a": make_array((2, 3), "f4"), "b": make_array(4, BF16), "c": make_array((2, 2, 2), "f2")}


def write_model(folder: Path, shards: dict[str, dict[str, np.ndarray]], total_size=None) -> Path:
    """By the library; an index where there is more than one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file, tensors in shards.items():
        (folder / file).write_bytes(save(tensors))
    if len(shards) > 1:
        size = sum(array.nbytes for tensors in shards.values() for array in tensors.values())
        places = {name: file for file, tensors in shards.items() for name in tensors}
        index = {"metadata": {"total_size": size if total_size is None else total_size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index))
    return folder


def write_two(folder: Path) -> Path:
    return write_model(folder, {ONE: {"a": TENSORS["a"]}, TWO: {"b": TENSORS["b"], "c": TENSORS["c"]}})


def read_by_library(data: bytes) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(bytes(told["data"]), KINDS[told["dtype"]]).reshape(told["shape"])
        for name, told in safetensors.deserialize(data)
    }


def read_all(folder) -> dict[str, np.ndarray]:
    return {name: folder.read_rows(name, 0, info.n_rows) for name, info in folder.tensors.items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def assert_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as error:
        open_folder(folder)
    assert str(error.value).isprintable()  # and so one line
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("files", [1, 2])
def test_reads_what_the_library_reads(tmp_path, files):
    path = write_two(tmp_path) if files == 2 else write_model(tmp_path, {"model.safetensors": TENSORS})
    folder = open_folder(path)
    assert folder.config == CONFIG
    by_library: dict[str, np.ndarray] = {}
    for file in path.glob("*.safetensors"):
        by_library |= read_by_library(file.read_bytes())
    assert_same(read_all(folder), by_library)
    assert_same(read_all(folder), TENSORS)


def test_rows_are_a_copy_and_no_map(tmp_path):
    folder = open_folder(write_model(tmp_path, {"model.safetensors": TENSORS}))
    rows = folder.read_rows("c", 1, 2)
    assert rows.tobytes() == TENSORS["c"][1:2].tobytes()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    rows[:] = 0
    assert folder.read_rows("c", 1, 2).tobytes() == TENSORS["c"][1:2].tobytes()
    assert folder.read_rows("c", 2, 2).shape == (0, 2, 2)
    for name, first, last in (("c", 1, 3), ("c", -1, 1), ("c", 2, 1), ("d", 0, 1)):
        with pytest.raises(InputError, match=f'tensor "{name}"'):
            folder.read_rows(name, first, last)


def test_a_file_that_is_cut_later_is_told(tmp_path):
    folder = open_folder(write_model(tmp_path, {"model.safetensors": TENSORS}))
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 4)
    with pytest.raises(InputError, match=r"model\.safetensors: has become shorter"):
        folder.read_rows("c", 0, 2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        folder.read_rows("a", 0, 2)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@given(
    st.lists(st.integers(1, 5), max_size=3), st.sampled_from([*KINDS.values()]), st.integers(1, 200), st.integers(0, 5)
)
def test_blocks_are_the_rows_in_order_and_as_many_as_allowed(scratch, shape, dtype, max_bytes, before):
    array = make_array(shape, dtype)
    tensors = {"other": make_array(before + 1, np.float32), "x": array}
    folder = open_folder(write_model(scratch / "blocks", {"model.safetensors": tensors}))
    blocks = list(folder.iter_blocks("x", max_bytes))
    n_rows = shape[0] if shape else 1
    row_bytes = array.nbytes // n_rows
    most = max(1, max_bytes // row_bytes)
    assert [first for first, _ in blocks] == list(range(0, n_rows, most))
    assert [len(rows) for _, rows in blocks[:-1]] == [most] * (len(blocks) - 1)
    assert all(rows.nbytes <= max(max_bytes, row_bytes) for _, rows in blocks)
    joined = np.concatenate([rows for _, rows in blocks])
    assert joined.tobytes() == array.tobytes()
    assert (joined.shape, joined.dtype) == ((n_rows, *shape[1:]), dtype)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    write_two(tmp_path / "blobs")
    (tmp_path / "blobs/tokenizer.json").write_text("{}")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for number, blob in enumerate(list((tmp_path / "blobs").iterdir())):
        (snapshot / blob.name).symlink_to(Path("../../blobs") / str(number))
        blob.rename(tmp_path / "blobs" / str(number))
    assert_same(read_all(open_folder(snapshot)), TENSORS)
    (tmp_path / "new").mkdir()
    assert copy_side_files(snapshot, tmp_path / "new") == ["tokenizer.json"]
    assert (tmp_path / "new/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "new/tokenizer.json").is_symlink()


# What a header may say of tensor "b", whose own is {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}.
ENTRIES = [
    ({"shape": [-4]}, "shape"),
    ({"shape": [True, 4]}, "shape"),
    ({"shape": [4.0]}, "shape"),
    ({"shape": ["4"]}, "shape"),
    ({"shape": [None]}, "shape"),
    ({"shape": 4}, "shape"),
    ({"shape": None}, "shape"),
    ({"shape": [0]}, "shape"),
    ({"shape": [4] + [1] * 70}, "shape"),
    ({"shape": [5]}, "has 10 bytes, but data_offsets .* 8 bytes"),
    ({"shape": [2**40, 2**40]}, "has 2417851639229258349412352 bytes"),
    ({"shape": []}, "has 2 bytes"),
    ({"dtype": "F32"}, "has 16 bytes"),
    ({"dtype": "I8"}, 'dtype "I8".*; quantised weights are not read'),
    ({"dtype": "U8"}, 'dtype "U8".*; quantised weights are not read'),
    ({"dtype": "I32"}, 'dtype "I32".*; quantised weights are not read'),
    ({"dtype": "F8_E4M3"}, 'dtype "F8_E4M3".*; quantised weights are not read'),
    ({"dtype": "F64"}, 'dtype "F64"; F16, BF16, F32 are read$'),
    ({"dtype": "bf16"}, 'dtype "bf16"; F16, BF16, F32 are read$'),
    ({"dtype": ["BF16"]}, "dtype"),
    ({"dtype": None}, "dtype"),
    ({"data_offsets": [24, 30]}, "8 bytes, but data_offsets"),
    ({"data_offsets": [32, 24]}, "data_offsets"),
    ({"data_offsets": [-8, 0]}, "data_offsets"),
    ({"data_offsets": [24, 32, 40]}, "data_offsets"),
    ({"data_offsets": ["24", "32"]}, "data_offsets"),
    ({"data_offsets": [24.0, 32]}, "data_offsets"),
    ({"data_offsets": [False, 8]}, "data_offsets"),
    ({"data_offsets": None}, "data_offsets"),
    ({"data_offsets": [22, 30]}, "begins before"),
    ({"data_offsets": [26, 34]}, "gap"),
    ({"other": 1}, "nothing else"),
]


def split_file(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def join_file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(("entry", "pattern"), ENTRIES, ids=lambda value: str(value)[:30])
def test_entries_of_a_header_that_are_refused(tmp_path, entry, pattern):
    path = write_model(tmp_path, {"model.safetensors": TENSORS}) / "model.safetensors"
    text, data = split_file(path.read_bytes())
    header = json.loads(text)
    header["b"] |= entry
    path.write_bytes(join_file(json.dumps(header).encode(), data))
    assert_refused(tmp_path, rf'model\.safetensors: tensor "b" .*{pattern}')


@pytest.mark.parametrize("entry", [{}, {"dtype": "F32", "shape": [1]}, [], "F32", None])
def test_entries_that_are_incomplete_are_refused(tmp_path, entry):
    path = write_model(tmp_path, {"model.safetensors": TENSORS}) / "model.safetensors"
    path.write_bytes(join_file(json.dumps({"line\nbreak": entry}).encode(), b"0000"))
    assert_refused(tmp_path, r'model\.safetensors: tensor "line\\nbreak" must have dtype, shape')


def in_header(old: bytes, new: bytes):
    def change(data: bytes) -> bytes:
        header, numbers = split_file(data)
        assert old in header
        return join_file(header.replace(old, new, 1), numbers)

    return change


FILE_DAMAGES = {
    "empty": (lambda data: b"", "it has 0 bytes$"),
    "seven bytes": (lambda data: data[:7], "it has 7 bytes$"),
    "header longer than the file": (lambda data: b"\xff\xff" + data[2:], "its header would have 65535"),
    "header of 2^63 bytes": (lambda data: b"\xff" * 8 + data[8:], "its header would have 18446744073709551615"),
    "header cut off": (lambda data: data[:60], "it has 60 bytes"),
    "no data": (lambda data: join_file(split_file(data)[0], b""), 'is cut off in tensor "a"'),
    "last tensor lost": (lambda data: data[:-16], 'is cut off in tensor "c"'),
    "last byte lost": (lambda data: data[:-1], 'is cut off in tensor "c"'),
    "one byte more": (lambda data: data + b"\0", '1 bytes follow the last tensor "c"'),
    "no JSON": (in_header(b":", b"="), "no JSON object"),
    "NUL for padding": (lambda data: join_file(split_file(data)[0] + b"\0", b""), "no JSON object"),
    "header is a list": (lambda data: join_file(b"[]", b""), "no JSON object"),
    "header is a number": (lambda data: join_file(b"1", b""), "no JSON object"),
    "header of no bytes": (lambda data: join_file(b"", b""), "no JSON object"),
    "space in front": (in_header(b"{", b" {"), "does not begin with {"),
    "no UTF-8": (in_header(b'"a"', b'"\xff"'), "no JSON object"),
    "half a character": (in_header(b'"a"', b'"\\ud800"'), "no JSON object"),
    "NaN": (in_header(b"[0", b"[NaN"), "no JSON object.*NaN"),
    "a number without end": (in_header(b"[0", b"[" + b"9" * 5000), "no JSON object"),
    "nested without end": (lambda data: join_file(b'{"a":' * 10_000, b""), "no JSON object.*nested"),
    "minus zero": (in_header(b"[0", b"[-0"), 'tensor "a" has data_offsets'),
    "a name twice": (in_header(b'"b"', b'"a"'), 'no JSON object.*it has "a" twice'),
    "a field twice": (in_header(b'"dtype"', b'"dtype":"F16","dtype"'), 'no JSON object.*it has "dtype" twice'),
    "no tensors": (lambda data: join_file(b'{"__metadata__":{}}', b""), "holds no tensors"),
    "metadata of numbers": (in_header(b"{", b'{"__metadata__":{"format":1},'), "__metadata__"),
    "metadata no object": (in_header(b"{", b'{"__metadata__":"pt",'), "__metadata__"),
}


@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_damaged_files_are_refused(tmp_path, name):
    path = write_model(tmp_path, {"model.safetensors": TENSORS}) / "model.safetensors"
    damage, pattern = FILE_DAMAGES[name]
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(tmp_path, rf"model\.safetensors: .*{pattern}")


def test_an_absurd_header_is_not_read(tmp_path):
    path = write_model(tmp_path, {"model.safetensors": TENSORS}) / "model.safetensors"
    path.write_bytes((150_000_000).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)  # of which none is on the disk
    assert_refused(tmp_path, r"model\.safetensors: .*its header would have 150000000")


def edit_index(folder: Path, **fields) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | fields))


def place(folder: Path, **files) -> None:
    """Puts tensors into other files by the index; None takes them out."""
    places = json.loads((folder / INDEX).read_text())["weight_map"] | files
    edit_index(folder, weight_map={name: file for name, file in places.items() if file is not None})


def replace(path: Path, how: str) -> None:
    path.unlink()
    if how == "link":
        path.symlink_to("nowhere")
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)


def copy_file(source: Path, name: str) -> None:
    (source.parent / name).write_bytes(source.read_bytes())


FOLDER_DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "config a folder": (lambda f: replace(f / "config.json", "folder"), r"config\.json: is no file"),
    "config cut": (lambda f: (f / "config.json").write_text("{"), r"config\.json: is no JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: holds no JSON object"),
    "index cut": (lambda f: os.truncate(f / INDEX, 9), rf"{INDEX}: is no JSON"),
    "index a link to nothing": (lambda f: replace(f / INDEX, "link"), rf"{INDEX}: is a link to nothing"),
    "index lost": (lambda f: (f / INDEX).unlink(), "neither model.safetensors nor model.safetensors.index.json"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: weight_map"),
    "empty map": (lambda f: edit_index(f, weight_map={}), f"{INDEX}: weight_map"),
    "map a list": (lambda f: edit_index(f, weight_map=[ONE]), f"{INDEX}: weight_map"),
    "map of numbers": (lambda f: place(f, a=1), f'{INDEX}: weight_map has 1 for tensor "a"'),
    "shard missing": (lambda f: replace(f / TWO, ""), f"{TWO}: no such file"),
    "shard a link to nothing": (lambda f: replace(f / TWO, "link"), f"{TWO}: is a link to nothing"),
    "shard a folder": (lambda f: replace(f / TWO, "folder"), f"{TWO}: is no file"),
    "shard a pipe": (lambda f: replace(f / TWO, "pipe"), f"{TWO}: is no file"),
    "shard cut": (lambda f: os.truncate(f / TWO, (f / TWO).stat().st_size - 1), f'{TWO}: is cut off in tensor "c"'),
    "name too long": (lambda f: place(f, d="x" * 300 + ".safetensors"), "cannot be read: File name too long"),
    "tensor lacks": (lambda f: place(f, d=TWO), f'{TWO}: lacks tensor "d"'),
    "tensor not in the index": (lambda f: place(f, c=None), f'{TWO}: tensor "c" is not in {INDEX}'),
    "tensor elsewhere": (lambda f: place(f, c=ONE), f'{TWO}: tensor "c" is in this file, but {INDEX} has it in {ONE}'),
    "tensor twice": (lambda f: (f / TWO).write_bytes(save(TENSORS)), f'{TWO}: tensor "a" is in {ONE}, too'),
    "tensor twice, too early": (
        lambda f: (f / ONE).write_bytes(save(TENSORS)),
        f'{ONE}: tensor "b" is in this file, but {INDEX} has it in {TWO}',
    ),
    "total size": (lambda f: edit_index(f, metadata={"total_size": 47}), "total_size is 47, .* 48 bytes"),
    "stray single file": (
        lambda f: copy_file(f / ONE, "model.safetensors"),
        '"model.safetensors" is none of the files',
    ),
    "stray shard": (lambda f: copy_file(f / ONE, "consolidated.safetensors"), '"consolidated.safetensors" is none'),
    "both without an index": (
        lambda f: (f / TWO).rename(f / "model.safetensors") and (f / INDEX).unlink(),
        f'"{ONE}" lies beside model.safetensors',
    ),
}


@pytest.mark.parametrize("name", FOLDER_DAMAGES)
def test_damaged_folders_are_refused(tmp_path, name):
    folder = write_two(tmp_path / "model")
    open_folder(folder)
    damage, pattern = FOLDER_DAMAGES[name]
    damage(folder)
    assert_refused(folder, pattern)


FOREIGN = [
    "../model.safetensors",
    "/etc/model.safetensors",
    "sub/model.safetensors",
    "sub\\model.safetensors",
    "..safetensors",
    "model.bin",
    "",
    "a\nb.safetensors",
    "a\0.safetensors",
]


@pytest.mark.parametrize("file", FOREIGN)
def test_an_index_names_no_files_elsewhere(tmp_path, file):
    folder = write_two(tmp_path / "model")
    copy_file(folder / ONE, "../model.safetensors")
    place(folder, a=file)
    assert_refused(folder, f"{INDEX}: {re.escape(json.dumps(file))} is not the name of a .safetensors file")
    plan = TensorPlan("a", np.dtype("f4"), (2, 3), file)
    with pytest.raises(InputError, match="is not the name"):
        write_folder(tmp_path / "new", [plan], lambda name: iter([TENSORS["a"]]), CONFIG)


@pytest.mark.parametrize("metadata", [{}, {"total_size": "48"}, {"total_size": 48.5}, {"total_size": True}, None, 3])
def test_an_index_need_not_tell_the_size(tmp_path, metadata):
    folder = write_two(tmp_path)
    edit_index(folder, metadata=metadata)
    assert_same(read_all(open_folder(folder)), TENSORS)


def test_no_weights(tmp_path):
    assert_refused(tmp_path / "model", "no such folder")
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", "is no folder")
    folder = write_model(tmp_path / "model", {})
    assert_refused(folder, "holds no weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert_refused(folder, r'"pytorch_model\.bin" alone; pickles are not read')


CHANGES = st.lists(
    st.tuples(st.integers(0, 250), st.one_of(st.integers(0, 255), st.sampled_from(list(b'{}[]",:0123456789-e. ')))),
    max_size=3,
)


@given(CHANGES, st.one_of(st.just(0), st.integers(-260, 3)))
def test_any_damage_is_refused_or_reads_as_the_library_reads_it(scratch, changes, more):
    folder = write_model(scratch / "fuzz", {})
    damaged = bytearray(save(TENSORS))
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    data = bytes(damaged[:more]) if more < 0 else bytes(damaged) + bytes(more)
    (folder / "model.safetensors").write_bytes(data)
    try:
        found, told = read_all(open_folder(folder)), ""
    except InputError as error:
        found, told = None, str(error)
    assert told.isprintable()
    if found is not None:
        assert_same(found, read_by_library(data))


@pytest.mark.parametrize("max_bytes", [1000, 30, 1])
def test_what_is_written_reads_the_same_and_by_the_library(tmp_path, max_bytes):
    """In blocks of a row, from and to folders of any number of files; the side files as they are."""
    source = write_model(tmp_path / "source", {"model.safetensors": TENSORS})
    for number, name in enumerate(SIDE_FILES[::2]):
        (source / name).write_bytes(b"\xff\r\n" * number)
    folder = open_folder(source)
    files = plan_files({name: array.nbytes for name, array in TENSORS.items()}, max_bytes)
    plans = [TensorPlan(name, info.dtype, info.shape, files[name]) for name, info in folder.tensors.items()]
    blocks = {name: [rows for _, rows in folder.iter_blocks(name, 1)] for name in folder.tensors}
    (tmp_path / "new").mkdir()
    write_folder(tmp_path / "new", plans, lambda name: iter(blocks[name]), CONFIG, source)
    written = open_folder(tmp_path / "new")
    assert written.config == CONFIG
    assert_same(read_all(written), TENSORS)
    by_library: dict[str, np.ndarray] = {}
    for file in sorted(set(files.values())):
        data = (tmp_path / "new" / file).read_bytes()
        by_library |= read_by_library(data)
        header, numbers = split_file(data)
        assert len(header) % 8 == 0
        assert json.loads(header)["__metadata__"] == {"format": "pt"}
        assert numbers == b"".join(array.tobytes() for name, array in TENSORS.items() if files[name] == file)
    assert_same(by_library, TENSORS)
    has = {"config.json", *files.values(), *SIDE_FILES[::2], *([INDEX] if max_bytes < 1000 else [])}
    assert {entry.name for entry in (tmp_path / "new").iterdir()} == has
    if max_bytes < 1000:
        index = json.loads((tmp_path / "new" / INDEX).read_text())
        assert index == {"metadata": {"total_size": 48}, "weight_map": files}
    for name in SIDE_FILES[::2]:
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "source"]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 40))
def test_files_are_planned_in_order_and_as_full_as_they_may_be(sizes, max_bytes):
    files = plan_files({f"t{n}": size for n, size in enumerate(sizes)}, max_bytes)
    assert list(files) == [f"t{n}" for n in range(len(sizes))]
    used = list(dict.fromkeys(files.values()))
    n = len(used)
    wanted = [f"model-{k:05d}-of-{n:05d}.safetensors" for k in range(1, n + 1)] if n > 1 else ["model.safetensors"]
    assert used == wanted
    groups = [[size for size, file in zip(sizes, files.values(), strict=True) if file == name] for name in used]
    assert [size for group in groups for size in group] == sizes
    assert all(sum(group) <= max_bytes or len(group) == 1 for group in groups)
    assert all(sum(a) + b[0] > max_bytes for a, b in itertools.pairwise(groups))


A = TensorPlan("a", np.dtype("f4"), (2, 3))
BAD_PLANS = {
    "none": ([], "no tensors"),
    "twice": ([A, TensorPlan("a", BF16, (1,), ONE)], '"a" is there twice'),
    "a name that is taken": ([TensorPlan("__metadata__", BF16, (1,))], "a name that is taken"),
    "another dtype": ([TensorPlan("a", np.dtype("i1"), (1,))], "dtype int8"),
    "the other order of bytes": ([TensorPlan("a", np.dtype(">f4"), (1,))], "dtype >f4"),
    "nothing in it": ([TensorPlan("a", BF16, (2, 0))], r"shape \[2, 0\]"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_plans_that_make_no_folder(tmp_path, name):
    plans, pattern = BAD_PLANS[name]
    with pytest.raises(InputError, match=pattern):
        write_folder(tmp_path / "new", plans, lambda name: iter([]), CONFIG)
    assert not list(tmp_path.iterdir())


def fail():
    yield TENSORS["a"][:1]
    raise InputError("the source is damaged")


BAD_BLOCKS = {
    "too few": (
        lambda: iter([TENSORS["a"][:1]]),
        WorkError,
        r'model\.safetensors: tensor "a" .* 24 bytes, but has 12$',
    ),
    "none": (lambda: iter([]), WorkError, "24 bytes, but has 0$"),
    "too many": (lambda: iter([TENSORS["a"]] * 2), WorkError, "24 bytes, but has 48 or more"),
    "another dtype": (
        lambda: iter([TENSORS["a"].astype("f2")] * 2),
        WorkError,
        "float32, but a block of it is float16",
    ),
    "a damaged source": (fail, InputError, "the source is damaged"),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_what_fails_leaves_nothing(tmp_path, name):
    make, kind, pattern = BAD_BLOCKS[name]
    with pytest.raises(kind, match=pattern):
        write_folder(tmp_path / "new", [A], lambda name: make(), CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_a_broken_side_file_leave_nothing(tmp_path):
    plan = TensorPlan("x", np.dtype("f4"), (1000,))
    with file_size_limit(2000), pytest.raises(WorkError, match=r"new/model\.safetensors: cannot be written"):
        write_folder(tmp_path / "new", [plan], lambda name: iter([np.zeros(1000, np.float32)]), CONFIG)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/vocab.json").symlink_to("nowhere")
    for source, pattern in (("source", r"vocab\.json: is a link to nothing"), ("none", "none: no such folder")):
        with pytest.raises(InputError, match=pattern):
            write_folder(tmp_path / "new", [A], lambda name: iter([TENSORS["a"]]), CONFIG, tmp_path / source)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("elsewhere")
    for target in ("full", "file", "link"):
        with pytest.raises(InputError, match=f"{target}: is there already"):
            write_folder(tmp_path / target, [A], lambda name: iter([TENSORS["a"]]), CONFIG)
    with pytest.raises(InputError, match="file/new: cannot be made"):
        write_folder(tmp_path / "file/new", [A], lambda name: iter([TENSORS["a"]]), CONFIG)
    assert (tmp_path / "full/kept").read_text() == (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "link"]


def test_a_folder_that_fills_meanwhile_is_kept(tmp_path):
    def blocks(name):
        (tmp_path / "new").mkdir()
        (tmp_path / "new/kept").write_text("kept")
        yield TENSORS["a"]

    with pytest.raises(InputError, match="new: cannot be made"):
        write_folder(tmp_path / "new", [A], blocks, CONFIG)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["new", "new/kept"]


def test_blocks_need_not_lie_in_order_in_memory_nor_have_rows(tmp_path):
    arrays = {"turned": make_array((3, 4), "f4").T, "row": make_array((1, 3), BF16), "number": make_array((), "f2")}
    plans = [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_folder(tmp_path / "new", plans, lambda name: iter([arrays[name]]), CONFIG)
    wanted = arrays | {"turned": np.ascontiguousarray(arrays["turned"]), "number": arrays["number"][None]}
    assert_same(read_all(open_folder(tmp_path / "new")), wanted)
