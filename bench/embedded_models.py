"""Train the tokenizer and the priors of the embedded scenes that ship with the package.

    python bench/embedded_models.py --runs runs/embedded     # an hour or two on two CPU cores; goes on where it stopped

It runs the commands below and writes the final weights to regvq_fast/scenes/pretrained, in half precision but for the
quantizer's, on which tokens depend.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from regvq_fast.models.model import Model, read_model
from regvq_fast.models.pretrained import pretrained_files, write_folder
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.priors.diffusion.text import WordEncoder, words_of
from regvq_fast.priors.registry import PRIORS
from regvq_fast.scenes import ScenesDataset
from regvq_fast.version import __version__

FOLDER = Path(__file__).parents[1] / "regvq_fast" / "scenes" / "pretrained"
COMMANDS = {
    "tokenizer": "train vq --compile --amp --perceptual-weight 0 --contrastive none --out {runs}/tokenizer",
    "tokens": "tokens --tokenizer {runs}/tokenizer --out {runs}/tokens",
    "ar": "train ar --cache {runs}/tokens --amp --out {runs}/ar",
    "diffusion": "train diffusion --cache {runs}/tokens --amp --out {runs}/diffusion",
}
"""Commands of `regvq` by the folder that each makes."""
MODELS = [name for name in COMMANDS if name != "tokens"]


def train(runs: Path) -> None:
    """Run the commands whose results are not there."""
    for name, command in COMMANDS.items():
        if (runs / name / "summary.json").exists() or (name == "tokens" and (runs / "ar" / "summary.json").exists()):
            continue
        words = [word.format(runs=runs) for word in command.split()]
        if (runs / name / "checkpoints").exists():
            words = [*words[:2], "--resume", "--out", str(runs / name)]
        subprocess.run([sys.executable, "-m", "regvq_fast", *words], check=True)


def pack(run: Path, folder: Path) -> None:
    """Write a run's final weights in half precision, and its summary without paths."""
    model: Model = read_model(run, VQGAN, *(prior.model for prior in PRIORS.values()))
    weights = {
        name: value.half() if value.dtype == torch.float32 and not name.startswith("quantize.") else value
        for name, value in model.state_dict().items()
    }
    if isinstance(encoder := getattr(model, "text_encoder", None), WordEncoder):
        # Rows that no training caption uses are as they were initialized: zeros take no room in a wheel.
        used = encoder.tokenize(sorted(words_of(ScenesDataset.vocabulary))).unique()
        table = weights["text_encoder.embedding.weight"]
        weights["text_encoder.embedding.weight"] = torch.zeros_like(table).index_copy_(0, used, table[used])
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    numbers = {name: value for name, value in summary.items() if not isinstance(value, str)}
    command = "regvq " + COMMANDS[folder.name].format(runs="runs/embedded")
    files = pretrained_files(model.architecture(), weights)
    config = {**json.loads(files["config.json"]), "command": command, "summary": numbers}
    write_folder(folder, {**files, "config.json": (json.dumps(config, indent=2) + "\n").encode()})


CARD = """# The embedded models

A tokenizer of the embedded scenes (64 px, 16 x 16 tokens of 256 codes) and two priors over its tokens: `ar` turns
semantic maps into images, `diffusion` captions. `regvq reconstruct`, `encode`, `decode`, `export`, `sample` and `demo`
use them where no run is given. They know 16 photographs (those of scikit-image's wheel) and nothing else: they show how
the commands work, not how good a tokenizer can be.

Made by `python bench/embedded_models.py` with regvq_fast {version}, torch {torch}, on two cores of an AMD
EPYC that other work shared (seed 0), by

{commands}

and saved in half precision, but for the quantizer; only words of training captions have weights. From the runs'
summaries, before that, on validation scenes:

| model | | |
|---|---|---|
{rows}

"layout", "classes" and "agreement" are what classifiers recognize of a caption or a map, in scenes, in the tokenizer's
reconstructions of them, and in samples (docs/priors.md).

MIT, like the package.
"""


def card(runs: Path) -> str:
    """Return the page that lies beside the models."""
    rows = []
    for name in MODELS:
        for number, value in json.loads((runs / name / "summary.json").read_text(encoding="utf-8")).items():
            if isinstance(value, (int, float)) and number not in ("images/s", "peak memory (GiB)"):
                rows.append(f"| {name} | {number} | {value:.4g} |")
    commands = "\n".join(f"    regvq {command.format(runs='runs/embedded')}" for command in COMMANDS.values())
    return CARD.format(version=__version__, torch=torch.__version__, commands=commands, rows="\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/embedded"), help="folder of the runs")
    runs = parser.parse_args().runs
    train(runs)
    for name in MODELS:
        pack(runs / name, FOLDER / name)
    (FOLDER / "README.md").write_text(card(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
