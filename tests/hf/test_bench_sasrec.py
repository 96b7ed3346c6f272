"""The SASRec that ours is timed against: at equal weights, batches and draws it has our loss and our gradients."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from moerec.convert.paths import flatten
from moerec.data.load import load_data
from moerec.eval.baselines import sasrec_config
from moerec.eval.bench.sasrec import LOSSES, measure_sasrec, to_torch
from moerec.eval.bench.sasrec_torch import Drawn, TorchSasrec, make_step, pack_arrays, sum_loss
from moerec.tasks import make_tasks
from moerec.train.loop import make_trainer
from moerec.train.step import sum_losses, total_loss
from tests.tiny import make_config


def make_case(kind, folder, **loss):
    config = make_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, first_event=False))
    config = sasrec_config(dataclasses.replace(config, loss=dataclasses.replace(config.loss, **loss)), "torch", kind)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    data = load_data(config.data, folder)
    trainer = make_trainer(config, data)
    with contextlib.closing(iter(trainer.stream)) as stream:
        batch = jax.device_get(next(stream))
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape, np.float32), trainer.state.params)
    return config, data, trainer, batch, params


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_are_ours(kind, chunk, tmp_path):
    config, data, trainer, batch, params = make_case(kind, tmp_path, n_negatives=20, sampling_power=0.5)
    (task,) = tasks = make_tasks(config)
    draws = task.draw(jax.random.key(1), batch, trainer.catalog, trainer.constants[task.name], config)

    def loss(params):
        return total_loss(sum_losses(params, batch, trainer.catalog, tasks, {task.name: draws}, config), config)[0]

    ours, slopes = jax.jit(jax.value_and_grad(loss))(params)
    arrays = {path: np.asarray(x) for path, x in flatten(params).items()}
    other = TorchSasrec(config.model, data.dataset.catalogue.n_items)
    other.load(arrays)
    found = draws.shared if draws.by_row is None else draws.by_row
    drawn = None
    if found is not None:
        item = torch.from_numpy(np.array(found.item_J, np.int64))
        drawn = Drawn(item, None if item.ndim == 2 else torch.from_numpy(np.array(found.correction_J)))
    theirs = sum_loss(other, to_torch(batch), drawn, chunk)
    theirs.backward()
    assert theirs.item() == pytest.approx(float(ours), rel=1e-5)
    expected = pack_arrays({path: np.asarray(x) for path, x in flatten(slopes).items()}, config.model.n_layers)
    gradients = {name: p.grad.numpy() for name, p in other.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, array in expected.items():
        assert np.abs(array).max() > 1e-6, name
        np.testing.assert_allclose(gradients[name], array, atol=2e-5 * np.abs(array).max(), err_msg=name)


def test_a_step_of_theirs_learns_and_both_are_measured(tmp_path):
    config, data, _, batch, _ = make_case("full_softmax", tmp_path)
    model = TorchSasrec(config.model, data.dataset.catalogue.n_items)
    step, slots = make_step(config, model, chunk=64), to_torch(batch)
    losses = [step(slots).item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.2
    (row,) = measure_sasrec(config, tmp_path, ("one_negative",), rounds=1)
    numbers = json.loads(json.dumps(row))
    assert numbers.pop("loss") == "one_negative"
    assert all(value > 0 for value in numbers.values())
