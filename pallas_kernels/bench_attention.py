"""What `pallas_kernels.bench` measures of attention: forward and backward with both biases, and what it keeps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attend
from pallas_kernels.specs import AttentionSpec, draw_attention

SLOTS = (512, 1024, 2048, 4096, 8192)
MOST_OF_REFERENCE = 2048  # slots; twice as many take it 1.7 GB and ten seconds


def make_attention(spec: AttentionSpec, backend: str) -> tuple[Callable[[], Any], int]:
    """The gradients of `attend` over the spec's operands, and the bytes of the compiled program's temporaries."""
    q, k, v, segment, time, time_bias, group, group_bias = draw_attention(spec)

    def total(q, k, v, time_bias, group_bias):
        biases = {"time_BT": time, "time_bias_NJ": time_bias, "group_BT": group, "group_bias_BTNG": group_bias}
        out, lse = attend(q, k, v, segment, **biases, backend=backend)
        return jnp.sum(jnp.square(out)) + jnp.sum(jnp.square(lse))

    floats = q, k, v, time_bias, group_bias
    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4))).lower(*floats).compile()
    memory = compiled.memory_analysis()
    return lambda: compiled(*floats), memory.temp_size_in_bytes if memory else 0


def measure_attention(time_in_turns: Callable[..., dict[str, float]], rounds: int) -> list[dict[str, Any]]:
    """Rows of `{name, ms, ratio, to, temporary_bytes}`, by the number of slots.

    The ratio is to the reference, with the whole `[N, T, S]` in memory, or for longer rows to half the slots.
    """
    rows: list[dict[str, Any]] = []
    for t in SLOTS:
        ours, n_bytes = make_attention(AttentionSpec(t), "xla_blocks")
        variants = {"ours": ours}
        if t <= MOST_OF_REFERENCE:
            variants["reference"], reference_bytes = make_attention(AttentionSpec(t), "reference")
        times = time_in_turns(variants, max(rounds // 3, 1))
        if "reference" in times:
            rows.append(_row(f"attention's reference, {t} slots", times["reference"], times["ours"], "the blocks"))
            rows[-1]["temporary_bytes"] = reference_bytes
            rows.append(_row(f"attention, {t} slots", times["ours"], times["reference"], "the reference"))
        else:
            rows.append(_row(f"attention, {t} slots", times["ours"], rows[-1]["ms"], "half the slots"))
        rows[-1]["temporary_bytes"] = n_bytes
    packed, n_bytes = make_attention(AttentionSpec(4096, segments=16), "xla_blocks")
    times = time_in_turns({"packed": packed}, max(rounds // 3, 1))
    one = next(row for row in rows if row["name"] == "attention, 4096 slots")
    rows.append(_row("attention, 4096 slots in 16 segments", times["packed"], one["ms"], "one segment"))
    rows[-1]["temporary_bytes"] = n_bytes
    return rows


def _row(name: str, ms: float, reference_ms: float, to: str) -> dict[str, Any]:
    return {"name": name, "ms": round(ms, 3), "ratio": round(ms / reference_ms, 3), "to": to}
