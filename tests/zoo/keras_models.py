"""The families of ``keras.applications``, each in its smallest member."""

from __future__ import annotations

# Height and width of the smallest image that each takes.
FAMILIES: dict[str, int] = {
    "MobileNet": 32, "MobileNetV2": 32, "MobileNetV3Small": 32, "EfficientNetB0": 32, "EfficientNetV2B0": 32,
    "DenseNet121": 32, "ResNet50": 32, "ResNet50V2": 32, "ConvNeXtTiny": 32, "NASNetMobile": 32, "VGG16": 32,
    "Xception": 71, "InceptionV3": 75, "InceptionResNetV2": 75,
}
# ConvNeXt's learned scale of each channel has no rule.
COVERED = {"ConvNeXtTiny": 0.999}
CLASSES = 5
