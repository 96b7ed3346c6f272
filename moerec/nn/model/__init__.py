"""The sequence model, and a trained one that answers."""

from moerec.nn.model.calibration import Calibration, pick_calibration, read_calibration
from moerec.nn.model.predictor import Predictor, count_active_params
from moerec.nn.model.sequence import Below, ModelSizes, SequenceModel

__all__ = [
    "Below",
    "Calibration",
    "ModelSizes",
    "Predictor",
    "SequenceModel",
    "count_active_params",
    "pick_calibration",
    "read_calibration",
]
