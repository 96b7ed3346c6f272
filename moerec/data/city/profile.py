"""What users say about themselves: partial, noisy views of their shared taste type.

Each field of `names.ASPECTS` is missing with `profile_missing_rate`; otherwise it is, with `profile_noise_rate`, a
uniformly drawn value, and else the value of the user's shared type.
"""

import numpy as np

from moerec.data.city import names
from moerec.data.city.world import World


def draw_profile(world: World, rng: np.random.Generator, type_P: np.ndarray) -> dict[str, np.ndarray]:
    """Field -> `[users]` unicode, the empty string where missing."""
    config, n = world.config, len(type_P)
    profile = {}
    for field, values in names.ASPECTS.items():
        noisy = rng.random(n) < config.profile_noise_rate
        value = np.where(noisy, rng.integers(len(values), size=n), world.aspect_K[field][type_P])
        missing = rng.random(n) < config.profile_missing_rate
        profile[field] = np.where(missing, "", np.array(values)[value])
    return profile


def profile_likelihood(world: World, profile: dict[str, np.ndarray], users: np.ndarray) -> np.ndarray:
    """`[len(users), K]`: probability of the observed fields given the shared type (up to a constant per user)."""
    noise = world.config.profile_noise_rate
    likelihood = np.ones((len(users), world.n_types))
    for field, values in names.ASPECTS.items():
        observed = profile[field][users]
        index = np.argmax(observed[:, None] == np.array(values)[None], axis=1)
        matches = index[:, None] == world.aspect_K[field][None]
        given = noise / len(values) + (1 - noise) * matches
        likelihood *= np.where((observed == "")[:, None], 1.0, given)
    return likelihood
