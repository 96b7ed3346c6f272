"""The model once more, as loops in float64 NumPy and the standard library's calendar: the oracle of these tests."""

import datetime
import math

import jax
import numpy as np

from moerec.types import EVENT, NO_TIME, RECOMMEND

EPOCH = datetime.datetime(2000, 1, 1)
FIELD_SIZES = (3, 2)  # of the models in these tests
Weights = dict[str, np.ndarray]


def read_weights(module) -> Weights:
    """All weights in float64, by their path, such as `groups[0].attention.q_DNH`."""
    leaves = jax.tree_util.tree_flatten_with_path(module)[0]
    return {
        jax.tree_util.keystr(path).removeprefix(".").removesuffix(".value"): np.asarray(leaf, np.float64)
        for path, leaf in leaves
    }


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(f"{prefix}."): w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def layer(weights: Weights, index: int) -> Weights:
    return {name: w[index] for name, w in weights.items()}


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(w: Weights, x):
    return (silu(x @ w["gate_DF"]) * (x @ w["up_DF"])) @ w["down_FD"]


def rope(x_H, position, theta):
    """As in Hugging Face's Qwen2: `x * cos + rotate_half(x) * sin`."""
    half = len(x_H) // 2
    frequency = 1.0 / theta ** (np.arange(0, len(x_H), 2) / len(x_H))
    angle = np.concatenate([frequency, frequency]) * position
    return x_H * np.cos(angle) + np.concatenate([-x_H[half:], x_H[:half]]) * np.sin(angle)


def attention(w: Weights, x_TD, position_T, segment_T, theta):
    """One row, slot by slot and head by head."""
    n_heads, n_kv_heads, width = w["q_DNH"].shape[1], w["k_DKH"].shape[1], w["q_DNH"].shape[2]
    out = np.zeros((len(x_TD), w["o_NHD"].shape[-1]))
    for n in range(n_heads):
        k = n * n_kv_heads // n_heads
        key = [rope(x @ w["k_DKH"][:, k] + w["k_bias_KH"][k], p, theta) for x, p in zip(x_TD, position_T, strict=True)]
        value = [x @ w["v_DKH"][:, k] + w["v_bias_KH"][k] for x in x_TD]
        for t, x in enumerate(x_TD):
            query = rope(x @ w["q_DNH"][:, n] + w["q_bias_NH"][n], position_T[t], theta)
            seen = [s for s in range(t + 1) if segment_T[s] == segment_T[t]]
            exps = np.array([math.exp(query @ key[s] / math.sqrt(width)) for s in seen])
            mixed = sum(e * value[s] for e, s in zip(exps / exps.sum(), seen, strict=True))
            out[t] += mixed @ w["o_NHD"][n]
    return out


def softmax(x):
    exps = np.exp(x - x.max())
    return exps / exps.sum()


