"""Start of a training run from its command line."""

import sys
from collections.abc import Mapping

from regvq_fast.config import Config, parse_config
from regvq_fast.precision import choose_device
from regvq_fast.ranks import local_rank, process_group, rank
from regvq_fast.training.batch_size import find_batch_size
from regvq_fast.training.recipe import Recipe
from regvq_fast.training.stopping import RunStopped
from regvq_fast.training.trainer import Trainer


def train(recipe: type[Recipe[Config]], presets: Mapping[str, Config], description: str) -> None:
    """Parse the command line and train; on failure exit with a message and a status."""
    try:
        _train(recipe, presets, description)
    except KeyboardInterrupt:  # once a run trains, `StopSignals` handles it
        if local_rank() == 0:
            print("stopped before the first step", file=sys.stderr)
        sys.exit(130)


def _train(recipe: type[Recipe[Config]], presets: Mapping[str, Config], description: str) -> None:
    try:
        config = parse_config(presets, sys.argv[1:], description)
    except (ValueError, OSError) as error:  # each process of a machine finds the same
        sys.exit(f"error: {error}" if local_rank() == 0 else 1)
    try:
        device = choose_device(config.run.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with process_group(device):
        try:
            if config.run.find_batch_size:
                find_batch_size(recipe, config)
                return
            trainer = Trainer.open(recipe, config)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}" if rank() == 0 else 1)
        try:
            trainer.fit()
        except RunStopped as stop:
            if rank() == 0 or not stop.shared:
                print(stop, file=sys.stderr)
            sys.exit(stop.exit_code)
