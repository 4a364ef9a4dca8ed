"""One class and one line in the registry are a quantizer that train/vq.py trains, with flags of its own."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.runs import FAST, SCRIPT, TINY

from regvq_fast.config import QuantizerConfig, quantizer_section
from regvq_fast.models import VQGAN
from regvq_fast.quantizers import QUANTIZERS, EMAQuantizer, Quantizer

MODULE = '''
from dataclasses import dataclass

import torch
from regvq_fast.quantizers import Quantizer, QuantizerSettings


@dataclass(frozen=True)
class ScalarSettings(QuantizerSettings):
    """Settings of the toy."""

    levels: int = 5
    """Levels of each channel."""

    def check(self):
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")


class ScalarQuantizer(Quantizer):
    """Channels rounded to levels; without an embedding (finite scalar quantization)."""

    Settings = ScalarSettings

    def forward(self, z, seed=None, row_offset=0):
        levels = self.settings.levels
        rows = self._to_rows(z).sigmoid() * (levels - 1)
        codes = rows + (rows.round() - rows).detach()
        powers = levels ** torch.arange(self.code_dim)
        indices = (codes.detach().long() * powers).sum(1)
        return self._deterministic(z, codes, indices, rows.new_zeros(()), {})

    def codes_of(self, indices):
        powers = self.settings.levels ** torch.arange(self.code_dim)
        digits = indices.unsqueeze(-1) // powers % self.settings.levels
        return digits.permute(0, 3, 1, 2).float()
'''
START = """
import runpy
import sys

from regvq_fast.quantizers import QUANTIZERS
from scalar import ScalarQuantizer

QUANTIZERS["scalar"] = ScalarQuantizer
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_new_quantizer_is_a_class_and_a_line(tmp_path: Path) -> None:
    (tmp_path / "scalar.py").write_text(MODULE)
    script = tmp_path / "start.py"
    script.write_text(START)
    flags = [*TINY, *FAST, "--quantizer", "scalar", "--levels", "3", "--code-dim", "2", "--num-codes", "9"]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), str(SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})

    shown = run("--quantizer", "scalar", "--help")
    assert shown.returncode == 0, shown.stderr
    help_text = shown.stdout
    assert "--levels INT" in help_text
    assert "Levels of each channel." in help_text
    assert re.search(r"levels .*\b1\b", run(*flags, "--levels", "1").stderr)

    trained = run(*flags, "--out", str(tmp_path / "run"))
    assert trained.returncode == 0, trained.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["quantizer"]["levels"] == 3
    assert config["architecture"]["quantizer"] == {
        "type": "ScalarQuantizer",
        "num_codes": 9,
        "code_dim": 2,
        "channels_last": False,
        "levels": 3,
    }
    assert (tmp_path / "run" / "pictures" / "codebook.png").exists()
    resumed = run("--resume", "--out", str(tmp_path / "run"), "--steps", "6")
    assert resumed.returncode == 0, resumed.stderr

    with pytest.raises(ValueError, match="ScalarQuantizer"):  # which is not registered here
        VQGAN.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_section_builds_each_of_them_with_its_settings(name: str) -> None:
    section = QuantizerConfig(num_codes=256, code_dim=4, fp32_scores=True).changed_to(name)
    quantizer = QUANTIZERS[name].from_section(section)
    assert isinstance(quantizer, Quantizer)
    sizes = {"fsq": (240, 3), "lfq": (256, 8), "bsq": (256, 8)}.get(name, (256, 4))
    assert (quantizer.num_codes, quantizer.code_dim, quantizer.fp32_scores) == (*sizes, True)
    assert type(quantizer)(**quantizer.arguments()).arguments() == quantizer.arguments()


def test_a_section_is_of_its_own_quantizer_by_default() -> None:
    section = quantizer_section("vq-vae")(decay=0.8)
    assert section.quantizer == "vq-vae"
    assert section.settings() == EMAQuantizer.Settings(decay=0.8)


def test_a_section_has_the_sizes_that_its_settings_decide() -> None:
    lfq = quantizer_section("lfq")(quantizer="lfq", num_codes=1024, code_dim=256)
    assert (lfq.num_codes, lfq.code_dim) == (1024, 10)
    fsq = quantizer_section("fsq")(quantizer="fsq", num_codes=1024)
    assert (fsq.num_codes, fsq.code_dim) == (1000, 4)
    assert replace(fsq, num_codes=1000) == fsq  # as a resumed run has it
    fsq = replace(fsq, levels=(3, 5))
    assert (fsq.num_codes, fsq.code_dim) == (15, 2)
    wrong = quantizer_section("lfq")(quantizer="lfq", num_codes=1000)
    with pytest.raises(ValueError, match=r"1000: use 512 or 1024$"):
        wrong.check()


def test_settings_of_another_quantizer_are_kept_where_both_have_them() -> None:
    section = quantizer_section("vq-vae")(num_codes=12, commitment=0.5, decay=0.8).changed_to("vq-gan")
    assert (section.quantizer, section.num_codes, section.commitment) == ("vq-gan", 12, 0.5)
    assert not hasattr(section, "decay")
    assert section.changed_to("vq-gan") is section
