import functools
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments import plan as command
from moerec.config import cli
from moerec.errors import InputError
from moerec.train.plan.chips import CHIPS, describe_mesh, parse_topology
from moerec.train.plan.hlo import parse_module
from moerec.train.plan.hlo_costs import sum_costs
from moerec.train.plan.jaxpr_flops import Flops, count_flops
from moerec.train.plan.step_plan import read_shortage
from tests.tiny import make_config

B, D, F, L = 8, 16, 24, 5
LAYER = 2 * B * D * D
WHOLE = PartitionSpec()
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here")


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def make_line(n: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:n]), ("x",), axis_types=(AxisType.Auto,))


# --- operations


def scan_layers(x, w, remat=False):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0]


def scan_twice(x, w):
    return jax.lax.scan(lambda c, _: (scan_layers(c, w), None), x, None, length=3)[0]


def pull(remat):
    return jax.grad(lambda x, w: scan_layers(x, w, remat).sum(), argnums=(0, 1))


def on_four(x, w, rows=WHOLE):
    places = {"in_specs": (rows, WHOLE), "out_specs": rows}
    return jax.shard_map(scan_layers, mesh=make_line(4), check_vma=False, **places)(x, w)


def by_rows(x, w):
    return on_four(x, w, PartitionSpec("x"))


def grouped(x, w):
    sizes = jnp.array([3, 5], jnp.int32)
    return jax.grad(lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum(), argnums=(0, 1))(x, w)


def by_platform(x, w):
    return jax.lax.platform_dependent(x, w, tpu=lambda x, w: x @ w, default=lambda x, w: x @ w @ w @ w)


def choose(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w)


@jax.custom_vjp
def own_rule(x, w):
    return x @ w


own_rule.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def multiply(x_ref, w_ref, o_ref):
    o_ref[...] = x_ref[...] @ w_ref[...]


def kernel(x, w, **options):
    specs = [pl.BlockSpec((2, D), lambda i: (i, 0)), pl.BlockSpec((D, D), lambda i: (0, 0))]
    call = pl.pallas_call(multiply, array(B, D), grid=(B // 2,), in_specs=specs, out_specs=specs[0], **options)
    return call(x, w)


def declared(x, w):
    return kernel(x, w, cost_estimate=pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0))


def until(x, w):
    return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x)


def attend(q, k):
    return jnp.einsum("bthd,bshd->bhts", q, k)


def convolve(x, k):
    return jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


ONE, MANY = array(D, D), array(L, D, D)


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        pytest.param(scan_layers, (array(B, D), MANY), Flops(L * LAYER), id="scan"),
        pytest.param(scan_twice, (array(B, D), MANY), Flops(3 * L * LAYER), id="scan in a scan"),
        pytest.param(jax.jit(scan_twice), (array(B, D), MANY), Flops(3 * L * LAYER), id="jit"),
        pytest.param(pull(False), (array(B, D), MANY), Flops(3 * L * LAYER), id="gradient of a scan"),
        pytest.param(pull(True), (array(B, D), MANY), Flops(4 * L * LAYER), id="gradient of a checkpointed scan"),
        pytest.param(on_four, (array(B, D), MANY), Flops(4 * L * LAYER), id="the same on four devices"),
        pytest.param(by_rows, (array(B, D), MANY), Flops(L * LAYER), id="rows over four devices"),
        pytest.param(grouped, (array(B, D), array(2, D, F)), Flops(3 * 2 * B * D * F), id="groups of rows, gradients"),
        pytest.param(by_platform, (array(B, D), ONE), Flops(LAYER), id="by platform"),
        pytest.param(choose, (array(B, D), ONE), Flops(2 * LAYER), id="the dearer branch"),
        pytest.param(own_rule, (array(B, D), ONE), Flops(LAYER), id="custom_vjp"),
        pytest.param(kernel, (array(B, D), ONE), Flops(LAYER), id="kernel by its grid"),
        pytest.param(declared, (array(B, D), ONE), Flops(123), id="kernel by its word"),
        pytest.param(until, (array(B, D), ONE), Flops(LAYER, unbounded=1), id="loop of unknown length"),
        pytest.param(attend, (array(2, 7, 3, D), array(2, 9, 3, D)), Flops(2 * 2 * 3 * 7 * 9 * D), id="batched"),
        pytest.param(convolve, (array(2, 10, 3), array(5, 3, 7)), Flops(2 * 2 * 10 * 7 * 5 * 3), id="convolution"),
        pytest.param(lambda x, w: jnp.tanh(x).sum(), (array(B, D), ONE), Flops(0), id="elementwise"),
    ],
)
def test_operations_are_the_closed_form(function, arguments, expected):
    assert count_flops(jax.make_jaxpr(function)(*arguments)) == expected


