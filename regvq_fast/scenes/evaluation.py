"""Evaluation of priors trained on the scenes: how well their samples match maps or captions."""

from collections.abc import Mapping

from torch import Tensor

from regvq_fast.data.image_dataset import ImageDataset, TrainedPrior
from regvq_fast.data.loading import read_samples
from regvq_fast.data.samples import Batch
from regvq_fast.scenes.captions import caption_accuracy
from regvq_fast.scenes.judges import RegionClassifier, region_accuracy
from regvq_fast.scenes.layouts import CLASSES

CLASSIFIED = 128
"""Number of validation scenes to classify."""
FITTED_TO = 768
"""Number of training scenes to fit the classifier to; as accurate as 2048 (docs/priors.md)."""


def evaluate_samples(prior: TrainedPrior, training: ImageDataset, validation: ImageDataset) -> Mapping[str, float]:
    """Measure how well scenes, their reconstructions and samples match the scenes' conditions.

    The classifier of regions is fitted to training scenes and to their reconstructions.

    Args:
        prior: conditioned on semantic maps or captions.
        training, validation: splits of the scenes, of the prior's image size and seed.
    """
    with prior.stage("fitting a classifier, scenes") as progress:
        classifier = RegionClassifier.fit(training, FITTED_TO, len(CLASSES), prior.reconstruct, progress)
    scenes = read_samples(validation, range(min(CLASSIFIED, len(validation))))
    with prior.stage("sampling, steps") as progress:
        samples = prior.sample(scenes, progress)
    images = {"scenes": scenes["image"], "reconstructions": prior.reconstruct(scenes["image"]), "samples": samples}
    return {
        f"{measure} of {name}": value
        for name, shown in images.items()
        for measure, value in _accuracies(prior, classifier, shown.cpu(), scenes).items()
    }


def _accuracies(
    prior: TrainedPrior, classifier: RegionClassifier, images: Tensor, scenes: Batch
) -> Mapping[str, float]:
    if prior.condition == "segmentation":
        return {"agreement": region_accuracy(classifier, images, scenes["segmentation"]).accuracy}
    found = caption_accuracy(classifier, images, scenes["caption"])
    return {"layout": found.layout, "classes": found.classes}
