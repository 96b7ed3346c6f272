"""Our training step of a language model against that of `transformers` on PyTorch: equal weights, batches, targets and
optimiser, in turns.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moerec.config import Config, MoEConfig
from moerec.data.text.corpus import Corpus, load_corpus
from moerec.data.text.stream import TokenReader
from moerec.errors import InputError
from moerec.eval.language import list_batches, measure_nats
from moerec.nn.model import count_active_params, count_params
from moerec.nn.sharding import mesh_of
from moerec.train.base_model.hf_export import write_model
from moerec.train.loop import Trainer, make_trainer
from moerec.train.optim import make_schedule
from moerec.train.state import make_predictor
from moerec.types import Batch

EXPERTS = ("eager", "batched_mm", "grouped_mm")  # how `transformers` runs its experts; the first one is a loop
# 16 experts of which a slot goes to two, and one that sees every slot: the shape of a Qwen2-MoE, at the config's width.
MIXTURE: dict[str, Any] = {
    "services": False,
    "n_per_group": 16,
    "n_active": 2,
    "reads_domain": False,
    "renormalise": False,
    "shared_gate": True,
    "bias_rate": 0.0,
}
Step = Callable[[Batch], float]  # trains on a batch; the mean loss of its targets in nats


def require_transformers() -> None:
    """Raises: InputError, where PyTorch or `transformers` is not installed."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)}: not installed; this is a comparison (pip install 'moerec[hf]')")


def require_comparable(config: Config, has_experts: bool) -> None:
    """Raises: InputError, where a field of the config would be obeyed by our side alone."""
    wanted = {
        "data.source": (config.data.source, "text"),
        "tasks": (tuple(config.tasks), ("lm",)),
        "model.dropout": (config.model.dropout, 0.0),
        "model.compute_dtype": (config.model.compute_dtype, "float32"),
        "optim.ema_decay": (config.optim.ema_decay, 0.0),
        "optim.groups": (tuple(config.optim.groups), ()),
        "optim.decay_embeddings": (config.optim.decay_embeddings, False),
        "train.n_microbatches": (config.train.n_microbatches, 1),
    }
    if not has_experts:
        wanted["model.moe.layers"] = (tuple(config.model.moe.layers), ())
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise InputError(f"config.{name}: {value!r}; the comparison needs {needed!r}")


def with_experts(config: Config) -> Config:
    """The config with a mixture in place of each feed-forward layer, whose active parameters are as many.

    Our balance losses are switched off: those of `transformers` are, too, unless they are asked for.
    """
    width = config.model.d_ff // 4
    moe = MoEConfig(layers=tuple(range(config.model.n_layers)), d_expert=width, d_shared=2 * width, **MIXTURE)
    loss = dataclasses.replace(config.loss, balance_weight=0.0, domain_balance_weight=0.0, router_z_weight=0.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe), loss=loss)


def measure_language(
    config: Config, workdir: Path, steps: int, seeds: Sequence[int], experts: Sequence[str] = ("eager",)
) -> dict[str, Any]:
    """Rows for each seed and each way of `transformers` to run its experts, and what both had: threads, types.

    A row has tokens a second of both (the median step after the first two, on the clock), `ratio` (ours to theirs), and
    of both the mean loss of the last tenth of the steps and that of the held-out documents, in nats a token.

    Args:
      steps: as many are trained, with the schedule of a run of that length.
      seeds: of initial weights and batches.
      experts: of `EXPERTS`; a dense model has none, and one row a seed.

    Raises:
      InputError: PyTorch or `transformers` is not installed, or the documents cannot be used.
    """
    require_transformers()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    corpus, rows = load_corpus(config.data, workdir, config.model.text.vocab_size), []
    if not corpus.is_valid.any():
        raise InputError("config.data.corpus.valid_fraction: no document is held out, by which both are measured")
    for seed in seeds:
        own = dataclasses.replace(config, seed=seed, train=dataclasses.replace(config.train, steps=steps))
        trainer = make_trainer(own, corpus)
        n_params = {"n_params": count_params(trainer.state.params)}
        n_params["n_active_params"] = count_active_params(trainer.state.params)
        with tempfile.TemporaryDirectory() as folder:
            write_model(trainer.state.params, Path(folder) / "model")
            others = {name: _Theirs(own, Path(folder) / "model", name) for name in experts}
        rows += [{"seed": seed, **n_params, **row} for row in _train_in_turns(own, corpus, trainer, others, steps)]
    said = {"threads": torch.get_num_threads(), "dtype": "float32", "attention": "sdpa"}
    return {"rows": rows, "torch": said | {"version": torch.__version__}}