# --- compiled programs: small texts, and programs whose traffic follows from how they are written

LOOP = """HloModule loop

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[64], s32[])) -> (s32[], f32[64], s32[]) {
  %state = (s32[], f32[64]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %x = f32[64]{0} get-tuple-element(%state), index=1
  %limit = s32[] get-tuple-element(%state), index=2
  %all = f32[64]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = (s32[], f32[64]{0}, s32[]) tuple(%next, %all, %limit)
}

%condition (state.1: (s32[], f32[64], s32[])) -> pred[] {
  %state.1 = (s32[], f32[64]{0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %carried = s32[] get-tuple-element(%state.1), index=2
  %fixed = s32[] constant(7)
  ROOT %go = pred[] compare(%i.1, %LIMIT), direction=LT
}

ENTRY %main (x.1: f32[64], n: s32[]) -> (s32[], f32[64], s32[]) {
  %x.1 = f32[64]{0} parameter(0)
  %n = s32[] parameter(1)
  %first = s32[] constant(1)
  %copied = s32[] copy(%first)
  %eleven = s32[] constant(11)
  %start = (s32[], f32[64]{0}, s32[]) tuple(%copied, %x.1, %START)
  ROOT %loop = (s32[], f32[64]{0}, s32[]) while(%start), condition=%condition, body=%body WORD
}
"""


@pytest.mark.parametrize(
    ("step", "limit", "start", "word", "passes"),
    [
        pytest.param(1, "fixed", "n", "", 6, id="constant limit"),
        pytest.param(2, "fixed", "n", "", 3, id="two at a time"),
        pytest.param(4, "fixed", "n", "", 2, id="past the limit"),
        pytest.param(1, "carried", "eleven", "", 10, id="limit among what is carried"),
        pytest.param(1, "fixed", "n", ', backend_config={"known_trip_count":{"n":"6"}}', 6, id="told"),
        pytest.param(1, "carried", "n", "", None, id="limit is an argument"),
    ],
)
def test_passes_of_a_loop(step, limit, start, word, passes):
    text = LOOP.replace("STEP", str(step)).replace("LIMIT", limit).replace("START", start).replace("WORD", word)
    costs = sum_costs(parse_module(text), 4)
    assert costs["all-reduce count"] == (passes or 1)
    assert costs["all-reduce bytes"] == 256 * (passes or 1)
    assert costs["all-reduce sent"] == 2 * 3 / 4 * 256 * (passes or 1)
    assert costs["unbounded"] == (passes is None)


def program(*lines: str, before: str = "") -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"HloModule small\n{before}\nENTRY %main (x: bf16[8,128]) -> bf16[8,128] {{\n{body}}}\n"


X = "%x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)"
CHAIN = 'all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}'
FUSIONS = f"""
%begin (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {{
  %p = bf16[8,128]{{1,0}} parameter(0)
  %gather = bf16[32,128]{{1,0}} {CHAIN}
  ROOT %begun = (bf16[8,128], bf16[32,128]) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}}

%beside (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {{
  %p = bf16[8,128]{{1,0}} parameter(0)
  %gather = bf16[32,128]{{1,0}} {CHAIN}
  %work = bf16[8,128]{{1,0}} negate(%p)
  ROOT %both = (bf16[8,128]{{1,0}}, bf16[32,128]{{1,0}}) tuple(%work, %gather)
}}

%all-reduce-scatter.1 (p: bf16[8,128]) -> bf16[2,128] {{
  %p = bf16[8,128]{{1,0}} parameter(0)
  %sum = bf16[8,128]{{1,0}} all-reduce(%p), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = bf16[2,128]{{1,0}} dynamic-slice(%sum, %id, %zero), dynamic_slice_sizes={{2,128}}
}}
"""
SIZE = 8 * 128 * 2


