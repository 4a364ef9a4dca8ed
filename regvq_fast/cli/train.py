"""The commands ``regvq train``: start a run of a tokenizer or a prior."""

import sys
from collections.abc import Mapping, Sequence

from regvq_fast.config import VQGAN_PRESETS, Config, parse_config
from regvq_fast.invocation import as_typed
from regvq_fast.precision import choose_device, is_out_of_memory
from regvq_fast.priors.registry import PRIORS
from regvq_fast.ranks import local_rank, process_group, rank
from regvq_fast.training.batch_size import find_batch_size
from regvq_fast.training.memory import out_of_memory_advice
from regvq_fast.training.opening import open_run
from regvq_fast.training.recipe import Recipe
from regvq_fast.training.stopping import RunStopped
from regvq_fast.training.vqgan_recipe import VQGANRecipe


def main(args: Sequence[str]) -> None:
    """Run ``regvq train``, given the name of the model to train and flags."""
    kind, *flags = args
    if kind == "vq":
        train(VQGANRecipe, VQGAN_PRESETS, flags)
    else:
        train(PRIORS[kind].recipe, PRIORS[kind].presets, flags)


def train(recipe: type[Recipe[Config]], presets: Mapping[str, Config], args: Sequence[str]) -> None:
    """Parse the flags and train; on failure exit with a message and a status."""
    try:
        _train(recipe, presets, args)
    except KeyboardInterrupt:  # once a run trains, `StopSignals` handles it
        if local_rank() == 0:
            print("stopped before the first step", file=sys.stderr)
        sys.exit(130)


def _train(recipe: type[Recipe[Config]], presets: Mapping[str, Config], args: Sequence[str]) -> None:
    try:
        config = parse_config(presets, args, recipe.usage, recipe.command, recipe.begin)
    except (ValueError, OSError) as error:  # all processes of a machine find the same error
        sys.exit(as_typed(f"error: {error}") if local_rank() == 0 else 1)
    try:
        device = choose_device(config.run.device)
    except ValueError as error:
        sys.exit(as_typed(f"error: {error}"))
    with process_group(device):
        try:
            if config.run.find_batch_size:
                find_batch_size(recipe, config)
                return
            trainer = open_run(recipe, config)
        except (ValueError, OSError) as error:
            sys.exit(as_typed(f"error: {error}") if rank() == 0 else 1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sys.exit(f"error: {out_of_memory_advice(config, device, config.optimizer.batch_size)}")
        try:
            trainer.fit()
        except RunStopped as stop:
            if rank() == 0 or not stop.shared:
                print(stop, file=sys.stderr)
            sys.exit(stop.exit_code)
