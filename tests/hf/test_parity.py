"""Logits beside those of transformers on the same folder, at every position of every form of input."""

import numpy as np
import pytest

from moerec.convert.logits import compute_logits, make_text_batch
from moerec.train.base_model.hf_run import read_hf_model
from tests.convert import qwen2_cases
from tests.convert.make_reference import answer, load_model
from tests.convert.qwen2_cases import CASES, FINE, MOE, NEW, QWEN2, UNTIED, Case, make_inputs
from tests.hf.loading import measure_gap

WIDE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 344,
    "vocab_size": 1000,
    "rope_theta": 1e6,
}
EXPERTS = {
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 72,
    "shared_expert_intermediate_size": 200,
    "norm_topk_prob": False,
}
# With the seed of the mixture no choice of experts is near a tie, and each is chosen by some slot.
WIDE_CASES = (
    Case("wide_dense", 101, QWEN2 | NEW | UNTIED | FINE | WIDE),
    Case("wide_mixture", 129, MOE | NEW | UNTIED | FINE | WIDE | EXPERTS),
)


def check_case(case: Case, folder, record_property) -> None:
    other = load_model(case, folder)
    _, model = read_hf_model(folder)
    gaps = {}
    for form, x in make_inputs(case).items():
        real_BT = x.segment_BT > 0
        found = np.asarray(compute_logits(model, make_text_batch(x.token_BT, x.segment_BT)))[real_BT]
        gaps[form] = measure_gap(found, answer(other, form, x))
    told = ", ".join(f"{form} {gap:.1e}" for form, gap in gaps.items())
    print(f"{case.name}: largest difference in parts of the largest logit: {told}")
    record_property("largest_gap", max(gaps.values()))
    assert max(gaps.values()) < 1e-4, gaps


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(case: Case, tmp_path, record_property):
    check_case(case, tmp_path, record_property)


@pytest.mark.parametrize("case", WIDE_CASES, ids=lambda case: case.name)
def test_logits_of_longer_documents_and_wider_models_are_those_of_transformers(
    case: Case, tmp_path, record_property, monkeypatch
):
    monkeypatch.setattr(qwen2_cases, "LENGTHS", (39, 25))  # packed, a row of 64
    check_case(case, tmp_path, record_property)