@pytest.mark.parametrize(
    ("lines", "kind", "n_bytes", "sent"),
    [
        pytest.param(
            ["%s = (bf16[8,128], bf16[32,128]) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}",
             "ROOT %d = bf16[32,128] all-gather-done(%s)"],
            "all-gather", 4 * SIZE, 3 * SIZE, id="a pair"),
        pytest.param(
            ["%a = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) fusion(%x), kind=kCustom, calls=%begin",
             "%b = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) fusion(%x), kind=kLoop, calls=%beside",
             "ROOT %c = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) fusion(%x), kind=kLoop, calls=%beside"],
            "all-gather", 4 * SIZE, 3 * SIZE, id="beside other work"),
        pytest.param(
            ["ROOT %a = bf16[2,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"],
            "reduce-scatter", SIZE, SIZE * 3 / 4, id="an all-reduce of which a part stays"),
        pytest.param(
            ["ROOT %a = bf16[1,128] reduce-scatter(%x), replica_groups={}, dimensions={0}, to_apply=%add"],
            "reduce-scatter", SIZE, SIZE * 7 / 8, id="all chips"),
        pytest.param(
            ["ROOT %a = bf16[8,128] all-to-all(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, dimensions={0}"],
            "all-to-all", SIZE, SIZE * 3 / 4, id="axes of a mesh"),
        pytest.param(
            ["ROOT %a = bf16[8,128] all-reduce(%x), replica_groups=mesh['a'=8] {'a':(1)2}, to_apply=%add"],
            "all-reduce", SIZE, SIZE, id="part of an axis"),
        pytest.param(
            ["%s = (bf16[8,128], bf16[8,128], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}",
             "ROOT %d = bf16[8,128] collective-permute-done(%s)"],
            "collective-permute", SIZE, SIZE, id="neighbours"),
    ],
)  # fmt: skip
def test_collectives_count_once(lines, kind, n_bytes, sent):
    costs = sum_costs(parse_module(program(X, *lines, before=FUSIONS)), 8)
    found = {what: value for what, value in costs.items() if what.split()[0].count("-")}
    assert found == {f"{kind} count": 1, f"{kind} bytes": n_bytes, f"{kind} sent": sent}


def test_of_branches_the_dearer_one_counts():
    branches = "".join(
        f"%branch{n} (p: bf16[8,128]) -> bf16[8,128] {{\n  %p = bf16[8,128]{{1,0}} parameter(0)\n{lines}}}\n\n"
        for n, lines in enumerate(("  ROOT %n = bf16[8,128] negate(%p)\n", "  ROOT %s = bf16[8,128] all-reduce(%p)\n"))
    )
    choice = "ROOT %c = bf16[8,128] conditional(%i, %x, %x), branch_computations={%branch0, %branch1}"
    costs = sum_costs(parse_module(program(X, "%i = s32[] constant(0)", choice, before=branches)), 8)
    assert (costs["all-reduce bytes"], costs["memory"]) == (SIZE, 2 * SIZE)


@pytest.mark.parametrize(
    ("left", "right", "result", "call", "expected"),
    [
        ("4,128,2,32", "4,96,2,32", "4,2,128,96",
         "convolution(%a, %b), window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=0b1f_0o1i->01bf",
         2 * 4 * 2 * 128 * 96 * 32),
        ("4,128,64,1", "64,2,32,1", "4,128,2,32",
         "convolution(%a, %b), window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
         2 * 4 * 128 * 64 * 2 * 32),
        ("2,10,3", "5,3,7", "2,10,7", "convolution(%a, %b), window={size=5 pad=2_2}, dim_labels=b0f_0io->b0f",
         2 * 2 * (10 * 5 - 2 * (1 + 2)) * 3 * 7),
        ("4,8,16", "4,16,24", "4,8,24",
         "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
         2 * 4 * 8 * 16 * 24),
    ],
    ids=["scores of heads", "projection to heads", "window with padding", "dot"],
)  # fmt: skip
def test_matmuls_as_compilers_write_them(left, right, result, call, expected):
    lines = f"%a = f32[{left}] parameter(0)", f"%b = f32[{right}] parameter(1)", f"ROOT %c = f32[{result}] {call}"
    assert sum_costs(parse_module(program(*lines)), 1)["flops"] == expected