def mixture(w: Weights, x_TD, log_domain_TZ, segment_T, moe, bias_E=None):
    """Domain experts, slot by slot and expert by expert; padding gets nothing but the shared expert."""
    out = np.zeros_like(x_TD)
    n_services = log_domain_TZ.shape[1]
    bias_E = np.zeros(len(w["router_ED"])) if bias_E is None else bias_E
    for t, x in enumerate(x_TD):
        logits = w["router_ED"] @ x + w["w_domain_EZ"] @ log_domain_TZ[t]
        allowed = list(range(len(logits)))
        if moe.n_open_groups:
            groups = {*np.argsort(-log_domain_TZ[t])[: moe.n_open_groups], n_services}
            allowed = [e for e in allowed if e // moe.n_per_group in groups]
        probability = dict(zip(allowed, softmax(logits[allowed]), strict=True))
        chosen = sorted(allowed, key=lambda e: -(logits[e] + bias_E[e]))[: moe.n_active]
        total = sum(probability[e] for e in chosen)
        for e in chosen if segment_T[t] else ():
            hidden = silu(x @ w["gate_EDF"][e]) * (x @ w["up_EDF"][e])
            out[t] += probability[e] / total * (hidden @ w["down_EFD"][e])
    return out + (swiglu(part(w, "shared"), x_TD) if moe.d_shared else 0)


def log_domain(w: Weights, x_TD, eps):
    """The analyser's log-posterior."""
    logits = rms_norm(x_TD, w["norm.scale"], eps) @ w["out_DZ"] + w["bias_Z"]
    return np.log([softmax(row) for row in logits])


def block(w: Weights, x_TD, position_T, segment_T, config, log_domain_TZ=None, bias_E=None):
    y = rms_norm(x_TD, w["attention_norm.scale"], config.norm_eps)
    x_TD = x_TD + attention(part(w, "attention"), y, position_T, segment_T, config.rope_theta)
    y, ffn = rms_norm(x_TD, w["ffn_norm.scale"], config.norm_eps), part(w, "ffn")
    is_mixture = "router_ED" in ffn
    return x_TD + (mixture(ffn, y, log_domain_TZ, segment_T, config.moe, bias_E) if is_mixture else swiglu(ffn, y))


def text_vector(w: Weights, tokens, eps):
    tokens = [t for t in tokens if t > 0]
    total = sum((w["table_VD"][t] for t in tokens), np.zeros(w["table_VD"].shape[1]))
    mean = rms_norm(total / math.sqrt(max(len(tokens), 1)), w["norm.scale"], eps)
    return (mean + silu(mean @ w["gate_DD"])) @ w["out_DD"]


def item_vector(w: Weights, item, table, eps):
    parts = []
    if "row_ID" in w:
        is_trained = "no_row_D" not in w or table.count_I[item] > 0
        parts.append(w["row_ID"][item] if is_trained else w["no_row_D"])
    if "text.table_VD" in w:
        parts.append(text_vector(part(w, "text"), table.token_IW[item], eps))
    return sum(parts)


def calendar(time: int) -> tuple[int, int, float]:
    """Hour, weekday, and the place in the year in half-months."""
    moment = EPOCH + datetime.timedelta(seconds=int(time))
    return moment.hour, moment.weekday(), (moment.timetuple().tm_yday - 1) * 24 / 365.25


def gap(since: int, time: int) -> int:
    return min(math.floor(1.5 * math.log2(1 + max(int(time) - int(since), 0) / 3600)), 23)


def month_day(time: int) -> int:
    """Day of the month, from 0."""
    return (EPOCH + datetime.timedelta(seconds=int(time))).day - 1


def turn(time: int, name: str) -> float:
    """How much of a cycle of the calendar has gone by; a year's are quarters of a day of four years."""
    moment = EPOCH + datetime.timedelta(seconds=int(time))
    day = (moment - EPOCH).days
    since_midnight = (moment - EPOCH).seconds
    return {
        "hour": since_midnight / 86_400,
        "weekday": moment.weekday() / 7,
        "month_day": (moment.day - 1) / 31,
        "season": math.fmod(math.fmod(day, 365.25) + 365.25, 365.25) / 365.25,
    }[name]


def wave_features(time: int, harmonics: dict[str, int]) -> np.ndarray:
    """Cosines and sines of the harmonics of each cycle, and whether the time is not known."""
    features: list[float] = []
    for name, n in harmonics.items():
        angles = [0.0 if time == NO_TIME else 2 * math.pi * k * turn(time, name) for k in range(1, n + 1)]
        features += [*map(math.cos, angles), *map(math.sin, angles)]
    return np.array([0.0] * len(features) + [1.0] if time == NO_TIME else [*features, 0.0])


def time_vector(w: Weights, time, shift, since, last=(), harmonics=None):
    """The weights that are there say which parts are on. Args: times of the last events in services; of the waves."""
    clock = NO_TIME if time == NO_TIME else int(time) + int(shift)
    hour, weekday, season = (24, 7, 24) if time == NO_TIME else calendar(clock)
    codes = {"hour": hour, "weekday": weekday, "season": math.floor(season)}
    codes["month_day"] = 31 if time == NO_TIME else month_day(clock)
    parts = [w[name][code] for name, code in codes.items() if name in w]

    def bucket(since):
        return 24 if NO_TIME in (time, since) else gap(since, time)

    if "wave_XD" in w:
        parts.append(wave_features(clock, harmonics) @ w["wave_XD"])
    if "gap" in w:
        parts.append(w["gap"][bucket(since)])
    if "service_gap" in w:
        parts += [w["service_gap"][z, bucket(time_z)] for z, time_z in enumerate(last)]
    return sum(parts, np.zeros(()))


def last_in_service(batch, table, b, t, service) -> int:
    """Time of the last event in the service up to slot t of the same sequence, or `NO_TIME`."""
    for s in range(t, t - batch.position_BT[b, t] - 1, -1):
        if batch.kind_BT[b, s] == EVENT and table.service_I[batch.item_BT[b, s]] == service:
            return batch.time_BT[b, s]
    return NO_TIME


def slot_vector(w: Weights, batch, table, b, t, context_sizes, harmonics=None, item=0.0):
    """What slot t of row b is, its item's vector given; the weights that are there say which parts are on.

    A control slot has its token's vector in the place of everything that an event has.
    """
    parts = [np.zeros(())]
    time, kind = batch.time_BT[b, t], batch.kind_BT[b, t]
    first = batch.position_BT[b, t] == 0
    if kind == EVENT:
        parts.append(item)
        if "service" in w:
            parts.append(w["service"][table.service_I[batch.item_BT[b, t]]])
        if "action" in w:
            parts.append(w["action"][batch.action_BT[b, t]])
        if any(name.startswith("event_time") for name in w):
            before = time if first else batch.time_BT[b, t - 1]
            service = table.service_I[batch.item_BT[b, t]]
            last = [NO_TIME if first else last_in_service(batch, table, b, t - 1, service)]
            offset = batch.utc_offset_BT[b, t]
            parts.append(time_vector(part(w, "event_time"), time, offset, before, last, harmonics))
    elif kind == RECOMMEND:
        parts.append(w["control_D"])
        if "field" in w:
            sizes = FIELD_SIZES
            codes = batch.request.field_BTY[b, t]
            parts += [w["field"][sum(sizes[:y]) + code] for y, code in enumerate(codes) if code]
    request = batch.request
    if any(name.startswith("request_time") for name in w):
        last = [last_in_service(batch, table, b, t, z) for z in range(int(table.service_I.max()) + 1)]
        asked = (request.time_BT[b, t], request.utc_offset_BT[b, t])
        parts.append(time_vector(part(w, "request_time"), *asked, time, last, harmonics))
    if "context" in w:
        *rows, unseen = np.split(w["context"], np.cumsum(context_sizes))
        for c, code in enumerate(request.context_BTC[b, t]):
            parts.append(unseen[c] if code == context_sizes[c] else rows[c][code])
    return sum(parts)


def embed(weights: Weights, batch, table, config, context_sizes, b):
    """The first layer's input in row b."""
    items, slots = part(weights, "item_encoder"), part(weights, "slot_encoder")
    d = len(weights["input_norm.scale"])
    x = []
    for t, i in enumerate(batch.item_BT[b]):
        item = item_vector(items, i, table, config.norm_eps)
        x.append(np.zeros(d) + slot_vector(slots, batch, table, b, t, context_sizes, item=item))
    return rms_norm(np.stack(x), weights["input_norm.scale"], config.norm_eps)


def all_layers(weights: Weights) -> list[Weights]:
    """The layers from below, whatever groups they are in."""
    stacks: list[Weights] = []
    while group := part(weights, f"groups[{len(stacks)}]"):
        stacks.append(group)
    return [layer(w, i) for w in stacks for i in range(len(w["ffn_norm.scale"]))]


def encode(weights: Weights, batch, table, config, context_sizes, frozen=None, bias_LE=None):
    """The states of `SequenceModel.encode` without dropout, under biases of the mixture layers' routers.

    `frozen` are weights from which the posterior that the routers read is computed, where they are not those of the
    call: no gradient passes there.
    """
    if frozen is None:
        return _encode(weights, batch, table, config, context_sizes, None, bias_LE)[0]
    posterior = _encode(frozen, batch, table, config, context_sizes, None)[1]
    return _encode(weights, batch, table, config, context_sizes, posterior, bias_LE)[0]


def posterior(weights: Weights, batch, table, config, context_sizes):
    """The analyser's log-posterior `[B, T, Z]`."""
    return _encode(weights, batch, table, config, context_sizes, None)[1]


def _encode(weights: Weights, batch, table, config, context_sizes, given, bias_LE=None):
    states, posteriors = [], []
    for b in range(len(batch.item_BT)):
        x = embed(weights, batch, table, config, context_sizes, b)
        found = None
        for index, w in enumerate(all_layers(weights)):
            if index == min(config.moe.layers, default=-1):
                found = log_domain(part(weights, "analyser"), x, config.norm_eps)
                posteriors.append(found)
                found = found if given is None else given[b]
            bias_E = None
            if bias_LE is not None and index in config.moe.layers:
                bias_E = bias_LE[sorted(config.moe.layers).index(index)]
            x = block(w, x, batch.position_BT[b], batch.segment_BT[b], config, found, bias_E)
        states.append(rms_norm(x, weights["final_norm.scale"], config.norm_eps))
    return np.stack(states), posteriors


def route_sums(weights: Weights, batch, table, config, context_sizes, domain_BT, frozen):
    """Of a model of one mixture layer: probabilities and assignments `[Z, E]` by domain, and the squares of the lse."""
    w, n_active = layer(part(weights, "groups[0]"), 0), config.moe.n_active
    n_services = len(w["ffn.w_domain_EZ"][0])
    probability, count, square = *np.zeros((2, n_services, len(w["ffn.router_ED"]))), 0.0
    given = posterior(frozen, batch, table, config, context_sizes)
    for b in range(len(batch.item_BT)):
        x = embed(weights, batch, table, config, context_sizes, b)
        y = rms_norm(x, w["attention_norm.scale"], config.norm_eps)
        x = x + attention(part(w, "attention"), y, batch.position_BT[b], batch.segment_BT[b], config.rope_theta)
        y = rms_norm(x, w["ffn_norm.scale"], config.norm_eps)
        for t, z in enumerate(domain_BT[b]):
            if z >= 0:
                logits = w["ffn.router_ED"] @ y[t] + w["ffn.w_domain_EZ"] @ given[b][t]
                probability[z] += softmax(logits)
                count[z, np.argsort(-logits)[:n_active]] += 1
                square += np.log(np.sum(np.exp(logits))) ** 2
    return probability, count, square


def slope(function, weights: Weights, name: str, direction: np.ndarray, step: float = 1e-5) -> float:
    """Central difference of a scalar function of the weights, one of them moved along a direction."""
    forward, backward = ({**weights, name: weights[name] + sign * step * direction} for sign in (1, -1))
    return (function(forward) - function(backward)) / (2 * step)


def assert_slopes(function, weights: Weights, gradients: Weights, tolerance: float, seed: int = 0):
    """Checks every gradient along a random direction against the central difference of the oracle."""
    rng = np.random.default_rng(seed)
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        expected = slope(function, weights, name, direction)
        size = np.linalg.norm(gradient) + 1
        assert abs(np.sum(gradient * direction) - expected) < tolerance * size, name
