"""The exact predictive of a tiny city by brute force, written from its equations alone."""

import itertools
import math

import numpy as np

from moerec.data.city import names

CATEGORIES = list(names.CATEGORIES.values())


def normalise(logits):
    weights = [math.exp(x) for x in logits]
    return [x / sum(weights) for x in weights]


class Enumeration:
    """The module docstrings of `city/world.py` and `city/dynamics.py` in scalars.

    Sums over shared type, types by kind and needs. `met` collects the laws that an order in a prediction's past obeyed.
    """

    def __init__(self, world, dataset, use_profile=False):
        self.world, self.log, self.use_profile, self.profile = world, dataset.log, use_profile, dataset.profile
        self.config, self.n = world.config, world.config.items_per_service
        self.openings, self.names = dataset.context.get("open", ()), dataset.catalogue.services
        self.n_needs, self.n_types = len(world.need_base_N), len(world.type_prior_K)
        self.met = set()

    def values(self, e):
        stamp = self.log.time_us[e].astype("datetime64[us]").item()
        hour, month = stamp.hour, stamp.month
        weather, temperature, holiday = (int(c) for c in self.log.context[e, :3])
        return {
            "daypart": 0 if hour < 6 else 1 if hour < 11 else 2 if hour < 17 else 3,
            "weekday": int(stamp.weekday() >= 5),
            "season": month % 12 // 3,
            "weather": weather,
            "temperature": temperature,
            "holiday": holiday,
        }

    def needs(self, e, previous):
        w, value = self.world, self.values(e)
        gap = 0 if previous is None else (self.log.time_us[e] - self.log.time_us[e - 1]) / 86_400e6
        return normalise(
            w.need_base_N[n]
            + self.config.kappa * sum(w.need_when[f][value[f], n] for f in w.need_when)
            + (0 if previous is None else self.config.tau / (1 + gap / 4) * w.need_after_NN[previous, n])
            for n in range(self.n_needs)
        )

    def services(self, e, n):
        when = self.world.service_when_DZ[self.values(e)["daypart"]]
        opened = [True] * len(self.names)
        if self.log.context.shape[1] > 3 and self.log.context[e, 3]:
            word, name = self.openings[self.log.context[e, 3] - 1].split()
            opened = [(service == name) == (word == "only") for service in self.names]
        closed = [0 if is_open else -1e9 for is_open in opened]
        return normalise(
            self.world.service_fit_NZ[n, z] + self.config.kappa * when[z] + closed[z] for z in range(len(self.names))
        )

    def days(self, e, earlier):
        return (self.log.time_us[e] - self.log.time_us[earlier]) / 86_400e6

    def food(self, e, past, i):
        same = [k for k in past if self.log.item[k] == i]
        at = [k for k in past if all(self.values(k)[f] == self.values(e)[f] for f in ("daypart", "weekday"))]
        if not same:
            return 0
        self.met.add("streak")
        utility = 2.0 * math.exp(-self.days(e, same[-1]) / 2)
        if at and self.log.item[at[-1]] == i:
            self.met.add("routine")
            utility += 3.0 * math.exp(-self.days(e, same[-1]) / 28)
        return utility

    def marketplace(self, e, past, i, z):
        w, utility = self.world, 0
        if i in self.log.item[past]:
            self.met.add("owned")
            utility -= 4.0
        if past:
            last = self.log.item[past[-1]]
            if w.tables.follow_ZCC[z, w.category_I[last], w.category_I[i]] == w.place_I[i]:
                self.met.add("follow")
                utility += 2.5 * math.exp(-self.days(e, past[-1]) / 14)
            if w.price_I[last] == 2:
                self.met.add("thrift")
                utility -= 0.8 * w.price_I[i]
        return utility

    def health(self, e, past, i, z):
        w, c = self.world, self.world.category_I[i]
        utility = 1.2 * w.tables.season_ZSCV[z, self.values(e)["season"], c, w.variety_I[i]]
        same = [k for k in past if self.log.item[k] == i]
        if same:
            days, lasts = self.days(e, same[-1]), w.tables.refill_ZC[z, c]
            utility += 3.5 * math.exp(-((days - lasts) ** 2) / (2 * (0.15 * lasts) ** 2))
            utility -= 2.5 if days < lasts / 2 else 0
            self.met.add("early" if days < lasts / 2 else "refill" if abs(days - lasts) < 0.15 * lasts else "late")
        return utility

    def own(self, e, start, z, i):
        past = [k for k in range(start, e) if self.log.item[k] // self.n == z]
        kind = z % 3
        return self.food(e, past, i) if kind == 0 else (self.marketplace, self.health)[kind - 1](e, past, i, z)

    def items(self, e, start, n, z, s):
        w, value = self.world, self.values(e)
        last = {}
        for i in self.log.item[start:e]:
            if i // self.n == z:
                last[w.category_I[i]] = i
        logits = []
        for i in range(z * self.n, (z + 1) * self.n):
            c = w.category_I[i]
            u = w.need_fit_NC[n, c] + w.brand_taste_KR[s, w.brand_I[i]] + w.popularity_I[i]
            u += 2.8 if w.aspect_K[CATEGORIES[c].aspect][s] == w.variety_I[i] else 0
            u -= 1.5 * abs(int(w.aspect_K["budget"][s]) - int(w.price_I[i]))
            u += self.config.kappa * sum(table[value[f], c] for f, table in w.category_when.items())
            if c in last:
                u += self.config.habit * 0.8 * (w.brand_I[last[c]] == w.brand_I[i])
                u += self.config.habit * w.repeat_C[c] * (last[c] == i)
            if self.config.own_dynamics:
                u += self.config.own_dynamics * self.own(e, start, z, i)
            logits.append(u)
        return normalise(logits)

    def fields(self, user, u):
        noise, product = self.config.profile_noise_rate, 1.0
        for field, values in names.ASPECTS.items():
            if self.use_profile and self.profile[field][user]:
                hit = self.profile[field][user] == values[self.world.aspect_K[field][u]]
                product *= noise / len(values) + (1 - noise) * hit
        return product

    def predict(self, user, t):
        """The predictive over all items of the user's event `t`, by sums over all latent paths."""
        w, start = self.world, int(self.log.offsets[user])
        prior, rho = w.type_prior_K, self.config.rho
        events = range(start, start + t + 1)
        services = range(len(self.names))
        total = np.zeros(len(services) * self.n)
        item = [(int(self.log.item[e]) // self.n, int(self.log.item[e]) % self.n) for e in events]
        service = {(e, n): self.services(e, n) for e in events for n in range(self.n_needs)}
        chosen = {
            (e, n, z, s): self.items(e, start, n, z, s)
            for e in events for n in range(self.n_needs) for z in services for s in range(self.n_types)
        }  # fmt: skip
        chain = {(e, p): self.needs(e, p) for e in events for p in ([None] if e == start else range(self.n_needs))}
        for u, *types in itertools.product(range(self.n_types), repeat=4):
            weight = prior[u] * self.fields(user, u)
            for s in types:
                weight *= rho * (s == u) + (1 - rho) * prior[s]
            for path in itertools.product(range(self.n_needs), repeat=t + 1):
                probability = weight
                for k, e in enumerate(events):
                    probability *= chain[e, path[k - 1] if k else None][path[k]]
                    if k < t:
                        z, position = item[k]
                        probability *= service[e, path[k]][z] * chosen[e, path[k], z, types[z % 3]][position]
                for z in services:
                    share = probability * service[e, path[t]][z]
                    total[z * self.n : (z + 1) * self.n] += share * np.array(chosen[e, path[t], z, types[z % 3]])
        return total / total.sum()
