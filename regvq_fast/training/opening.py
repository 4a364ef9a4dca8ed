"""Opening of a run: its folder and lock, and with ``--resume`` its newest checkpoint."""

import time
from contextlib import ExitStack
from pathlib import Path

from regvq_fast import ranks
from regvq_fast.config import Config, TrainConfig, override
from regvq_fast.files import check_new_folder
from regvq_fast.ownership import FolderLock, check_free
from regvq_fast.training.checkpoint import Checkpoint, Checkpoints, find_checkpoint
from regvq_fast.training.recipe import Recipe
from regvq_fast.training.recorder import Recorder
from regvq_fast.training.trainer import Trainer


def open_run(kind: type[Recipe[Config]], config: Config) -> Trainer[Config]:
    """Build a new run, or with ``--resume`` the run in ``--out`` at its newest checkpoint, and make its folder.

    A finished run that continues loses its final model: the newest checkpoint serves until the new end.

    Raises:
        ValueError, OSError: as :class:`Trainer`; nothing has been written then.
    """
    start: Checkpoint | None = None
    out, lock, run = "", None, config.run
    with ExitStack() as owned:
        with ranks.raise_on_all_ranks():
            if ranks.rank() == 0 and not run.resume:
                out = str(_new_folder(config))
            elif ranks.rank() == 0 and run.out is not None:
                lock = owned.enter_context(FolderLock(run.out, "run"))
        with ranks.raise_on_all_ranks():
            if run.resume:
                start = find_checkpoint(config)
        out = ranks.all_gather_strings(out)[0]
        ranks.check_agreement({"steps done": str(start.step if start else 0)}, "is --out shared?")
        trainer = Trainer(kind, config if start else override(config, out=Path(out)))
        with ranks.raise_on_all_ranks():
            if start is not None:
                trainer.load(start)
        with ranks.raise_on_all_ranks():
            if ranks.rank() == 0 and start is None:
                lock = owned.enter_context(_lock_new_folder(Path(out)))
            model, beside = trainer.networks.model, trainer.networks.saved_beside
            described = trainer.config, trainer.metadata, model.architecture()
            recorder = trainer.recorder = Recorder(*described, start, lock)
            for name, frozen in beside.items() if ranks.rank() == 0 else ():
                frozen.save_pretrained(recorder.folder / name)
            trainer.checkpoints = Checkpoints(recorder.folder, run.keep_checkpoints, start)
            if trainer.checkpoints.newest and trainer.start < trainer.steps:
                recorder.remove_results()
        owned.pop_all()  # the recorder releases the folder
    return trainer


def _new_folder(config: TrainConfig) -> Path:
    """Return the folder of a new run; nothing is created yet.

    Raises:
        FileExistsError: the folder named by ``--out`` is not empty, or another process uses it.
    """
    out = config.run.out
    if out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{config.label}-{stamp}"
        candidates = (Path("runs") / (name + suffix) for suffix in ("", *(f"-{k}" for k in range(2, 1000))))
        return next(path for path in candidates if not path.exists())
    check_free(out, "run")
    check_new_folder(out, "name a new one, or continue its run with --resume")
    return out


def _lock_new_folder(out: Path) -> FolderLock:
    """Lock the folder of a new run; FileExistsError if another process was faster."""
    lock = FolderLock(out, "run")
    try:
        check_new_folder(out, "another run began there just now: name a new one")
    except OSError:
        lock.release()
        raise
    for leftover in out.glob(".config.*.json"):  # of a process that was killed
        leftover.unlink()
    return lock