def _train_in_turns(
    config: Config, corpus: Corpus, trainer: Trainer, others: Mapping[str, "_Theirs"], steps: int
) -> list[dict[str, Any]]:
    ours = _Ours(config, trainer)
    calls: dict[str, Step] = {"ours": ours.step, **{name: other.step for name, other in others.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    losses: dict[str, list[float]] = {name: [] for name in calls}
    with contextlib.closing(iter(trainer.stream)) as stream:
        batches = list(itertools.islice(stream, steps))
    for n, batch in enumerate(batches):
        host = jax.device_get(batch)
        for name in list(calls) if n % 2 else reversed(list(calls)):
            started = time.perf_counter()
            losses[name].append(calls[name](batch if name == "ours" else host))
            seconds[name].append(time.perf_counter() - started)
    n_tokens = config.train.batch_size * config.data.seq_len
    per_s = {name: n_tokens / float(np.median(x[2:])) for name, x in seconds.items()}
    last = {name: float(np.mean(x[-max(steps // 10, 1) :])) for name, x in losses.items()}
    nats, held_out = ours.measure(corpus), _list_held_out(config, corpus)
    return [
        {
            "experts": name if config.model.moe.layers else None,
            "tokens_per_s": per_s["ours"],
            "torch_tokens_per_s": per_s[name],
            "ratio": per_s["ours"] / per_s[name],
            "first_loss": losses["ours"][0],
            "torch_first_loss": losses[name][0],
            "last_loss": last["ours"],
            "torch_last_loss": last[name],
            "held_out": nats,
            "torch_held_out": other.measure(held_out),
        }
        for name, other in others.items()
    ]


def _list_held_out(config: Config, corpus: Corpus) -> list[Batch]:
    shape = config.train.batch_size, config.data.history_len
    return list(list_batches(TokenReader(corpus, valid=True), shape, config.train.n_valid))


class _Ours:
    def __init__(self, config: Config, trainer: Trainer):
        self._config, self._trainer, self._state = config, trainer, trainer.begin(trainer.state, config)

    def step(self, batch: Batch) -> float:
        with mesh_of(self._state):
            self._state, metrics = self._trainer.step(self._state, batch)
        return float(metrics["loss"])

    def measure(self, corpus: Corpus) -> float:
        predictor = make_predictor(self._state)
        batches = iter(_list_held_out(self._config, corpus))
        with mesh_of(self._state):
            return measure_nats(self._config, predictor, batches, self._trainer.catalog)[0]


class _Theirs:
    """A model of `transformers` and AdamW, as their documentation puts them together."""

    def __init__(self, config: Config, folder: Path, experts: str):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        own: dict[str, Any] = {"attn_implementation": "sdpa", "experts_implementation": experts}
        if not config.model.moe.layers:
            del own["experts_implementation"]
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **own
        ).train()
        schedule = make_schedule(config.optim, config.train.steps)
        self._clip, self._rates = config.optim.clip_norm, [float(schedule(n)) for n in range(config.train.steps)]
        named = dict(self.model.named_parameters())
        decayed = [
            p for name, p in named.items() if p.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name
        ]
        others = [p for p in named.values() if all(p is not q for q in decayed)]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.optim.weight_decay},
            {"params": others},
        ]
        betas = config.optim.b1, config.optim.b2
        self._adam = torch.optim.AdamW(groups, config.optim.learning_rate, betas, weight_decay=0.0, fused=True)

    def step(self, batch: Batch) -> float:
        import torch

        rate = self._rates.pop(0)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.zero_grad(set_to_none=True)
        total, n = self._sum_loss(batch)
        loss = total / n
        loss.backward()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip, foreach=True)
        self._adam.step()
        return float(loss.detach())

    def measure(self, batches: Sequence[Batch]) -> float:
        """Nats a token."""
        import torch

        self.model.eval()
        with torch.no_grad():
            found = [self._sum_loss(batch) for batch in batches]
        return sum(float(total) for total, _ in found) / sum(n for _, n in found)

    def _sum_loss(self, batch: Batch) -> tuple[Any, int]:
        import torch
        from torch.nn import functional

        whole = functools.partial(np.array, dtype=np.int64)
        token, position, segment = (
            torch.from_numpy(whole(x)) for x in (batch.token_BT, batch.position_BT, batch.segment_BT)
        )
        target = batch.targets["lm"]
        label = torch.from_numpy(np.where(np.array(target.weight_BT) > 0, whole(target.label_BT), -100))
        same = segment[:, None, :, None] == segment[:, None, None, :]
        mask = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        logits = self.model(input_ids=token, position_ids=position, attention_mask=mask, use_cache=False).logits
        total = functional.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=-100, reduction="sum")
        return total, int((label >= 0).sum())
