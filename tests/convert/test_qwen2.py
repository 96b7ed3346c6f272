import dataclasses
import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moerec.convert.hf_config import check_tensors, read_shape
from moerec.convert.hf_folder import open_folder
from moerec.convert.logits import compute_logits, make_text_batch, trace_hidden
from moerec.convert.paths import flatten
from moerec.convert.qwen2 import import_folder, is_packed, make_model_config, make_shape, read_blocks
from moerec.errors import InputError
from moerec.nn.sharding import make_mesh
from tests.convert import qwen2_oracle as oracle
from tests.convert.qwen2_cases import CASES, Case, make_inputs, make_tensors, write_folder

REFERENCE = pathlib.Path(__file__).parent
FORMS = ("alone", "right", "left", "packed")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def read_model(path: pathlib.Path, mesh=None):
    folder = open_folder(path)
    shape = read_shape(folder.config, path / "config.json")
    check_tensors(folder, shape)
    return folder, shape, import_folder(folder, shape, mesh or make_mesh(1, 1, 1))


@pytest.fixture(scope="module")
def import_case(tmp_path_factory):
    @functools.cache
    def read(case: Case):
        path = tmp_path_factory.mktemp(case.name)
        write_folder(case, path)
        return read_model(path)

    return read


def narrow(path: pathlib.Path, dtype: str) -> dict[str, np.ndarray]:
    """Rounds the tensors of a folder's files to a type; returns them."""
    found = {}
    for file in path.glob("*.safetensors"):
        tensors = {name: x.astype(DTYPES[dtype]) for name, x in load_file(file).items()}
        save_file(tensors, file)
        found |= tensors
    index = path / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        if "total_size" in values.get("metadata", {}):
            values["metadata"]["total_size"] = sum(x.nbytes for x in found.values())
        index.write_text(json.dumps(values))
    return found


@each_case
def test_logits_at_every_position_are_those_of_the_oracle_and_of_transformers(case: Case, import_case):
    """In float32, to 1e-4 of the largest; where not, it says from which layer on."""
    _, _, model = import_case(case)
    stored = json.loads((REFERENCE / f"reference_{case.name}.json").read_text())
    inputs = make_inputs(case)
    width = max(x.token_BT.shape[1] for x in inputs.values())
    rows = {}
    for form, x in inputs.items():  # all forms in one batch, so that one program is compiled
        spare = ((0, 0), (0, width - x.token_BT.shape[1]))
        rows[form] = np.pad(x.token_BT, spare), np.pad(x.segment_BT, spare)
    token_BT, segment_BT = (np.concatenate([part[n] for part in rows.values()]) for n in (0, 1))
    batch = make_text_batch(token_BT, segment_BT)
    found_BTV, first = np.asarray(compute_logits(model, batch)), 0
    for form in FORMS:
        x = inputs[form]
        n, t = x.token_BT.shape
        real_BT = x.segment_BT > 0
        assert np.array_equal(np.asarray(batch.position_BT)[first : first + n, :t][real_BT], x.position_BT[real_BT])
        found = found_BTV[first : first + n, :t][real_BT]
        exact = oracle.run(case.config, make_tensors(case), *x)
        for wanted in (exact["logits"][real_BT], np.array(stored["logits"][form])):
            gap = np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))
            assert gap < 1e-4, (
                form,
                gap,
                find_parting(model, batch, exact["hidden"], slice(first, first + n), real_BT),
            )
        first += n


def find_parting(model, batch, hidden, rows: slice, real_BT) -> list[float]:
    """The largest gap of the states after each layer, to find the first that differs."""
    t = real_BT.shape[1]
    found = [np.asarray(x)[rows, :t][real_BT] for x in trace_hidden(model, batch)]
    return [float(np.max(np.abs(a - b[real_BT]))) for a, b in zip(found, hidden, strict=True)]


@each_case
def test_states_after_each_layer_are_those_of_the_oracle(case: Case, import_case):
    _, _, model = import_case(case)
    x = make_inputs(case)["packed"]
    exact = oracle.run(case.config, make_tensors(case), *x)["hidden"]
    batch = make_text_batch(x.token_BT, x.segment_BT)
    scale = max(np.max(np.abs(states)) for states in exact)
    assert max(find_parting(model, batch, exact, slice(None), x.segment_BT > 0)) < 1e-5 * scale


@pytest.mark.parametrize("dtype", DTYPES)
@each_case
def test_a_tensor_that_comes_and_goes_has_the_same_bytes(case: Case, dtype, tmp_path):
    write_folder(case, tmp_path)
    wanted = narrow(tmp_path, dtype)
    folder, _, model = read_model(tmp_path)
    packed = is_packed(folder.tensors)
    assert folder.tensors.keys() == wanted.keys()
    for name, info in folder.tensors.items():
        blocks = list(read_blocks(model, name, info.shape, info.dtype, packed))
        assert {x.dtype for x in blocks} == {info.dtype}
        assert b"".join(x.tobytes() for x in blocks) == wanted[name].tobytes(), name


@each_case
def test_a_shape_comes_back_from_its_model(case: Case, import_case):
    _, shape, model = import_case(case)
    again = make_shape(model.config)
    of_file = {"max_positions": shape.max_positions, "dtype": shape.dtype}  # a model does not know them
    assert dataclasses.replace(again, **of_file) == shape
    assert make_model_config(again) == model.config


@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["qwen2_tied_stored", "moe_packed", "moe_every_second"])
def test_shards_of_a_mesh_hold_what_one_device_holds(name, mesh, import_case):
    case = next(case for case in CASES if case.name == name)
    folder, shape, model = import_case(case)
    on_mesh = import_folder(folder, shape, make_mesh(*mesh))
    whole, split = flatten(model), flatten(on_mesh)
    assert whole.keys() == split.keys()
    for path, leaf in whole.items():
        assert np.array_equal(np.asarray(split[path]), np.asarray(leaf)), path
    n_devices = {len(leaf.sharding.device_set) for leaf in split.values()}
    assert n_devices == {int(np.prod(mesh))}
    assert any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in split.values()) or mesh == (1, 2, 1)
    packed = is_packed(folder.tensors)
    for tensor, info in folder.tensors.items():
        blocks = read_blocks(on_mesh, tensor, info.shape, info.dtype, packed)
        assert b"".join(x.tobytes() for x in blocks) == make_tensors(case)[tensor].tobytes()


def test_a_tied_head_that_differs_is_refused(tmp_path):
    case = next(case for case in CASES if case.head_stored)
    write_folder(case, tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][-1, -1] += 1
            save_file(tensors, file)
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight") as error:
        read_model(tmp_path)
    assert "\n" not in str(error.value)


def test_no_shape_is_compiled_twice(import_case):
    _, _, model = import_case(CASES[0])
    x = make_inputs(CASES[0])["left"]
    compute_logits(model, make_text_batch(x.token_BT, x.segment_BT))
    before = compute_logits._cache_size()
    compute_logits(model, make_text_batch(x.token_BT[::-1], x.segment_BT[::-1]))
    assert compute_logits._cache_size() == before


def test_a_dense_layer_and_a_mixture_of_one_model_are_groups_of_their_own():
    case = next(case for case in CASES if case.name == "moe_every_second")
    config = make_model_config(read_shape(case.config, pathlib.Path("config.json")))
    assert jax.tree.leaves(config.moe.layers) == [1]
