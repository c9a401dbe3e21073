"""EAGLE-3 chain drafting in plain torch, without a cache, written from the papers' equations and nothing of ours.

Everything is recomputed over the whole sequence for every draft token, so there is no state that could go stale.
"""

from __future__ import annotations

import math

import torch


class Reference:
    """`config` is the canonical set of flags, `w` the head's tensors by speculators' names, `embedding` [V, H]."""

    def __init__(self, config: dict, w: dict[str, torch.Tensor], embedding: torch.Tensor) -> None:
        self.c, self.w = config, {name: t.float() if t.is_floating_point() else t for name, t in w.items()}
        self.embedding = self.w.get("embed_tokens.weight", embedding)

    def rms(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c["eps"]).sqrt() * self.w[name]

    def features(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Fused features [T, H] from the residual streams after the head's layers, each [T, H]."""
        if self.c["fc_norm"]:
            if self.c["norm_before_fc"]:
                joined = self.rms(torch.cat(states, -1), "input_norm.weight")
                states = list(joined.chunk(len(states), -1))
            states = [self.rms(s, f"fc_norm.{i}.weight") for i, s in enumerate(states)]
            return torch.cat(states, -1) @ self.w["fc.weight"].T
        joined = torch.cat(states, -1)
        if self.c["norm_before_fc"]:
            joined = self.rms(joined, "input_norm.weight")
        return joined @ self.w["fc.weight"].T

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        frequency = self.c["theta"] ** (-torch.arange(half).float() / half)
        angle = torch.arange(x.shape[0]).float()[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def layer(self, tokens: list[int], hidden: torch.Tensor) -> torch.Tensor:
        p, heads, kv, dim = "layers.0.", self.c["heads"], self.c["kv_heads"], self.c["head_dim"]
        e = self.rms(self.embedding[torch.tensor(tokens)], p + "input_layernorm.weight")
        g = self.rms(hidden, p + "hidden_norm.weight")
        x, num = torch.cat([e, g], -1), len(tokens)
        q, k, v = (
            (x @ self.w[f"{p}self_attn.{name}_proj.weight"].T).view(num, n, dim)
            for name, n in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k = self.rotate(q), self.rotate(k)
        out = torch.zeros_like(q)
        for head in range(heads):
            shared = head // (heads // kv)
            scores = q[:, head] @ k[:, shared].T / math.sqrt(dim)
            scores = scores.masked_fill(torch.ones(num, num).triu(1).bool(), -torch.inf)
            out[:, head] = scores.softmax(-1) @ v[:, shared]
        y = (g if self.c["norm_before_residual"] else hidden) + out.reshape(num, -1) @ self.w[
            p + "self_attn.o_proj.weight"
        ].T
        z = self.rms(y, p + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(z @ self.w[p + "mlp.gate_proj.weight"].T)
        return y + (gate * (z @ self.w[p + "mlp.up_proj.weight"].T)) @ self.w[p + "mlp.down_proj.weight"].T

    def drafts(self, tokens: list[int], states: list[torch.Tensor], depth: int) -> tuple[list[int], list[float]]:
        """The greedy chain after `tokens`, and the log-probability of each of its tokens.

        The target has not seen the last of `tokens`; `states` cover all before it.
        """
        hidden, shifted, drafted, logps = self.features(states), tokens[1:], [], []
        for _ in range(depth):
            z = self.layer(shifted, hidden)[-1:]
            normed = self.rms(z, "norm.weight")
            logp = (normed @ self.w["lm_head.weight"].T).log_softmax(-1)[0]
            draft_id = int(logp.argmax())
            logps.append(float(logp[draft_id]))
            token = draft_id + int(self.w["d2t"][draft_id]) if "d2t" in self.w else draft_id
            drafted.append(token)
            shifted = [*shifted, token]
            hidden = torch.cat([hidden, normed if self.c["norm_output"] else z])
        return drafted, logps
