"""A text model that goes on with prompts: in batches, by two programs, with weights as decoding reads them."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moerec.errors import InputError
from moerec.nn.model import SequenceModel
from moerec.serve.generate.behind import pad_left
from moerec.serve.generate.cache import round_up, size_cache
from moerec.serve.generate.matmul import count_bytes
from moerec.serve.generate.programs import CHUNK, NOTHING, Limits, Programs, Whole
from moerec.serve.generate.sampling import Draw, Sampling
from moerec.serve.generate.weights import make_weights
from moerec.types import Batch, Catalog
from pallas_kernels.attention import LIBRARIES

LEAST_PROMPT = 16  # the smallest bucket of prompts
STREAMED = 8  # tokens between two calls of a callback
GREEDILY = Sampling()


class Generated(NamedTuple):
    """Attributes:
    tokens: int32 `[n]`, what follows the prompt, without the stop token.
    finish: `stop` (a stop token), `length` (as many as were asked for) or `context` (the model's context is full).
    """

    tokens: np.ndarray
    finish: str


@dataclasses.dataclass
class Timing:
    """Seconds of all calls so far, without compilation. Attributes: n_prompt, n_made: tokens read and made."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    n_prompt: int = 0
    n_made: int = 0


Callback = Callable[[int, list[int]], None]


class Generator:
    """What goes on with prompts; the model itself can be dropped.

    Args:
      router_bias_LE: of the training state; None for zeros.
      dtype: in which it computes; None: `model.compute_dtype`.
      is_quantized: matrices are whole numbers of a byte, multiplied as such.
      mesh: of `moerec.nn.sharding.make_mesh`, heads over `model` and rows over `data` and `expert`; None: one device.
      n_context: tokens of prompt and answer together, at most; 0: no limit.
      catalog: bound to the model, for text behind events (`generate_behind`), which keeps the whole model.

    Raises:
      InputError: the model has no text head.
    """

    def __init__(
        self,
        model: SequenceModel,
        router_bias_LE: jax.Array | None = None,
        *,
        dtype: str | None = None,
        is_quantized: bool = False,
        mesh: Mesh | None = None,
        n_context: int = 0,
        catalog: Catalog | None = None,
    ):
        dtype = dtype or model.config.compute_dtype
        # What a run was trained through may not take another type.
        attention = "auto" if model.config.attention in LIBRARIES else model.config.attention
        self.config = dataclasses.replace(model.config, compute_dtype=dtype, dropout=0.0, attention=attention)
        self.weights = make_weights(model, router_bias_LE, dtype, is_quantized, mesh)
        self.programs = Programs(self.config, mesh)
        self.timing = Timing()
        self.n_context = n_context
        self._whole = None if catalog is None or mesh is not None else Whole(model, router_bias_LE, catalog)
        self._least_rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]

    @property
    def n_bytes(self) -> int:
        """What the weights take."""
        return count_bytes(self.weights)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        sampling: Sampling = GREEDILY,
        stop: Sequence[int] = (),
        callback: Callback | None = None,
        batch_size: int = 16,
    ) -> list[Generated]:
        """What follows each prompt.

        Args:
          prompts: int32 `[n]` token ids each, of any lengths. stop: ids at which an answer ends.
          callback: is called with a prompt's number and its next tokens, a few at a time.
          batch_size: prompts that are answered at once, those of about one length together.

        Raises:
          InputError: a prompt is empty, is not shorter than the context, or holds what is no token; so does `stop`.
        """
        prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
        self._check(prompts, max_new_tokens, stop)
        earlier: dict[bytes, int] = {}
        turns = []
        for prompt in prompts:
            turns.append(earlier.get(prompt.tobytes(), 0))
            earlier[prompt.tobytes()] = turns[-1] + 1
        found: dict[int, Generated] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), batch_size):
            own = order[first : first + batch_size]
            batch = [prompts[i] for i in own], [turns[i] for i in own]
            tell = None if callback is None else lambda row, new, own=own: callback(own[row], new)
            found |= dict(zip(own, self._run(*batch, max_new_tokens, sampling, stop, tell), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _check(self, prompts: list[np.ndarray], max_new_tokens: int, stop: Sequence[int]) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: must be at least 1, not {max_new_tokens}")
        n_vocab = self.config.text.vocab_size
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompt {i + 1}: is empty")
            if self.n_context and len(prompt) >= self.n_context:
                raise InputError(f"prompt {i + 1}: has {len(prompt)} tokens; the model's context is {self.n_context}")
            if prompt.min() < 0 or prompt.max() >= n_vocab:
                bad = int(prompt.min() if prompt.min() < 0 else prompt.max())
                raise InputError(f"prompt {i + 1}: {bad} is no token; the vocabulary has {n_vocab}")
        bad_stop = [token for token in stop if not 0 <= token < n_vocab]
        if bad_stop:
            raise InputError(f"stop: {bad_stop[0]} is no token; the vocabulary has {n_vocab}")

    def _run(
        self,
        prompts: list[np.ndarray],
        turns: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[int],
        callback: Callback | None,
    ) -> list[Generated]:
        """One batch."""
        n_rows = self._least_rows * round_up(-(-len(prompts) // self._least_rows))
        length_B = np.zeros(n_rows, np.int32)
        length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
        n_places = round_up(int(length_B.max()), LEAST_PROMPT)
        token_BT = np.zeros((n_rows, n_places), np.int32)
        for row, prompt in enumerate(prompts):
            token_BT[row, n_places - len(prompt) :] = prompt
        turn_B = np.zeros(n_rows, np.uint32)
        turn_B[: len(prompts)] = turns
        read = functools.partial(self.programs.prefill, self.weights, token_BT)
        return self._go_on(read, n_places, length_B, turn_B, max_new_tokens, sampling, stop, callback)[: len(prompts)]

    def generate_behind(
        self,
        batch: Batch,
        max_new_tokens: int,
        sampling: Sampling = GREEDILY,
        stop: Sequence[int] = (),
        callback: Callback | None = None,
        batch_size: int = 16,
    ) -> list[Generated]:
        """What follows sequences of events and words, each of which ends with a word.

        Args: a batch whose rows hold one sequence each; the rest as of `generate`.

        Raises:
          InputError: a row holds none or several; its last slot is an event or a control token; the generator was made
            without a catalogue; or it is on a mesh.
        """
        if self._whole is None:
            raise InputError("text behind events: needs the catalogue of the run, and one device")
        self._check([], max_new_tokens, stop)
        batch = jax.tree.map(np.asarray, batch._replace(targets={}))
        turn_B, found = _count_turns(batch), []
        for lo in range(0, len(turn_B), batch_size):
            part = slice(lo, lo + batch_size)
            tell = None if callback is None else functools.partial(_tell_later, callback, lo)
            rows = jax.tree.map(lambda x, part=part: x[part], batch)
            found += self._go_on_behind(rows, turn_B[part], max_new_tokens, sampling, stop, tell, lo)
        return found

    def _go_on_behind(
        self,
        batch: Batch,
        turn_B: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[int],
        callback: Callback | None,
        first: int,
    ) -> list[Generated]:
        """Args: a part of the batch of `generate_behind`, and the number of its first prompt."""
        assert self._whole is not None
        n_places = round_up(int((np.asarray(batch.segment_BT) > 0).sum(axis=1).max()), LEAST_PROMPT)
        n_rows = round_up(batch.kind_BT.shape[0])
        padded, length_B = pad_left(batch, n_rows, n_places, first)
        if self.n_context and length_B.max() >= self.n_context:
            raise InputError(f"prompts: {length_B.max()} slots; the model's context is {self.n_context}")
        read = functools.partial(self.programs.read, self.weights, self._whole, padded)
        turns = np.zeros(n_rows, np.uint32)
        turns[: len(turn_B)] = turn_B
        answers = self._go_on(read, n_places, length_B, turns, max_new_tokens, sampling, stop, callback)
        return answers[: batch.kind_BT.shape[0]]

    def _go_on(
        self,
        read: Callable[..., Any],
        n_places: int,
        length_B: np.ndarray,
        turn_B: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[int],
        callback: Callback | None,
    ) -> list[Generated]:
        """Reads prompts with a program, and makes tokens. Args: slots of each sequence, 0 of rows that are none."""
        n_left_B = np.where(length_B > 0, self.n_context - length_B if self.n_context else max_new_tokens, 0)
        most_B = np.minimum(n_left_B, max_new_tokens).astype(np.int32)
        stop_X = np.full(round_up(len(stop), 4), NOTHING, np.int32)
        stop_X[: len(stop)] = stop
        scalars = np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p)
        draw = Draw(*scalars, np.uint32(sampling.seed), turn_B)
        limits, kind = Limits(most_B, stop_X), sampling.kind
        n_slots = size_cache(n_places + int(most_B.max()), self.config.window)

        clock = _Clock(self.programs)
        cache, behind, progress, made_BX = read(n_places - length_B, draw, limits, n_slots=n_slots, kind=kind)
        made, done_B = self._collect([], made_BX, progress.done_B, callback)
        self.timing.prefill_s += clock.lap()
        while not done_B.all():
            step = progress, draw, limits, CHUNK if callback is None else STREAMED, behind
            cache, progress, made_BX = self.programs.decode(self.weights, cache, *step, kind=kind)
            made, done_B = self._collect(made, made_BX, progress.done_B, callback)
        self.timing.decode_s += clock.lap()
        answers = [row[row != NOTHING] for row in np.concatenate(made, axis=1)]
        self.timing.n_prompt += int(length_B.sum())
        self.timing.n_made += sum(map(len, answers))
        found = []
        for answer, most in zip(answers, most_B, strict=True):
            end = "stop" if len(answer) < most else "length" if most == max_new_tokens else "context"
            found.append(Generated(answer, end))
        return found

    @staticmethod
    def _collect(
        made: list[np.ndarray], made_BX: jax.Array, done_B: jax.Array, callback: Callback | None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The blocks of tokens with a new one, and which rows are done; whoever listens is told."""
        block, done = jax.device_get((made_BX, done_B))
        for row, new in enumerate(block):
            if callback is not None and (new != NOTHING).any():
                callback(row, new[new != NOTHING].tolist())
        return [*made, block], done


def _count_turns(batch: Batch) -> np.ndarray:
    """`[B]`, how many rows that are equal to each stand before it."""
    earlier: dict[bytes, int] = {}
    turns = np.zeros(batch.kind_BT.shape[0], np.uint32)
    for row in range(len(turns)):
        whole = b"".join(x[row].tobytes() for x in jax.tree.leaves(batch))
        turns[row] = earlier[whole] = earlier.get(whole, -1) + 1
    return turns


def _tell_later(callback: Callback, first: int, number: int, tokens: list[int]) -> None:
    callback(first + number, tokens)


class _Clock:
    """Seconds since the last lap, without those of compilation."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._last = self._now()

    def _now(self) -> float:
        return time.monotonic() - self._programs.compile_s

    def lap(self) -> float:
        now, before = self._now(), self._last
        self._last = now
        return now - before