@functools.cache
def compile_layers(place: str, n_layers: int, unrolled: bool, dtype=jnp.float32):
    """Weights whose columns lie on four chips, brought together in each layer: for the CPU or for a TPU."""
    mesh = make_line(4) if place == "cpu" else describe_mesh(parse_topology("v5e:2x2"), make_config(mesh_data=4))
    axis = mesh.axis_names[0]
    rows, columns = PartitionSpec(axis), PartitionSpec(None, None, axis)

    def layer(x, w):
        return jnp.tanh(x @ jax.lax.all_gather(w, axis, axis=1, tiled=True)), None

    def layers(x, w):
        return jax.lax.scan(layer, x, w, unroll=n_layers if unrolled else 1)[0]

    split = jax.shard_map(layers, mesh=mesh, in_specs=(rows, columns), out_specs=rows)
    shapes = ((256, 512), rows), ((n_layers, 512, 512), columns)
    arguments = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, p)) for s, p in shapes]
    return jax.jit(split).lower(*arguments).compile()


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(
    ("place", "dtype"), [("cpu", jnp.float32), pytest.param("tpu", jnp.bfloat16, marks=needs_compiler)]
)
def test_traffic_and_operations_are_those_of_the_layers(place, dtype, unrolled):
    n = 6
    costs = sum_costs(parse_module(compile_layers(place, n, unrolled, dtype).as_text()), 4)
    whole = n * 512 * 512 * dtype.dtype.itemsize
    assert (costs["all-gather bytes"], costs["all-gather sent"]) == (whole, whole * 3 / 4)
    assert costs["flops"] == n * 2 * 64 * 512 * 512
    assert costs["unbounded"] == 0


def test_memory_traffic_is_what_xla_counts_where_nothing_loops():
    compiled = compile_layers("cpu", 6, True)
    costs, (expected, *_) = sum_costs(parse_module(compiled.as_text()), 4), [compiled.cost_analysis()]
    assert costs["memory"] == pytest.approx(expected["bytes accessed"], rel=0.02)


def test_a_loop_moves_as_much_as_its_layers():
    loop, layers = (sum_costs(parse_module(compile_layers("cpu", 6, x).as_text()), 4)["memory"] for x in (False, True))
    assert loop == pytest.approx(layers, rel=0.3)
    assert loop > 0.8 * 6 * (512 * 512 * 4 + 2 * 64 * 512 * 4)


# --- slices


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v3:2x2", "v4, v5e, v5p, v6e"),
        ("v5e", "2 sides"),
        ("v5e:2x2x2", "2 sides"),
        ("v5p:4x4", "3 sides"),
        ("v5e:0x4", "2 sides"),
        ("v5e:-2x-2", "2 sides"),
        ("v5e:2x2 ", "2 sides"),
        ("v5e:32x32", "1024 chips; the largest slice of v5e has 256"),
        ("", "v4, v5e, v5p, v6e"),
    ],
)
def test_other_slices_are_refused(name, told):
    with pytest.raises(InputError, match="--topology") as error:
        parse_topology(name)
    assert told in str(error.value)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("v4:2x2x2", (4, 2, 1)), ("v5e:4x4", (2, 8, 1)), ("v5p:4x4x4", (8, 2, 4)), ("v6e:2x4", (1, 1, 8))],
)
def test_a_mesh_has_every_chip_once(name, mesh):
    topology = parse_topology(name)
    shape = dict(zip(("mesh_data", "mesh_expert", "mesh_model"), mesh, strict=True))
    found = describe_mesh(topology, make_config(batch_size=16, **shape))
    assert tuple(found.shape.values()) == mesh
    assert topology.n_chips == math.prod(mesh) == len({device.id for device in found.devices.flat})


@needs_compiler
def test_a_slice_that_the_compiler_does_not_know():
    with pytest.raises(InputError, match=r"v5e:3x3.*knows no such slice"):
        describe_mesh(parse_topology("v5e:3x3"), make_config(batch_size=9, mesh_data=9))


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'moerec\[plan\]'"):
        describe_mesh(parse_topology("v5e:2x2"), make_config(mesh_data=4))


