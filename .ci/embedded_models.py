"""Pack the tokenizer and the priors of the embedded scenes that ship with the package, from finished runs.

    python .ci/embedded_models.py --runs runs/embedded

The runs are those of the commands below, an hour or two on two CPU cores. Their final weights go to
regvq_fast/scenes/pretrained, in half precision but for the quantizer's, on which tokens depend.
"""

import argparse
import json
from pathlib import Path

import torch

from regvq_fast.models.model import Model, read_model
from regvq_fast.models.pretrained import pretrained_files, write_folder
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.priors.diffusion.text import WordEncoder, words_of
from regvq_fast.priors.registry import PRIORS
from regvq_fast.scenes import ScenesDataset

FOLDER = Path(__file__).parents[1] / "regvq_fast" / "scenes" / "pretrained"
COMMANDS = {
    "tokenizer": "regvq train vq --compile --amp --perceptual-weight 0 --contrastive none "
    "--out runs/embedded/tokenizer",
    "tokens": "regvq tokens --tokenizer runs/embedded/tokenizer --out runs/embedded/tokens",
    "ar": "regvq train ar --cache runs/embedded/tokens --amp --out runs/embedded/ar",
    "diffusion": "regvq train diffusion --cache runs/embedded/tokens --amp --out runs/embedded/diffusion",
}
"""By the folder that each makes; regvq_fast/scenes/pretrained/README.md has them, and the numbers of the summaries."""


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
    files = pretrained_files(model.architecture(), weights)
    config = {**json.loads(files["config.json"]), "command": COMMANDS[folder.name], "summary": numbers}
    write_folder(folder, {**files, "config.json": (json.dumps(config, indent=2) + "\n").encode()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/embedded"), help="folder of the runs")
    runs = parser.parse_args().runs
    for name in ("tokenizer", "ar", "diffusion"):
        pack(runs / name, FOLDER / name)


if __name__ == "__main__":
    main()
