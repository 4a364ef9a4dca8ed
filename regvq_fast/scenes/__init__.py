"""The embedded data set: scenes composed of real photographs, and measures of whether images match their conditions."""

from regvq_fast.scenes.captions import CaptionAccuracy, caption_accuracy, read_captions
from regvq_fast.scenes.dataset import ScenesDataset
from regvq_fast.scenes.judges import RegionAgreement, RegionClassifier, region_accuracy
from regvq_fast.scenes.layouts import CLASSES, LAYOUTS, PHOTOGRAPHS, parse_caption

__all__ = [
    "CLASSES",
    "LAYOUTS",
    "PHOTOGRAPHS",
    "CaptionAccuracy",
    "RegionAgreement",
    "RegionClassifier",
    "ScenesDataset",
    "caption_accuracy",
    "parse_caption",
    "read_captions",
    "region_accuracy",
]
