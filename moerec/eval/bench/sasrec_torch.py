"""A packed SASRec of our shape in PyTorch (the extra hf), as a trainer who knows it writes one: what ours is timed by.

Projections are fused, attention is PyTorch's own over packed rows, the softmax losses form their gradients chunk by
chunk in the forward pass, and AdamW, clipping and the average run over all tensors at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from moerec.config import Config, ModelConfig

Batch = dict[str, torch.Tensor]  # item, position, segment, target (int64) and weight, [B, T] each


class Drawn(NamedTuple):
    """Negatives: `item` `[J]` for all slots, with `correction` `[J]`; or `[B, T]`, one a slot."""

    item: torch.Tensor
    correction: torch.Tensor | None = None


class _Layer(torch.nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        n, k, h, d = config.n_heads, config.n_kv_heads, config.d_head, config.d_model
        self.attention_norm = torch.nn.RMSNorm(d, config.norm_eps)
        self.qkv = torch.nn.Linear(d, (n + 2 * k) * h, bias=config.qkv_bias)
        self.out = torch.nn.Linear(n * h, d, bias=False)
        self.ffn_norm = torch.nn.RMSNorm(d, config.norm_eps)
        self.gate_up = torch.nn.Linear(d, 2 * config.d_ff, bias=False)
        self.down = torch.nn.Linear(config.d_ff, d, bias=False)
        self.heads, self.d_head, self.rate = (n, k, k), h, config.dropout

    def forward(self, x_BTD, cos_TH, sin_TH, mask_BTS):
        b, t, _ = x_BTD.shape
        heads = self.qkv(self.attention_norm(x_BTD)).view(b, t, -1, self.d_head).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        q, k = (x * cos_TH + _turn(x) * sin_TH for x in (q, k))
        is_grouped = self.heads[0] != self.heads[1]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTS, enable_gqa=is_grouped)
        y = self.out(y.transpose(1, 2).reshape(b, t, -1))
        x_BTD = x_BTD + functional.dropout(y, self.rate, self.training)
        gate, up = self.gate_up(self.ffn_norm(x_BTD)).chunk(2, dim=-1)
        y = self.down(functional.silu(gate) * up)
        return x_BTD + functional.dropout(y, self.rate, self.training)


def _turn(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class TorchSasrec(torch.nn.Module):
    """Item rows, decoder layers and a head that shares the rows, as `moerec.eval.baselines.sasrec_config` has them."""

    frequency: torch.Tensor

    def __init__(self, config: ModelConfig, n_items: int):
        super().__init__()
        self.rows = torch.nn.Embedding(n_items, config.d_model)
        self.input_norm = torch.nn.RMSNorm(config.d_model, config.norm_eps)
        self.layers = torch.nn.ModuleList(_Layer(config) for _ in range(config.n_layers))
        self.final_norm = torch.nn.RMSNorm(config.d_model, config.norm_eps)
        half = config.d_head // 2
        self.register_buffer("frequency", config.rope_theta ** (-torch.arange(half) / half))
        self.rate = config.dropout

    def forward(self, batch: Batch) -> torch.Tensor:
        """`[B T, D]` states."""
        angle = batch["position"][:, None, :, None] * self.frequency
        cos, sin = (f(angle).repeat(1, 1, 1, 2) for f in (torch.cos, torch.sin))
        segment, t = batch["segment"], batch["segment"].shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        mask = (segment[:, None, :, None] == segment[:, None, None, :]) & causal
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)  # once for all layers
        x = functional.dropout(self.input_norm(self.rows(batch["item"])), self.rate, self.training)
        for layer in self.layers:
            x = layer(x, cos, sin, bias)
        return self.final_norm(x).flatten(0, 1)

    def load(self, params: dict[str, np.ndarray]) -> None:
        """Takes weights of ours, by their paths (`moerec.convert.paths.flatten`)."""
        with torch.no_grad():
            for name, array in pack_arrays(params, len(self.layers)).items():
                self.get_parameter(name).copy_(torch.from_numpy(array))


def pack_arrays(params: dict[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """Arrays of ours (weights or gradients, by their paths) under the names, and in the layouts, of `TorchSasrec`."""
    found = {"rows.weight": params["item_encoder/row_ID"]}
    found |= {f"{name}.weight": params[f"{name}/scale"] for name in ("input_norm", "final_norm")}
    for layer in range(n_layers):
        own = {path.removeprefix("groups/0/"): x[layer] for path, x in params.items() if path.startswith("groups/0/")}
        heads = [own[f"attention/{name}"] for name in ("q_DNH", "k_DKH", "v_DKH")]
        there = {f"{name}.weight": own[f"{name}/scale"] for name in ("attention_norm", "ffn_norm")}
        there["qkv.weight"] = np.concatenate([x.reshape(len(x), -1).T for x in heads])
        if "attention/q_bias_NH" in own:
            biases = [own[f"attention/{name}"] for name in ("q_bias_NH", "k_bias_KH", "v_bias_KH")]
            there["qkv.bias"] = np.concatenate([x.ravel() for x in biases])
        out = own["attention/o_NHD"]
        there["out.weight"] = out.reshape(-1, out.shape[-1]).T
        there["gate_up.weight"] = np.concatenate([own["ffn/gate_DF"].T, own["ffn/up_DF"].T])
        there["down.weight"] = own["ffn/down_FD"].T
        found |= {f"layers.{layer}.{name}": x for name, x in there.items()}
    return {name: np.array(x) for name, x in found.items()}


class _ChunkedXent(torch.autograd.Function):
    """The sum of `-weight log softmax` of the targets, against all rows, or against drawn ones and the target."""

    @staticmethod
    def forward(ctx, h_SD, row_JD, target_S, weight_S, positive_S, item_J, offset_J, chunk):
        total, d_h, d_row = h_SD.new_zeros(()), torch.empty_like(h_SD), torch.zeros_like(row_JD)
        d_positive = None if positive_S is None else torch.empty_like(positive_S)
        for lo in range(0, len(h_SD), chunk):
            part = slice(lo, lo + chunk)
            h, target, weight = h_SD[part], target_S[part], weight_S[part]
            if positive_S is None:
                logits = h @ row_JD.T
                top = logits.amax(dim=1)
                positive = logits.gather(1, target[:, None])[:, 0]
                pull = logits.sub_(top[:, None]).exp_()
                mass = pull.sum(dim=1)
            else:
                positive = positive_S[part]
                logits = torch.addmm(offset_J, h, row_JD.T)
                logits.masked_fill_(item_J == target[:, None], -torch.inf)
                top = torch.maximum(logits.amax(dim=1), positive)
                pull = logits.sub_(top[:, None]).exp_()
                mass = pull.sum(dim=1) + (positive - top).exp()
                assert d_positive is not None
                d_positive[part] = weight * ((positive - top).exp() / mass - 1)
            total += (weight * (mass.log() + top - positive)).sum()
            pull.mul_((weight / mass)[:, None])
            if positive_S is None:
                pull.scatter_add_(1, target[:, None], -weight[:, None])
            torch.mm(pull, row_JD, out=d_h[part])
            d_row.addmm_(pull.T, h)
        ctx.save_for_backward(d_h, d_row, *(() if d_positive is None else (d_positive,)))
        return total

    @staticmethod
    def backward(ctx, g):
        d_h, d_row, *rest = ctx.saved_tensors
        return g * d_h, g * d_row, None, None, (g * rest[0] if rest else None), None, None, None


def sum_loss(model: TorchSasrec, batch: Batch, drawn: Drawn | None, chunk: int) -> torch.Tensor:
    """The mean loss of the batch's targets: binary against one negative a slot, or of a softmax against drawn items, or
    against all (None).
    """
    h, target, weight = model(batch), batch["target"].flatten(), batch["weight"].flatten()
    n, rows = weight.sum().clamp(min=1), model.rows
    if drawn is None:
        return _ChunkedXent.apply(h, rows.weight, target, weight, None, None, None, chunk) / n
    positive = (h * rows(target)).sum(dim=1)
    if drawn.correction is None:
        item = drawn.item.flatten()
        negative = functional.softplus((h * rows(item)).sum(dim=1)).masked_fill(item == target, 0)
        return (weight * (functional.softplus(-positive) + negative)).sum() / n
    vectors = rows(drawn.item)
    return _ChunkedXent.apply(h, vectors, target, weight, positive, drawn.item, drawn.correction, chunk) / n


def make_step(
    config: Config, model: TorchSasrec, chunk: int, is_compiled: bool = False
) -> Callable[[Batch], torch.Tensor]:
    """A training step by the config's loss and optimiser; a call makes one, and returns the loss."""
    optim, n_items, generator = config.optim, model.rows.num_embeddings, torch.Generator().manual_seed(config.seed)
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "rows.weight"]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others}]
    adam = torch.optim.AdamW(groups, optim.learning_rate, (optim.b1, optim.b2), weight_decay=0.0, fused=True)
    params: list[torch.Tensor] = [*decayed, *others]
    average = [p.detach().clone() for p in params] if optim.ema_decay else []
    loss_of = torch.compile(sum_loss) if is_compiled else sum_loss

    def draw(batch: Batch) -> Drawn | None:
        if config.loss.kind == "full_softmax":
            return None
        if config.loss.kind == "one_negative":
            return Drawn(torch.randint(n_items, batch["target"].shape, generator=generator))
        item = torch.randint(n_items, (config.loss.n_negatives,), generator=generator)
        return Drawn(item, torch.full((len(item),), float(np.log(n_items / len(item)))))

    def step(batch: Batch) -> torch.Tensor:
        adam.zero_grad(set_to_none=True)
        loss = loss_of(model, batch, draw(batch), chunk)
        loss.backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(params, optim.clip_norm, foreach=True)
        adam.step()
        if average:
            with torch.no_grad():
                torch._foreach_lerp_(average, params, 1 - optim.ema_decay)
        return loss.detach()

    return step
