"""The city: a synthetic world of several services whose exact posterior predictive is computable (`data/oracle.py`)."""

from moerec.data.city.simulate import generate
from moerec.data.city.world import Truth, World, make_world

__all__ = ["Truth", "World", "generate", "make_world"]
