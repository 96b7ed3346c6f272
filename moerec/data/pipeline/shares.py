"""Which rows of a batch belong to which of the streams that it is mixed of."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple


class RowShares(NamedTuple):
    """The rows of a batch, one stream's behind another's, shared out step by step (error diffusion).

    Stream k is to have the rows from `ends_K[k - 1]` to `ends_K[k]` of each batch, which are no whole numbers. Of the
    batches up to a step together an end stands at its whole part, and the batch of the step has what is new. So after
    any number of steps a stream has had its share of all rows to within one, and in each batch an end is one of the two
    whole numbers beside it. Everything follows from the number of the step, in whole numbers alone.

    Attributes: `names` of the streams; `ends_K` exact, the last one the number of rows.
    """

    names: tuple[str, ...]
    ends_K: tuple[Fraction, ...]

    @classmethod
    def of(cls, shares: Mapping[str, float], n_rows: int) -> "RowShares":
        """Args: shares in any measure, each of which comes to a row at least; rows of a batch."""
        # The decimal that was written is meant, not the binary number beside it: .3 of 10 rows are three.
        exact = {name: Fraction(repr(float(share))) for name, share in shares.items()}
        total, ends, done = sum(exact.values()), [], Fraction(0)
        for share in exact.values():
            done += share
            ends.append(done / total * n_rows)
        return cls(tuple(exact), tuple(ends))

    def split(self, step: int) -> dict[str, int]:
        """Rows of each stream in the batch of a step, from 0."""
        found, before = {}, 0
        for name, end in zip(self.names, self.ends_K, strict=True):
            at = math.floor(end * (step + 1)) - math.floor(end * step)
            found[name], before = at - before, at
        return found

    def span(self, name: str, n_parts: int = 1) -> slice:
        """The rows that may be of a stream in any step, in each of the parts that row r goes to part r % n_parts of."""
        k = self.names.index(name)
        first = math.floor(self.ends_K[k - 1]) if k else 0
        return slice(first // n_parts, -(-math.ceil(self.ends_K[k]) // n_parts))
