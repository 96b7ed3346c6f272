import functools
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from tests.convert import qwen2_oracle as oracle
from tests.convert.qwen2_cases import CASES, LENGTHS, Case, make_inputs, make_tensors, write_folder

REFERENCE = pathlib.Path(__file__).parent
FORMS = ("alone", "right", "left", "packed")
BY_NAME = {case.name: case for case in CASES}
WITH_EXPERTS = [case for case in CASES if oracle.count_experts(case.config)]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_with_experts = pytest.mark.parametrize("case", WITH_EXPERTS, ids=lambda case: case.name)


@functools.cache
def answer(case: Case, form: str) -> dict[str, Any]:
    return oracle.run(case.config, make_tensors(case), *make_inputs(case)[form])


@functools.cache
def read_reference(case: Case) -> dict[str, Any]:
    return json.loads((REFERENCE / f"reference_{case.name}.json").read_text(encoding="utf-8"))


def worst_gap(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, in parts of the largest value."""
    assert found.shape == wanted.shape
    return np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))


def list_layers(case: Case) -> list[bool]:
    return [oracle.has_experts(case.config, layer) for layer in range(case.config["num_hidden_layers"])]


def test_every_case_has_its_reference_and_seed():
    assert len(BY_NAME) == len(CASES)
    assert len({case.seed for case in CASES}) == len(CASES)
    assert {path.stem for path in REFERENCE.glob("reference_*.json")} == {f"reference_{name}" for name in BY_NAME}


@each_case
def test_reference_is_of_these_inputs(case: Case):
    stored = read_reference(case)
    inputs = {
        form: {name.removesuffix("_BT"): x.tolist() for name, x in made._asdict().items()}
        for form, made in make_inputs(case).items()
    }
    assert stored["seed"] == case.seed
    assert stored["inputs"] == inputs
    assert tuple(inputs) == tuple(stored["logits"]) == FORMS


@pytest.mark.parametrize("form", FORMS)
@each_case
def test_logits_are_those_of_transformers(case: Case, form: str):
    real_BT = make_inputs(case)[form].segment_BT > 0
    stored = np.array(read_reference(case)["logits"][form])
    assert np.array_equal(stored, stored.astype(np.float32).astype(str).astype(np.float64))
    assert worst_gap(answer(case, form)["logits"][real_BT], stored) < 1e-5


@each_case
def test_a_document_is_answered_alike_in_every_form(case: Case):
    """Alone, with padding on either side, and behind another in one row."""
    first, second = LENGTHS
    packed = answer(case, "packed")["logits"][0]
    token = make_inputs(case)["packed"].token_BT[:, first:]
    row = np.arange(second)[None]
    alone = oracle.run(case.config, make_tensors(case), token, np.ones_like(row), row)["logits"][0]
    right, left = answer(case, "right")["logits"], answer(case, "left")["logits"]
    for found in (packed[:first], right[0], left[0]):
        np.testing.assert_allclose(found, answer(case, "alone")["logits"][0], rtol=0, atol=1e-10)
    for found in (packed[first:], right[1, :second], left[1, first - second :]):
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-10)


@each_case
def test_states_begin_with_the_embedding_and_end_in_the_logits(case: Case):
    tensors, found = make_tensors(case), answer(case, "right")
    token_BT = make_inputs(case)["right"].token_BT
    assert len(found["hidden"]) == case.config["num_hidden_layers"] + 1
    assert {x.shape for x in found["hidden"]} == {(*token_BT.shape, case.config["hidden_size"])}
    np.testing.assert_array_equal(found["hidden"][0], tensors["model.embed_tokens.weight"][token_BT])
    last = found["hidden"][-1]
    length = np.sqrt(np.square(last).mean(-1, keepdims=True) + case.config["rms_norm_eps"])
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).astype(np.float64)
    np.testing.assert_allclose(found["logits"], last / length * tensors["model.norm.weight"] @ head.T, atol=1e-9)


@each_case
def test_no_slot_sees_a_later_one(case: Case):
    token, segment, position = make_inputs(case)["alone"]
    changed = token.copy()
    changed[0, 6] = (token[0, 6] + 1) % case.config["vocab_size"]
    found = oracle.run(case.config, make_tensors(case), changed, segment, position)["logits"][0]
    same = answer(case, "alone")["logits"][0]
    np.testing.assert_array_equal(found[:6], same[:6])
    assert np.all(np.max(np.abs(found[6:] - same[6:]), axis=-1) > 1e-3)


@each_case
def test_logits_are_of_the_order_of_those_of_a_model(case: Case):
    logits = answer(case, "packed")["logits"]
    assert 1.5 < np.std(logits) < 4
    assert 5 < np.max(np.abs(logits)) < 15


@each_with_experts
def test_no_choice_of_experts_is_near_a_tie_and_each_is_chosen(case: Case):
    n_chosen = case.config["num_experts_per_tok"]
    routed = answer(case, "packed")["router"]
    assert list(routed) == [layer for layer, has in enumerate(list_layers(case)) if has]
    for logits_BTE in routed.values():
        probability_TE = np.exp(logits_BTE[0]) / np.sum(np.exp(logits_BTE[0]), axis=-1, keepdims=True)
        for score_TE in (logits_BTE[0], probability_TE):
            ranked_TE = np.sort(score_TE, axis=-1)[:, ::-1]
            assert np.min(ranked_TE[:, n_chosen - 1] - ranked_TE[:, n_chosen]) > 1e-3
        chosen = np.argsort(-probability_TE, axis=-1)[:, :n_chosen]
        assert set(chosen.ravel()) == set(range(oracle.count_experts(case.config)))


@each_case
def test_sizes_differ_so_that_none_can_be_taken_for_another(case: Case):
    config, tensors = case.config, make_tensors(case)
    inner = [config[name] for name in config if name.endswith("intermediate_size")]
    sizes = [config["hidden_size"], config["vocab_size"], *inner, *(2 * size for size in inner)]
    assert len(set(sizes)) == len(sizes)
    assert 16 <= config["hidden_size"] <= 40 <= config["vocab_size"] <= 97
    assert len(list_layers(case)) in (2, 3)
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    assert ("lm_head.weight" in tensors) == (case.head_stored or not config["tie_word_embeddings"])
    assert any(".bias" in name for name in tensors) == (config["model_type"] != "llama")
    assert all(np.all(x != 0) for x in tensors.values())


def test_cases_cover_the_family():
    def find(family: str, *names: str) -> set:
        """The values of fields, None where one is absent, over the cases of a family."""
        chosen = [case.config for case in CASES if case.config["model_type"].startswith(family)]
        return {tuple(config.get(name) for name in names) if names[1:] else config.get(*names) for config in chosen}

    assert len(CASES) >= 10
    assert find("", "model_type") == {"qwen2", "qwen2_moe", "llama"}
    for family in ("qwen2", "qwen2_moe", "llama"):
        assert find(family, "tie_word_embeddings") == {True, False}
    assert {case.head_stored for case in CASES if case.config["tie_word_embeddings"]} == {True, False}
    assert {case.config["num_attention_heads"] // oracle.count_key_heads(case.config) for case in CASES} == {1, 2, 4, 8}
    apart = {
        np.sign(config["head_dim"] * config["num_attention_heads"] - config["hidden_size"])
        for config in (case.config for case in CASES)
        if "head_dim" in config
    }
    assert apart == {-1, 1}
    thetas = {(oracle.read_theta(case.config), case.config["rms_norm_eps"]) for case in CASES}
    assert thetas == {(theta, eps) for theta in (1e4, 1e6) for eps in (1e-5, 1e-6)}
    assert None in find("llama", "num_key_value_heads")
    # Spellings: at the top, in a group, or left out.
    spelled = {("rope_theta" in case.config, "rope_parameters" in case.config) for case in CASES}
    assert spelled == {(True, False), (False, True), (False, False)}
    assert find("", "dtype", "torch_dtype") == {("float32", None), (None, "float32")}
    assert {case.n_shards for case in CASES} == {1, 2}


def test_cases_cover_the_experts():
    assert {(case.packed, case.config["norm_topk_prob"]) for case in WITH_EXPERTS} == {
        (packed, normalised) for packed in (True, False) for normalised in (True, False)
    }
    assert {"num_experts" in case.config for case in WITH_EXPERTS} == {True, False}
    mixed = [case.config for case in WITH_EXPERTS if set(list_layers(case)) == {True, False}]
    assert any(config.get("decoder_sparse_step") == 2 for config in mixed)
    assert any(config.get("mlp_only_layers") for config in mixed)
    assert any(set(list_layers(case)) == {True} for case in WITH_EXPERTS)
    assert {case.n_shards for case in WITH_EXPERTS if case.packed} == {1, 2}


def measure_gap(case: Case, config: dict, tensors: dict) -> float:
    """How far the answer of a mistaken model is from the case's own, in parts of its largest logit."""
    found = oracle.run(config, tensors, *make_inputs(case)["alone"])["logits"]
    return worst_gap(found, answer(case, "alone")["logits"])


MISREAD = [
    ("qwen2_tied", "rope_theta", 1e4),
    ("llama_tied", "rope_parameters", None),
    ("qwen2_untied", "rms_norm_eps", 1e-5),
    ("llama_without_fields", "rms_norm_eps", 1e-6),
    ("moe_normalised", "norm_topk_prob", False),
    ("moe_packed", "norm_topk_prob", True),
    ("moe_packed_normalised", "num_experts_per_tok", 2),
]


@pytest.mark.parametrize(("name", "field", "value"), MISREAD)
def test_a_misread_config_is_seen_in_the_logits(name: str, field: str, value):
    case = BY_NAME[name]
    assert measure_gap(case, case.config | {field: value}, make_tensors(case)) > 1e-2


def to_neighbours(x: np.ndarray, width: int) -> np.ndarray:
    """The rows of each head from pairs as halves into pairs as neighbours."""
    return x.reshape(-1, 2, width // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


MISTAKEN = [
    ("qwen2_one_key_head", r"q_proj\.bias", np.zeros_like),
    ("qwen2_one_key_head", r"k_proj\.bias", np.zeros_like),
    ("moe_every_second", r"v_proj\.bias", np.zeros_like),
    ("qwen2_narrow_heads", r"[qk]_proj", lambda x: to_neighbours(x, 6)),
    ("qwen2_tied_stored", r"[kv]_proj", lambda x: np.roll(x, 8, axis=0)),
    ("llama_tied", r"input_layernorm", np.ones_like),
    ("moe_normalised", r"shared_expert_gate", np.zeros_like),
    ("moe_packed", r"gate_up_proj", lambda x: np.roll(x, 18, axis=1)),
    ("moe_packed_normalised", r"gate_up_proj", lambda x: np.stack([to_neighbours(y, 24) for y in x])),
    ("moe_packed_normalised", r"experts\.down_proj", lambda x: np.roll(x, 1, axis=0)),
]


@pytest.mark.parametrize(("name", "pattern", "change"), MISTAKEN, ids=[f"{name}-{what}" for name, what, _ in MISTAKEN])
def test_a_mistaken_tensor_is_seen_in_the_logits(name: str, pattern: str, change):
    case = BY_NAME[name]
    changed = {name: change(x) for name, x in make_tensors(case).items() if re.search(pattern, name)}
    assert changed
    tensors = make_tensors(case) | changed
    assert measure_gap(case, case.config, tensors) > 1e-2


@each_case
def test_the_written_folder_holds_the_case(case: Case, tmp_path: pathlib.Path):
    safetensors = pytest.importorskip("safetensors.numpy")
    write_folder(case, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == case.config
    files = {path.name: safetensors.load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(files) == case.n_shards
    held = [(name, tensor) for tensors in files.values() for name, tensor in tensors.items()]
    assert len(held) == len(make_tensors(case))
    for name, tensor in held:
        np.testing.assert_array_equal(tensor, make_tensors(case)[name], strict=True)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (case.n_shards > 1)
    if case.n_shards > 1:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        assert found == {name: file for file, tensors in files.items() for name in tensors}