@pytest.mark.parametrize(
    ("reason", "shortage"),
    [
        ("the total memory required for HLO temporaries (32.81G) exceeds available HBM (15.75G).", (32.81, 15.75)),
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity", (17.5, 15.75)),
        ("Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.", None),
    ],
)
def test_the_compilers_words_for_a_shortage(reason, shortage):
    found = read_shortage(reason)
    assert found == (shortage and pytest.approx([x * 2**30 for x in shortage], abs=1))


# --- the command

CONFIG = """from moerec.config import Config, DataConfig, ModelConfig, TextConfig, TrainConfig


def get_config():
    return Config(
        tasks=("lm",),
        data=DataConfig(source="text", seq_len=128, history_len=128),
        model=ModelConfig(
            n_layers=2, d_model=256, n_heads=2, n_kv_heads=1, d_head=128, d_ff=512, text=TextConfig(vocab_size=1024)
        ),
        train=TrainConfig(batch_size=8, mesh_data=2, mesh_model=2),
    )
"""


@pytest.fixture
def call(tmp_path, capsys):
    """Runs the command: its exit code, what it prints, and the object in the last line."""
    (tmp_path / "words.py").write_text(CONFIG)

    def run(*arguments: str):
        argv = ["plan", f"--config={tmp_path / 'words.py'}", "--json", *arguments]
        code = cli.execute(command.main, argv, None, command.FLAGS, workdir=False)
        out, err = capsys.readouterr()
        return code, out + err, json.loads(out.splitlines()[-1]) if code < 2 else None

    return run


@needs_compiler
def test_a_plan_of_a_small_language_model(call):
    code, told, found = call("--topology=v5e:2x2")
    assert (code, found["fits"], found["tokens"]) == (0, True, 1024)
    # Split over `data` where the model width is, over `model` where heads, feed-forward width and words are; norms
    # and the one key head are not.
    norms, biases = 5 * 256, 2 * (256 // 2 + 2 * 128)
    attention, ffn, words = 2 * (2 * 256 * 256 // 4 + 2 * 256 * 128 // 2), 2 * 3 * 256 * 512 // 4, 1024 * 256 // 4
    params = 4 * (norms + biases + attention + ffn + words)
    memory = found["memory"]
    assert memory["params"] == params
    assert memory["optimizer"] == pytest.approx(2 * params, abs=64)  # two moments, and counters
    parts = ("params", "optimizer", "other_arguments", "padding", "temporaries", "unaliased_output", "program")
    assert memory["total"] == sum(memory[part] for part in parts) < memory["chip"] == CHIPS["v5e"].hbm_bytes
    assert abs(memory["padding"]) < 0.05 * params
    # By hand: of a token and layer, then scores and values of its row, then the words; thrice for the gradients.
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512
    forward = 1024 * 2 * (2 * (layer + 2 * 128 * 256) + 1024 * 256)
    assert found["flops"]["model"] == 3 * forward <= found["flops"]["step"]
    assert found["compiled_flops"] >= found["flops"]["step"] / 4 * 0.95
    assert found["step_s"] == max(found["bounds_s"].values())
    assert 0 < found["mfu"] < 1
    assert "fits: needs 0.0" in told


@needs_compiler
def test_a_step_that_does_not_fit_is_an_answer(call):
    code, told, found = call("--topology=v5e:2x2", "--config.train.batch_size=400000", "--config.loss.vocab_chunk=1024")
    assert (code, found["fits"]) == (1, False)
    assert found["memory"]["total"] > found["memory"]["chip"]
    assert "does not fit: needs" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology=v5e:4x4"], "config.train.mesh_data x mesh_expert x mesh_model: 2 x 1 x 2 = 4 chips"),
        (["--topology=v9:2x2"], "'v9:2x2'"),
    ],
)
def test_a_mesh_that_is_no_mesh_of_the_slice_is_refused(call, arguments, told):
    code, printed, _ = call(*arguments)
    assert code == 2
    assert len(printed.splitlines()) == 1
    assert told in printed
