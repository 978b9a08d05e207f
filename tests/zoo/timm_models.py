"""Tiny models of timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo import prepare
from tests.zoo.measure import Model


def named(name: str, size: int = 64, **options: Any) -> Model:
    """A model of timm's registry for images of ``size``."""
    def make() -> nn.Module:
        prepare()
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5, **options)

    return Model(make, lambda b: {"x": torch.randn(b, 3, size, size)})


def of(module: str, kind: str, size: int = 32, **options: Any) -> Model:
    """``timm.models.<module>.<kind>`` with sizes of our own."""
    def make() -> nn.Module:
        prepare()
        import importlib

        return getattr(importlib.import_module(f"timm.models.{module}"), kind)(num_classes=5, **options)

    return Model(make, lambda b: {"x": torch.randn(b, 3, size, size)})


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}

TIMM: dict[str, Model] = {
    "ResNet": named("test_resnet"),
    "ConvNeXt": named("test_convnext"),
    "ConvNeXt v2": named("test_convnext2"),
    "EfficientNet": named("test_efficientnet"),
    "EfficientNet, group norm": named("test_efficientnet_gn"),
    "NFNet": named("test_nfnet"),
    "ByobNet": named("test_byobnet"),
    "MambaOut": named("test_mambaout"),
    "ViT": named("test_vit", img_size=64),
    "ViT, registers": named("test_vit3", img_size=64),
    "MobileNet v3": named("mobilenetv3_small_050"),
    "RegNet": named("regnetx_002"),
    "GhostNet": named("ghostnet_050"),
    "DenseNet": of("densenet", "DenseNet", growth_rate=4, block_config=(2, 2)),
    "Swin": of("swin_transformer", "SwinTransformer", img_size=32, patch_size=2, embed_dim=8, depths=(2, 2),
               num_heads=(2, 2), window_size=4),
    "Swin v2": of("swin_transformer_v2", "SwinTransformerV2", img_size=32, patch_size=2, embed_dim=8,
                  depths=(2, 2), num_heads=(2, 2), window_size=4),
    "DeiT": of("deit", "VisionTransformerDistilled", **VIT),
    "BEiT": of("beit", "Beit", **VIT),
    "CaiT": of("cait", "Cait", **VIT),
    "XCiT": of("xcit", "Xcit", **VIT),
    "Mixer": of("mlp_mixer", "MlpMixer", img_size=32, patch_size=8, embed_dim=16, num_blocks=2),
    "PoolFormer": named("poolformer_s12"),
    "MobileViT": named("mobilevit_xxs"),
    "MaxViT": named("maxvit_rmlp_pico_rw_256", size=64, img_size=64),
    "RepVGG": named("repvgg_a0"),
    "ResNeSt": named("resnest14d"),
}
