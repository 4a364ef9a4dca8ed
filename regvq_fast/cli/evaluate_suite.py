"""``regvq evaluate --reference``: sampled images by the protocol of ADM's evaluation suite."""

import warnings
from typing import Any

from regvq_fast.cli.evaluate_setup import Setup, few_images_note
from regvq_fast.console import progress_bar, say
from regvq_fast.evaluation.fid import TooFewImagesWarning
from regvq_fast.evaluation.measurement import Measurement
from regvq_fast.evaluation.metrics import open_samples
from regvq_fast.evaluation.sample_metrics import NEIGHBORS, SPLIT
from regvq_fast.evaluation.shares import rank_share
from regvq_fast.evaluation.suite import Progress, ReferenceBatch, evaluate_samples
from regvq_fast.models.weights import sha256_of

_NAMES = {
    "fid_g": "FID[G]",
    "sfid": "sFID[G]",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}


class SuiteEvaluation:
    """An evaluation of sampled images against a reference file; the constructor opens and checks both.

    Raises:
        ValueError, OSError: the files can't be used, or don't fit the network.
    """

    def __init__(self, setup: Setup) -> None:
        images, reference, net = setup.config.images, setup.config.reference, setup.net
        assert images is not None  # all three checked
        assert reference is not None
        assert net is not None
        self.setup, self.net, self.images = setup, net, images
        self.reference = ReferenceBatch(reference)
        self.samples = open_samples(images)
        self.reference.check(self.samples, net)
        if (least := min(self.samples.image_size)) < net.min_size:
            raise ValueError(
                f"{net.name} needs images of at least {net.min_size} pixels a side, these have {least}: choose other "
                "--fid-features"
            )

    def measure(self) -> dict[str, Measurement]:
        """Return the metrics by key."""
        net, reference, setup = self.net, self.reference, self.setup
        with progress_bar(setup.console) as bars, warnings.catch_warnings():
            warnings.simplefilter("ignore", TooFewImagesWarning)  # the protocol has a note instead

            def bar(name: str, images: int) -> Progress:
                task = bars.add_task(name, total=len(rank_share(images)))
                return lambda done: bars.update(task, completed=done)

            found = evaluate_samples(self.samples, reference, net, device=setup.device, progress=bar, **setup.loading)
        for key, reason in found.left_out.items():
            say(setup.console, "left out", f"{key}: {reason}")
        height, width = self.samples.image_size
        protocol = {
            "suite": "ADM (openai/guided-diffusion)",
            "sampled_images": str(self.images),
            "samples": len(self.samples),
            "image_size": f"{height} x {width}",
            "reference": str(reference.path),
            "reference_sha256": sha256_of(reference.path)[:12],
            "features": net.name,
            "features_sha256": net.hash,
            **setup.metadata(),
        }
        compared = {"reference_images": None if reference.images is None else len(reference.images)}
        statistics = {"reference_statistics": "published" if net.standard and reference.pooled else "of its images"}
        own: dict[str, dict[str, Any]] = {
            "fid_g": statistics | few_images_note(len(self.samples), net.num_features),
            "sfid": statistics
            | {"spatial_features": net.num_spatial}
            | few_images_note(len(self.samples), net.num_spatial),
            "inception_score": {"split": SPLIT},
            "precision": compared | {"neighbors": NEIGHBORS},
            "recall": compared | {"neighbors": NEIGHBORS},
        }
        return {key: Measurement(self._name(key), value, protocol | own[key]) for key, value in found.values.items()}

    def _name(self, key: str) -> str:
        if self.net.standard:
            return _NAMES[key]
        return f"{_NAMES[key].replace('FID', 'Fréchet distance')} ({self.net.name})"
