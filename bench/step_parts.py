"""Where the time of a training step goes: its networks' forward passes, the backward passes, the updates, the rest."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import measuring
import torch

from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import VQGANRecipe


class Stopwatch:
    """Seconds by part. A part within another one counts for itself, not for the outer one."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device == "cuda"
        self._open: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        """What passed since the last turn goes to the part that is open."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return function(*arguments, **keywords)

        return call


def parts_of_step(trainer: Trainer[Any], step: measuring.Run, device: str, repeats: int = 5) -> dict[str, float]:
    """Median milliseconds of the parts of an uncompiled step, waiting for the device between them."""
    model, recipe = trainer.networks.model, cast(VQGANRecipe, trainer.recipe)
    watched: dict[str, list[tuple[Any, str]]] = {
        "encoder": [(model.encoder, "forward")],
        "quantizer": [(model.quantize, "forward")],
        "decoder": [(model, "decoder_features"), (model.decoder.conv_out, "forward")],
        "perceptual and contrastive": [(recipe.reconstruction_loss, "forward")],
        "discriminator": [(recipe.discriminator, "forward")],
        "backward": [(torch.autograd, "backward"), (torch.autograd, "grad")],
        "optimizers": [(trainer.optimization, "step")],
    }
    readings: dict[str, list[float]] = {name: [] for name in (*watched, "rest")}
    for _ in range(repeats):
        watch = Stopwatch(device)
        with contextlib.ExitStack() as patches:
            for name, places in watched.items():
                for owner, attribute in places:
                    function = watch.watched(name, getattr(owner, attribute))
                    patches.enter_context(mock.patch.object(owner, attribute, function))
            with watch.part("rest"):
                step()
        for name in readings:
            readings[name].append(1e3 * watch.seconds.get(name, 0.0))
    return {name: round(statistics.median(values), 4) for name, values in readings.items() if any(values)}
