"""The router: from a sample's pooled tokens to the weight of every expert, for the whole model or per layer group.

Shapes: B batch, D width, G layer groups, K experts.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bd_core.checks import check_option


class Router(nn.Module):
    """{w_k} = softmax(R(H)) (BD-Merging, stage 2), a two-layer GELU perceptron or one linear map.

    `width` is that of the pretrained backbone's tokens, mean-pooled over the last block (ours), `hidden` the same
    unless given (ours). The last layer starts small (ours), so that routing starts near uniform. n_groups = 1 is the
    task-wise router, more is layer-wise. `null_expert` (ours) adds an expert with a zero task vector to the softmax
    and drops its weight from the output, so that weights sum to less than 1 and the rest stays with theta_0.
    `output="free"` leaves the softmax out, as WEMoE's gates do: weights of any size that start near `initial`.
    Tokens are centred and scaled by `token_mean` and `token_scale`, which `standardise` sets (ours).
    `generator` draws the initial weights; None is a fresh one with seed 0. The global generator is not touched.
    """

    token_mean: Tensor
    token_scale: Tensor

    def __init__(
        self,
        width: int,
        n_tasks: int,
        n_groups: int = 1,
        hidden: int | None = None,
        kind: Literal["mlp", "linear"] = "mlp",
        null_expert: bool = False,
        generator: torch.Generator | None = None,
        output: Literal["softmax", "free"] = "softmax",
        initial: float = 0.3,
    ) -> None:
        super().__init__()
        check_option(kind, ("mlp", "linear"), "kind", "Router")
        check_option(output, ("softmax", "free"), "output", "Router")
        if null_expert and output == "free":
            raise ValueError(
                "Router: null_expert = True needs output = 'softmax'; free weights leave room by themselves"
            )
        sizes = {
            "width": width,
            "n_tasks": n_tasks,
            "n_groups": n_groups,
            "hidden": width if hidden is None else hidden,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"Router: {name} = {size}, needs at least 1; correct {name}")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.n_tasks, self.n_groups, self.width = n_tasks, n_groups, width
        self.n_experts = n_tasks + int(null_expert)
        self.output = output
        self.register_buffer("token_mean", torch.zeros(width))
        self.register_buffer("token_scale", torch.ones(()))
        n_out = n_groups * self.n_experts
        last_width = width if kind == "linear" else sizes["hidden"]
        last = _linear(last_width, n_out, 0.01 * last_width**-0.5, generator)
        if kind == "linear":
            self.layers = nn.Sequential(last)
        else:
            self.layers = nn.Sequential(_linear(width, last_width, width**-0.5, generator), nn.GELU(), last)
        if output == "free":
            nn.init.constant_(last.bias, initial)

    def forward(self, tokens_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B G K"]:
        """Weight of every expert, per sample and group; over K they sum to 1, to less with a null expert, free to any.

        Raises ValueError when tokens are empty, of another width, or not finite.
        """
        if tokens_BD.ndim != 2 or tokens_BD.shape[0] < 1 or tokens_BD.shape[1] != self.width:
            raise ValueError(
                f"Router: tokens have shape {tuple(tokens_BD.shape)}, needs [B >= 1, {self.width}]; "
                "pool the tokens of the backbone the router was made for"
            )
        if not torch.isfinite(tokens_BD).all():
            row = int((~torch.isfinite(tokens_BD).all(dim=1)).nonzero()[0])
            raise ValueError(f"Router: the tokens of row {row} have nan or inf; drop that sample or check the backbone")
        centred_BD = (tokens_BD - self.token_mean) / self.token_scale
        logits_BGK: Tensor = self.layers(centred_BD).unflatten(1, (self.n_groups, self.n_experts))
        if self.output == "free":
            return logits_BGK
        return torch.softmax(logits_BGK, dim=2)[:, :, : self.n_tasks]

    @torch.no_grad()
    def standardise(self, tokens_ND: Float[Tensor, "N D"]) -> None:
        """Centre the router on these tokens and bring them to unit mean square (ours): blocks differ in scale."""
        centre_D = tokens_ND.mean(dim=0)
        spread = (tokens_ND - centre_D).square().mean().sqrt()
        self.token_mean.copy_(centre_D)
        # Equal tokens have no spread and stay equal whatever they are divided by.
        self.token_scale.copy_(spread if spread > 0 else torch.ones(()))


def _linear(width_in: int, width_out: int, std: float, generator: torch.Generator) -> nn.Linear:
    # Made on the meta device: nn.Linear's own initialisation would draw from the global generator.
    layer = nn.Linear(width_in, width_out, device="meta").to_empty(device="cpu")
    nn.init.normal_(layer.weight, std=std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
