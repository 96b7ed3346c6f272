"""The sequence model, and a trained one that answers."""

from moerec.nn.model.predictor import Predictor, count_active_params
from moerec.nn.model.sequence import Below, ModelSizes, SequenceModel

__all__ = ["Below", "ModelSizes", "Predictor", "SequenceModel", "count_active_params"]
