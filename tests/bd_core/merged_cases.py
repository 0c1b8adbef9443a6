"""Models and the slow reference that the tests of the merged model share."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import pipeline.backbones.torchvision_ops  # noqa: F401  before open_clip and timm
from bd_core.task_vectors import TaskVectors

State = dict[str, Tensor]


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 4, bias=False)), torch.randn(5, 6)


def token_mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 4)), torch.randn(5, 2, 3, 6)


class ConvNet(nn.Module):
    """Overlapping, strided, dilated, depthwise, 1x1 and reflecting convolutions; batch and group normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding="same", groups=8)
        self.gn = nn.GroupNorm(4, 16)
        self.dilated = nn.Conv2d(16, 6, (3, 2), dilation=2, padding=(1, 0), padding_mode="reflect")
        self.one = nn.Conv2d(6, 5, 1)
        self.patch = nn.Conv2d(5, 7, 2, stride=2, padding=1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.gn(self.depthwise(x))
        x = self.patch(F.relu(self.one(self.dilated(x))))
        return self.head(x.mean((2, 3)))


def conv_net() -> tuple[nn.Module, Tensor]:
    net = ConvNet()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2.0)
    return net, torch.randn(5, 3, 13, 13)


class Attention(nn.Module):
    """Token ids through embeddings, masked self attention (weights asked for) and cross attention, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.positions = nn.Embedding(6, 8)
        self.self_attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 4, kdim=5, vdim=7, bias=False)
        self.memory = nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        y, shares = self.self_attention(x, x, x, attn_mask=causal, key_padding_mask=ids == 10)
        memory = self.memory(y).transpose(0, 1)
        z, _ = self.cross(y.transpose(0, 1), memory[..., :5], memory[..., 5:], need_weights=False)
        return z.transpose(0, 1) + shares.sum(-1, keepdim=True) + x


def attention() -> tuple[nn.Module, Tensor]:
    return Attention(), torch.randint(1, 10, (5, 6))


def encoder_layer() -> tuple[nn.Module, Tensor]:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(5, 4, 8)


def open_clip_tower(**vision: Any) -> tuple[nn.Module, Tensor]:
    import open_clip

    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, **vision},
        "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 8, "heads": 2, "layers": 1},
    }
    name = f"tiny-{abs(hash(json.dumps(config)))}"
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
        tower = open_clip.create_model(name).visual
    return tower, torch.randn(5, 3, 16, 16)


def open_clip_vit() -> tuple[nn.Module, Tensor]:
    return open_clip_tower()


def open_clip_vit_scaled() -> tuple[nn.Module, Tensor]:
    return open_clip_tower(ls_init_value=0.5, pool_type="avg", final_ln_after_pool=True, output_tokens=True)


def open_clip_resnet() -> tuple[nn.Module, Tensor]:
    """Bottleneck blocks, batch normalisation, attention pooling."""
    tower, _ = open_clip_tower(layers=[1, 1, 1, 1], width=8, image_size=32, patch_size=None)
    return tower, torch.randn(5, 3, 32, 32)


def hugging_face_clip() -> tuple[nn.Module, Tensor]:
    """The vision tower of transformers, from a configuration: nothing is fetched."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return Pooled(CLIPVisionModel(config)), torch.randn(5, 3, 16, 16)


class Pooled(nn.Module):
    """The pooled output of a Hugging Face tower."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixel_values=pixels).pooler_output


def timm_vit(depth: int = 2) -> tuple[nn.Module, Tensor]:
    import timm

    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=5
    )
    return vit, torch.randn(5, 3, 16, 16)


class Odd(nn.Module):
    """Modules without a batched form: a bare 1-d convolution and a layer with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.scale = Scale(5)
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scale(self.conv(x)))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width))
        self.power = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain**self.power


class NormedOdd(nn.Module):
    """Batch normalisation inside a model that falls back as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.mix = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).flatten(2) * self.mix.weight.sum()


def normed_odd() -> tuple[nn.Module, Tensor]:
    return NormedOdd(), torch.randn(5, 3, 4, 4)


def odd() -> tuple[nn.Module, Tensor]:
    return Odd(), torch.randn(5, 3, 5)


class Sequence(nn.Module):
    """Tokens first inside: the batched linear layer must notice, even with as many tokens as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


def tokens_first() -> tuple[nn.Module, Tensor]:
    return Sequence(), torch.randn(5, 3, 4)


def tokens_first_square() -> tuple[nn.Module, Tensor]:
    return Sequence(), torch.randn(2, 2, 4)


class Tied(nn.Module):
    """Uses a layer's weight behind its back: batched layers alone would take the base's there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) @ self.table.weight.T


def tied() -> tuple[nn.Module, Tensor]:
    return Tied(), torch.randint(0, 7, (5, 3))


Case = Callable[[], tuple[nn.Module, Tensor]]
NATIVE: list[Case] = [
    mlp,
    token_mlp,
    conv_net,
    attention,
    encoder_layer,
    open_clip_vit,
    open_clip_vit_scaled,
    open_clip_resnet,
    hugging_face_clip,
    timm_vit,
]
THROUGH_VMAP: list[Case] = [odd, tokens_first, tokens_first_square, tied, normed_odd]


def experts_of(model: nn.Module, n_experts: int, scale: float = 0.3) -> tuple[State, list[State]]:
    """A base state dict and experts around it, far enough apart that a wrong weight shows."""
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    experts = []
    for _ in range(n_experts):
        expert = copy.deepcopy(base)
        for name, tensor in expert.items():
            if tensor.is_floating_point():
                step = scale * torch.randn_like(tensor) * tensor.std(correction=0).clamp_min(0.3)
                tensor += step.abs() if name.endswith("running_var") else step
        experts.append(expert)
    return base, experts


def reference(
    model: nn.Module, base: State, vectors: TaskVectors, inputs: Tensor, weights: Tensor, index: dict[str, int]
) -> Any:
    """The definition, sample by sample: merge the parameters, run the model on a batch of one."""
    model = copy.deepcopy(model).eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):  # torch's own has no gradient to the running statistics
            part.forward = partial(_batch_norm, part)
    outputs = []
    for b in range(len(inputs)):
        merged = dict(base)
        for name, stacked in vectors.vectors.items():
            merged[name] = base[name] + sum(weights[b, index[name], k] * stacked[k] for k in range(len(stacked)))
        outputs.append(functional_call(model, merged, (inputs[b : b + 1],), tie_weights=False))
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs)


def _batch_norm(part: nn.BatchNorm2d, x: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        getattr(part, n)[:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(variance + part.eps) * weight + bias


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm().clamp_min(1e-12))
