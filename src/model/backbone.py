"""DINOv2 through transformers: from a Hugging Face folder, or with random weights of the same shape.

Shapes: B batch, S patch side in px, N = (S / patch_size)^2 image tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Dinov2Config, Dinov2Model
from transformers.utils import logging

from src.config import BackboneConfig
from src.model.attention import attend
from src.model.tokens import sincos_position

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
_SHAPE_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
    *("patch_size", "num_channels", "qkv_bias", "layerscale_value", "use_swiglu_ffn", "use_mask_token"),
)
_ATTENTION = "attend"  # the name of `attend` in the registry of transformers


class Backbone(nn.Module):
    """DINOv2: a normalised patch to image tokens.

    Its own dropout is removed: the schedule sets the decoder's rate, and rate 0 must mean no dropout at all. The
    position embedding is resampled once to the run's patch size, not at every forward pass.
    """

    def __init__(self, cfg: BackboneConfig, img_size: int, shape: Mapping[str, Any] | None = None) -> None:
        """`shape`: the result of `shape()` of a saved network. The weights are then uninitialised, to be loaded by the
        caller; with None they are read or drawn as `cfg` says."""
        super().__init__()
        self.model = _build_dinov2(cfg, img_size) if shape is None else _build_empty(shape, img_size)
        self.patch_size: int = self.model.config.patch_size
        self.hidden_size: int = self.model.config.hidden_size
        if img_size % self.patch_size:
            raise ValueError(f"MODEL.img_size={img_size}: must be a multiple of the patch size {self.patch_size}")
        self.grid_size = img_size // self.patch_size
        _fit_position_embedding(self.model, img_size)
        _remove_dropout(self.model)
        self.model.embeddings.mask_token.requires_grad_(False)  # unused here; DDP would wait for its gradient

    def shape(self) -> dict[str, Any]:
        """Everything needed to rebuild this backbone without its folder, under DINOv2's own names."""
        return {name: getattr(self.model.config, name) for name in _SHAPE_KEYS}

    def checkpoint_activations(self) -> None:
        """Recompute each layer in the backward pass instead of storing its activations: less memory, more time."""
        for layer in self.model.encoder.layer:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalised image [B, 3, S, S] -> image tokens [B, N, D], row by row, after the final layer norm."""
        return self.model(pixel_values=image).last_hidden_state[:, 1:]


def _build_dinov2(cfg: BackboneConfig, img_size: int) -> Dinov2Model:
    if not cfg.random_init:
        folder = Path(cfg.backbone_str)
        if not (folder / "config.json").is_file():
            raise ValueError(f"MODEL.backbone.backbone_str={cfg.backbone_str}: this folder has no config.json")
        logging.disable_progress_bar()  # one per process, for a second's work
        return Dinov2Model.from_pretrained(
            folder, local_files_only=True, attn_implementation=_ATTENTION, dtype=torch.float32, **_NO_DROPOUT
        )
    shape = Dinov2Config(
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_layer,
        num_attention_heads=cfg.num_head,
        patch_size=cfg.patch_size,
        use_swiglu_ffn=cfg.swiglu,
        image_size=img_size,
        **_NO_DROPOUT,
    )
    shape._attn_implementation = _ATTENTION
    model = Dinov2Model(shape)
    _init_for_width(model, img_size // cfg.patch_size)
    return model


def _build_empty(shape: Mapping[str, Any], img_size: int) -> Dinov2Model:
    """A DINOv2 with uninitialised weights."""
    known = {name: shape[name] for name in _SHAPE_KEYS if name in shape}
    config = Dinov2Config(**known, image_size=img_size, **_NO_DROPOUT)
    config._attn_implementation = _ATTENTION
    with torch.device("meta"):
        model = Dinov2Model(config)
    return model.to_empty(device="cpu")


@torch.no_grad()
def _init_for_width(model: Dinov2Model, grid_size: int) -> None:
    """Random weights for any width: variance 1 / fan-in, and a position embedding of the tokens' magnitude.

    transformers initialises everything with a standard deviation of 0.02, which suits a width of 2500: in a narrow
    network activations shrink layer by layer and positions are lost among the tokens, which wastes most of a short run.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    embedding = model.embeddings.position_embeddings
    embedding[0, 1:] = 0.5 * sincos_position(grid_size, embedding.shape[-1])


def _fit_position_embedding(model: Dinov2Model, img_size: int) -> None:
    """Resample the position embedding to the patch's grid, with DINOv2's own bicubic interpolation."""
    embeddings = model.embeddings
    grid = img_size // model.config.patch_size
    if embeddings.position_embeddings.shape[1] == grid * grid + 1:
        return
    token = torch.zeros(1, grid * grid + 1, model.config.hidden_size)
    resampled = embeddings.interpolate_pos_encoding(token, img_size, img_size)
    embeddings.position_embeddings = nn.Parameter(resampled.detach().clone())
    model.config.image_size = img_size


def _remove_dropout(model: nn.Module) -> None:
    """Replace every dropout module of the backbone by the identity."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())


def _attend_for_transformers(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **_: Any
) -> tuple[torch.Tensor, None]:
    """`attend` with the signature and the result [B, Q, H, E] that transformers expects; a ViT has no mask."""
    assert mask is None
    return attend(q, k, v).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend_for_transformers)
