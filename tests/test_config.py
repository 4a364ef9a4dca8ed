import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from regvq_fast.config import VQGAN_PRESETS, VQGANConfig, override, parse_config, read_config
from regvq_fast.priors.autoregressive.config import AR_PRESETS
from regvq_fast.settings import flag_of

REQUIRED_FLAGS = (
    "--preset --data --out --steps --batch-size --image-size --quantizer --num-codes --code-dim --logits --mask-ratio "
    "--tau --kl-weight --kl-scope --contrastive --contrastive-weight --disc-start --seed --device --compile "
    "--amp --ema --workers --perceptual-net --perceptual-weights"
).split()


@pytest.fixture(scope="module")
def help_text() -> str:
    script = Path(__file__).parents[1] / "train" / "vq.py"
    command = [sys.executable, str(script), "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_help_names_every_flag_and_explains_it(help_text: str) -> None:
    assert all(flag in help_text for flag in REQUIRED_FLAGS)
    for section in dataclasses.fields(VQGANConfig):
        for field in dataclasses.fields(section.default_factory):
            assert flag_of(section.default_factory, field.name) in help_text
    assert "Codebook size N. [256]" in help_text
    assert "python train/vq.py --compile --amp" in help_text


def test_flags_override_the_preset() -> None:
    config = parse_config(VQGAN_PRESETS, ["--preset", "cub200", "--data", "birds", "--num-codes", "4096"], "")
    assert config == override(VQGAN_PRESETS["cub200"], data=Path("birds"), num_codes=4096)
    assert config.optimizer.epochs == 300
    assert parse_config(VQGAN_PRESETS, ["--preset=coco"], "").optimizer.epochs == 50
    assert parse_config(VQGAN_PRESETS, [], "") == VQGAN_PRESETS["scenes"]


def test_epochs_that_are_asked_for_take_the_place_of_a_presets_steps() -> None:
    optimizer = parse_config(VQGAN_PRESETS, ["--epochs", "3"], "").optimizer
    assert (optimizer.epochs, optimizer.steps) == (3, None)
    assert parse_config(VQGAN_PRESETS, ["--epochs=3", "--steps", "7"], "").optimizer.steps == 7


def test_an_unknown_preset_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(VQGAN_PRESETS, ["--preset", "cifar"], "")
    message = capsys.readouterr()
    assert "celebahq" in message.out + message.err


def test_a_preset_of_another_script_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--preset coco .*scenes, ade20k, celebahq"):
        parse_config(AR_PRESETS, ["--preset", "coco"], "")


def test_paper_presets_have_the_papers_settings() -> None:
    config = VQGAN_PRESETS["ade20k"]
    assert config.optimizer.lr == 1.5e-4
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.batch_size == 40
    assert (config.quantizer.mask_ratio, config.quantizer.tau) == (0.4, 0.9)
    assert (config.data.image_size, config.quantizer.num_codes, config.quantizer.code_dim) == (256, 1024, 256)
    assert (config.loss.perceptual_net, config.loss.contrastive_net) == ("vgg16", "vgg19")


def test_override_refuses_fields_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        override(VQGANConfig(), learning_rate=1.0)


@pytest.mark.parametrize("preset", VQGAN_PRESETS)
def test_presets_pass_their_own_checks(preset: str) -> None:
    override(VQGAN_PRESETS[preset], data=Path("images")).check()


def test_a_contrastive_loss_of_masked_places_needs_masked_places() -> None:
    """Without one it would be 0 in every step."""
    config = override(VQGANConfig(), contrastive_region="masked")  # 16 x 16 tokens
    for fitting in ({"mask_ratio": 1 / 256}, {"mask_ratio": 0.01, "mask_mode": "bernoulli"}):
        override(config, **fitting).check()
    override(config, mask_ratio=0.0, contrastive="none").check()
    for mode, ratio in (("exact", 0.0), ("bernoulli", 0.0), ("exact", 0.003)):
        with pytest.raises(ValueError, match=f"--mask-ratio {ratio:g} .*256"):
            override(config, mask_ratio=ratio, mask_mode=mode).check()


def test_an_old_spelling_of_a_flag_works_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_config(VQGAN_PRESETS, ["--accumulate=2", "--prior-weight", "0.3", "--prior-scope", "image"], "")
    assert config == parse_config(
        VQGAN_PRESETS, ["--grad-accum-steps", "2", "--kl-weight=0.3", "--kl-scope", "image"], ""
    )
    assert (config.optimizer.accumulate, config.quantizer.prior_weight) == (2, 0.3)
    notices = [re.findall(r"--[\w-]+", line) for line in capsys.readouterr().err.splitlines()]
    renamed = {"--accumulate": "--grad-accum-steps", "--prior-weight": "--kl-weight", "--prior-scope": "--kl-scope"}
    assert notices == [[old, new] for old, new in renamed.items()]


OLD = Path(__file__).with_name("config-0.1.json")
"""Configuration of a 0.1 run, before settings were removed and sections shared."""


def test_a_runs_config_starts_a_new_run() -> None:
    config = parse_config(VQGAN_PRESETS, ["--config", str(OLD), "--lr=0.5", "--no-flip"], "")
    assert config == override(read_config(OLD, VQGANConfig), out=None, lr=0.5, flip=False)
    assert config.run.config is None  # a run doesn't depend on the file any more
    assert (config.quantizer.num_codes, config.optimizer.steps, config.run.resume) == (64, 6, False)
    assert parse_config(VQGAN_PRESETS, ["--config", str(OLD), "--epochs", "3"], "").optimizer.steps is None


@pytest.mark.parametrize("flags", [["--preset", "coco"], ["--resume", "--out", "runs/a"]])
def test_a_runs_config_excludes_other_defaults(flags: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--config .*config-0\.1\.json"):
        parse_config(VQGAN_PRESETS, [*flags, "--config", str(OLD)], "")


def test_old_configurations_are_read_unless_a_removed_setting_was_used(tmp_path: Path) -> None:
    values = json.loads(OLD.read_text())
    assert values["loss"].keys() - vars(read_config(OLD, VQGANConfig).loss).keys() == {
        "contrastive_max_places", "contrastive_layer_weights",
    }  # fmt: skip
    values["loss"]["l1_weight"] = 0.5  # removed once, and there again
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path, VQGANConfig).loss.l1_weight == 0.5
    values["loss"]["contrastive_max_places"] = 5
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="contrastive_max_places"):
        read_config(tmp_path, VQGANConfig)


def test_help_reads_on_two_screens(help_text: str) -> None:
    assert len(help_text.splitlines()) <= 145
