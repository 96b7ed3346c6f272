"""What is fitted to validation targets after training, since training targets cannot tell it: see `eval.ranking`."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.nn.model.predictor import Predictor

PREFIX = "valid/"
_TEMPERATURE, _GATE = "temperature", "gate"


class Calibration(NamedTuple):
    """Attributes:
    temperature: of the posterior over services, by which answers are weighed.
    gate_shift: float32, added to the biases of the gates of the mixture's components, `[Z, X]` where services are
      asked, else `[X]`; None leaves them as they are.
    """

    temperature: float = 1.0
    gate_shift: np.ndarray | None = None

    def apply(self, predictor: Predictor) -> Predictor:
        """The predictor with it; one that has none yet."""
        predictor = predictor._replace(temperature=self.temperature)
        if self.gate_shift is None:
            return predictor
        params = jax.tree.map(lambda x: x, predictor.params)  # whose modules are others
        assert params.head is not None
        aggregator = params.head.aggregator
        assert aggregator is not None
        aggregator.gate_bias[...] = aggregator.gate_bias[...] + jnp.asarray(self.gate_shift)
        return predictor._replace(params=params)

    def list_metrics(self) -> dict[str, float]:
        """As metrics of a validation."""
        found = {PREFIX + _TEMPERATURE: float(self.temperature)}
        if self.gate_shift is not None:
            for place in np.ndindex(self.gate_shift.shape):
                name = "/".join(map(str, (_GATE, *place)))
                found[PREFIX + name] = float(self.gate_shift[place])
        return found


def pick_calibration(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of a validation's metrics that are of the calibration."""
    kept = (PREFIX + _TEMPERATURE, f"{PREFIX}{_GATE}/")
    return {name: value for name, value in metrics.items() if name.startswith(kept)}


def read_calibration(metrics: Mapping[str, float]) -> Calibration:
    """What `list_metrics` told; nothing is calibrated where there is nothing of it.

    Raises:
      ValueError: the numbers are not those of a calibration.
    """
    places = {}
    for name, value in metrics.items():
        kind, *place = name.removeprefix(PREFIX).split("/")
        if kind == _GATE:
            places[tuple(map(int, place))] = value
    temperature = metrics.get(PREFIX + _TEMPERATURE, 1.0)
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"{PREFIX + _TEMPERATURE} is {temperature}")
    if not places:
        return Calibration(temperature)
    shape = tuple(max(axis) + 1 for axis in zip(*places, strict=True))
    shift = np.full(shape, np.nan, np.float32)
    for at, value in places.items():
        shift[at] = value
    if not np.all(np.isfinite(shift)):
        raise ValueError(f"{PREFIX}{_GATE} does not hold {' x '.join(map(str, shape))} numbers")
    return Calibration(temperature, shift)
