"""The sequence model, and a trained one that answers."""

from moerec.nn.model.calibration import Calibration, pick_calibration, read_calibration
from moerec.nn.model.parts import TEXT_SIZES, Below, ModelSizes
from moerec.nn.model.predictor import Predictor, count_active_params, count_params, count_params_by_part
from moerec.nn.model.sequence import SequenceModel

__all__ = [
    "TEXT_SIZES",
    "Below",
    "Calibration",
    "ModelSizes",
    "Predictor",
    "SequenceModel",
    "count_active_params",
    "count_params",
    "count_params_by_part",
    "pick_calibration",
    "read_calibration",
]
