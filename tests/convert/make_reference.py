"""Writes reference_CASE.json: what transformers' own models answer to the inputs of every case.

It needs torch and transformers, which the tests do not:

    python tests/convert/make_reference.py
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.convert.qwen2_cases import CASES, Case, Inputs, make_inputs, make_tensors, write_folder
from tests.convert.qwen2_oracle import count_experts

FOLDER = Path(__file__).parent


def load_model(case: Case, folder: Path) -> torch.nn.Module:
    """The model of a folder that is written first. Raises ValueError unless its weights are exactly the case's."""
    write_folder(case, folder)
    options: dict[str, Any] = {}
    if count_experts(case.config):
        options["experts_implementation"] = "eager"  # the other one wants strides of 16 bytes
    if "num_local_experts" in case.config:
        options["num_experts"] = case.config["num_local_experts"]  # of this family it is not read: it would be 60
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    model, info = loaded
    faults = {name: found for name, found in info.items() if found}
    if faults:
        raise ValueError(f"{case.name}: {faults}")
    check_weights(case, {name: tensor.numpy() for name, tensor in model.state_dict().items()})
    return model.eval()


def check_weights(case: Case, held: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless a model holds the tensors of the case: these alone, and bit by bit."""
    rest = dict(held)
    if case.config["tie_word_embeddings"] and not case.head_stored:
        head = rest.pop("lm_head.weight")
        if not np.array_equal(head, held["model.embed_tokens.weight"]):
            raise ValueError(f"{case.name}: its head is not tied")
    for name, tensor in make_tensors(case).items():
        layer, found, rest_of_name = name.partition(".experts.")
        expert, _, matrix = rest_of_name.partition(".")
        if not found or case.packed:
            loaded = rest.pop(name)
        elif matrix == "down_proj.weight":
            loaded = held[f"{layer}.experts.down_proj"][int(expert)]
        else:
            halves = np.split(held[f"{layer}.experts.gate_up_proj"][int(expert)], 2)
            loaded = halves[0 if matrix == "gate_proj.weight" else 1]
        if not np.array_equal(loaded, tensor):
            raise ValueError(f"{case.name}: {name} is another tensor in the model")
    merged = set() if case.packed else {name for name in rest if ".experts." in name}
    if rest.keys() - merged:
        raise ValueError(f"{case.name}: the model has weights of its own: {sorted(rest.keys() - merged)}")


@torch.no_grad()
def answer(model: torch.nn.Module, form: str, inputs: Inputs) -> np.ndarray:
    """Logits `[N, V]` of the slots that are no padding, row after row."""
    token, segment, position = (torch.from_numpy(x) for x in inputs)
    arguments: dict[str, torch.Tensor] = {}
    if form == "packed":
        causal = torch.ones(segment.shape[1], segment.shape[1]).tril().bool()
        seen = causal & (segment[:, None, :, None] == segment[:, None, None, :])
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        arguments = {"attention_mask": mask, "position_ids": position}
    elif form != "alone":
        mask = (segment > 0).long()
        # As transformers' own generation numbers padded rows.
        arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    logits = model(input_ids=token, use_cache=False, **arguments).logits
    return logits.numpy()[inputs.segment_BT > 0]


def shorten(row: np.ndarray) -> list[float]:
    """Float32 numbers by the fewest digits that are them."""
    return [float(str(x)) for x in row]


def lay_out(brackets: str, parts: list[str]) -> str:
    """JSON of JSON texts, a line each."""
    return brackets[0] + "\n" + ",\n".join(parts) + "\n" + brackets[1]


def label(texts: dict[str, str]) -> list[str]:
    return [f'"{name}": {text}' for name, text in texts.items()]


def write_reference(case: Case) -> int:
    """Writes the case's file and returns its size in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(case, Path(folder))
    inputs = make_inputs(case)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    asked = {
        form: json.dumps({name.removesuffix("_BT"): x.tolist() for name, x in value._asdict().items()})
        for form, value in inputs.items()
    }
    answered = {
        form: lay_out("[]", [json.dumps(shorten(row), separators=(",", ":")) for row in answer(model, form, value)])
        for form, value in inputs.items()
    }
    parts = {"versions": json.dumps(versions), "seed": str(case.seed)}
    parts |= {name: lay_out("{}", label(value)) for name, value in (("inputs", asked), ("logits", answered))}
    text = lay_out("{}", label(parts)) + "\n"
    FOLDER.mkdir(exist_ok=True)
    return (FOLDER / f"reference_{case.name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    for case in CASES:
        print(f"{case.name}: {write_reference(case):,} bytes")


if __name__ == "__main__":
    main()
