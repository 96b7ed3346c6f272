"""Tiny models, catalogues and packed batches; every weight is random and none is zero, and nothing is compiled."""

import datetime

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import ModelConfig
from moerec.nn.model import ModelSizes, SequenceModel
from moerec.types import EVENT, NO_TIME, RECOMMEND, Batch, Catalog, Request, Target

SIZES = ModelSizes(
    n_items=13,
    n_tokens=12,
    n_services=3,
    n_actions=3,
    context_sizes=(3, 4),
    field_sizes=(3, 2),
    has_control=True,
)
EPOCH = datetime.datetime(2000, 1, 1)


def make_config(**fields) -> ModelConfig:
    small = {"n_layers": 2, "d_model": 8, "n_heads": 4, "n_kv_heads": 2, "d_head": 4, "d_ff": 16, "d_text": 6}
    return ModelConfig(**{**small, "dropout": 0.0, "event_time": True, **fields})


def fill(module, seed: int = 0, stddev: float = 0.4):
    """The tree of a module's shapes with random weights in their place; scales of norms are around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if jax.tree_util.keystr(path).endswith("scale.value") else 0.0
        return jnp.asarray(mean + stddev * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, module)


def make_model(config: ModelConfig, seed: int = 0, sizes: ModelSizes = SIZES) -> SequenceModel:
    return fill(jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config, sizes)), seed)


def make_table(seed: int = 0, sizes: ModelSizes = SIZES) -> Catalog:
    """A catalogue whose texts have 0 to 4 tokens; the last item has none."""
    rng = np.random.default_rng(seed)
    token_IW = rng.integers(1, sizes.n_tokens, (sizes.n_items, 4))
    token_IW[np.arange(4) >= rng.integers(1, 5, (sizes.n_items, 1))] = 0
    token_IW[-1] = 0
    return Catalog(
        np.sort(np.arange(sizes.n_items) % sizes.n_services).astype(np.int32),
        token_IW.astype(np.int32),
        rng.integers(0, 20, sizes.n_items).astype(np.float32),
    )


def draw_times(rng: np.random.Generator, n: int) -> np.ndarray:
    """Times from 1985 to 2044 in the middle of a half-month, so that no leap day moves them across its border."""
    year, half_month = rng.integers(1985, 2045, n), rng.integers(0, 24, n)
    days = [(datetime.datetime(int(y), 1, 1) - EPOCH).days for y in year]
    return (np.asarray(days) + ((half_month + 0.5) * 365.25 / 24).astype(int)) * 86_400 + rng.integers(0, 86_400, n)


def make_sequence(
    rng: np.random.Generator, n: int, sizes: ModelSizes = SIZES, control: bool = False
) -> dict[str, np.ndarray]:
    """The slots of one user: a fifth of the times not known, contexts missing or unseen, some weights 0 or 2.

    With `control` the first one is the control slot `<|recommend|>`.
    """
    time = np.sort(draw_times(rng, n))
    request_time = np.maximum(time, draw_times(rng, n))
    known = rng.random((2, n)) > 0.2
    hours = np.random.default_rng(n).integers(-12, 13, (2, n))
    item = rng.integers(0, sizes.n_items, n)
    columns = {
        "kind": np.full(n, EVENT),
        "item": item,
        "service": np.asarray(make_table(sizes=sizes).service_I)[item],
        "action": rng.integers(0, sizes.n_actions, n),
        "time": np.where(known[0], time, NO_TIME),
        "utc_offset": 3600 * hours[0],
        "position": np.arange(n),
        "request.time": np.where(known[1], request_time, NO_TIME),
        "request.utc_offset": 3600 * hours[1],
        "request.context": rng.integers(0, np.array(sizes.context_sizes) + 1, (n, len(sizes.context_sizes))),
        "request.field": np.broadcast_to(rng.integers(0, sizes.field_sizes), (n, len(sizes.field_sizes))),
        "label": rng.integers(0, sizes.n_items, n),
        "weight": rng.choice([0.0, 1.0, 1.0, 2.0], n),
    }
    if control and n:
        nothing = {"kind": RECOMMEND, "item": 0, "service": sizes.n_services, "action": 0, "time": NO_TIME}
        for name, value in {**nothing, "utc_offset": 0}.items():
            columns[name][0] = value
    return columns


def lay(rows: list[list[dict[str, np.ndarray]]], n_slots: int, sizes: ModelSizes = SIZES) -> Batch:
    """Lays sequences one after the other into rows; what is left of a row is padding."""
    shape = (len(rows), n_slots)
    first = rows[0][0]
    columns = {name: np.zeros((*shape, *values.shape[1:]), np.int32) for name, values in first.items()}
    columns["segment"] = np.zeros(shape, np.int32)
    columns["service"][:] = sizes.n_services
    columns["time"][:] = columns["request.time"][:] = NO_TIME
    columns["weight"] = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        start = 0
        for segment, sequence in enumerate(row, 1):
            end = start + len(sequence["item"])
            columns["segment"][r, start:end] = segment
            for name, values in sequence.items():
                columns[name][r, start:end] = values
            start = end
    request = Request(*(columns[f"request.{name}"] for name in ("time", "utc_offset", "context", "field")))
    own = ("kind", "item", "service", "action", "time", "utc_offset", "position", "segment")
    targets = {"next_event": Target(columns["label"], columns["weight"])}
    return Batch(*(columns[name] for name in own), request, targets)


def target_of(batch: Batch) -> Target:
    """The next-event targets of a batch."""
    return batch.targets["next_event"]


def with_target(batch: Batch, **fields) -> Batch:
    """The batch with `label_BT` or `weight_BT` replaced."""
    return batch._replace(targets={"next_event": target_of(batch)._replace(**fields)})


def with_request(batch: Batch, **fields) -> Batch:
    """The batch with parts of the request replaced."""
    return batch._replace(request=batch.request._replace(**fields))


def replace_slot(batch: Batch, name: str, place: tuple[int, int], value) -> Batch:
    """The batch with one value changed; `name` may be that of a part of the request."""
    name, is_request = name.removeprefix("request."), name.startswith("request.")
    column = getattr(batch.request if is_request else batch, name).copy()
    column[place] = value
    return with_request(batch, **{name: column}) if is_request else batch._replace(**{name: column})


def assert_packed_is_alone(packed, alone, rows: list[list[dict]], atol: float) -> None:
    """Of arrays `[rows, T, ...]` of sequences laid into rows, and `[sequences, T, ...]` of each in a row of its own."""
    row = 0
    for b, sequences in enumerate(rows):
        start = 0
        for sequence in sequences:
            n = len(sequence["item"])
            np.testing.assert_allclose(packed[b, start : start + n], alone[row, :n], atol=atol)
            start, row = start + n, row + 1


def make_batch(
    seed: int, lengths: list[list[int]], n_slots: int, sizes: ModelSizes = SIZES, control: bool = False
) -> Batch:
    rng = np.random.default_rng(seed)
    return lay([[make_sequence(rng, n, sizes, control) for n in row] for row in lengths], n_slots, sizes)


def random_like(tree, seed: int = 0):
    """A tree of standard normal numbers: a direction, or a cotangent."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape), tree)


def worst_gap(a, b) -> float:
    """The largest absolute difference between two trees of arrays."""
    gaps = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y)), initial=0)), a, b)
    return max(jax.tree.leaves(gaps))
