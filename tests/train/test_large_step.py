"""The step of a real shape, all its layers and its whole vocabulary, compiled for a TPU slice."""

import dataclasses
import pathlib

import pytest

from moerec.config import cli
from moerec.nn.model import TEXT_SIZES
from moerec.train.plan import describe_mesh, parse_topology, plan_step

ROOT = pathlib.Path(__file__).resolve().parents[2]
N_PARAMS = 494_032_768  # of Qwen2-0.5B


def test_a_step_of_half_a_billion_parameters_fits_four_chips():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (the extra plan)")
    config = cli.load_config(str(ROOT / "configs" / "qwen2_0p5b.py"))
    # Shorter rows than it trains on: what takes time to compile grows with them.
    data = dataclasses.replace(config.data, seq_len=256, history_len=256)
    config = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, batch_size=4))
    topology = parse_topology("v5e:2x2")
    found = plan_step(config, TEXT_SIZES, topology, describe_mesh(topology, config))
    memory = found["memory"]
    assert found["fits"]
    assert 4 * memory["params"] == pytest.approx(4 * N_PARAMS, rel=2e-3)  # float32; biases and norms are on every chip
    assert memory["optimizer"] == pytest.approx(2 * memory["params"], rel=1e-3)
    # Forward and backward of every matrix for each of 1,024 slots, attention and the norms beside them.
    assert found["flops"]["model"] == pytest.approx(6 * N_PARAMS * 1024, rel=0.1)
    assert found["flops"]["step"] > found["flops"]["model"]
    assert found["collectives"]["all-gather"]["bytes"] > 0
