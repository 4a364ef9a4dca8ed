"""A tokenizer, a token cache, and a run of each prior, which tests of this folder share."""

from pathlib import Path

import pytest
from helpers.runs import FAST, PRIORS, fit, run_script, train


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    train(*FAST, "--out", out, "--ch-mult", 1, 1, 2)
    return out


@pytest.fixture(scope="session")
def cache(tokenizer: Path) -> Path:
    out = tokenizer.parent / "cache"
    flags = ["--scenes", 32, "--val-images", 10, "--views", 2, "--device", "cpu"]
    run_script("--tokenizer", tokenizer, "--out", out, *flags, script="cache_tokens.py")
    return out


@pytest.fixture(scope="session")
def runs(cache: Path) -> dict[str, Path]:
    """A run of each prior, evaluated by a classifier of regions that is fitted to as few scenes as by `few_regions`."""
    out = {prior: cache.parent / prior for prior in PRIORS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regvq_fast.scenes.evaluation.FITTED_TO", 128)
        for prior, folder in out.items():
            fit(prior, "--cache", cache, "--out", folder)
    return out
