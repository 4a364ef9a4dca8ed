"""What rows are: flags that the scripts take, keys that never stand for two tokenizers, the paper's numbers."""

import dataclasses
import itertools
from functools import cache

import pytest
import tyro

from regvq_fast.cli.cache_tokens import CacheConfig
from regvq_fast.config import VQGAN_PRESETS, override, parse_config
from regvq_fast.paper.experiments import EXPERIMENTS, prior_of, published_dataset, recipe
from regvq_fast.paper.study import CHOSEN, QUANTIZER_FLAGS, TRIALS, TUNED_SIZE
from regvq_fast.priors.registry import PRIORS

SCALES = ("tiny", "full")


def tokenizer_config(preset, scale, row, experiment=None):
    own = experiment and EXPERIMENTS[experiment].own_recipe
    chosen = own(scale, preset == "scenes") if own else recipe(preset, scale)
    data = [] if preset == "scenes" else ["--data", "images"]
    return parsed(("--preset", chosen.preset, *data, *chosen.tokenizer, *row.flags))


@cache
def parsed(flags):
    """Building the parser takes a third of a second."""
    return parse_config(VQGAN_PRESETS, list(flags), "")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_is_a_configuration_that_train_vq_accepts(name, scale):
    for row in EXPERIMENTS[name].rows[scale]:
        tokenizer_config("ade20k", scale, row, name).check()


@pytest.mark.parametrize("scale", SCALES)
def test_rows_have_one_key_only_if_they_are_one_tokenizer(scale):
    of_key, of_config = {}, {}
    for name, row in ((name, row) for name, experiment in EXPERIMENTS.items() for row in experiment.rows[scale]):
        config = tokenizer_config("scenes", scale, row, name)
        assert of_key.setdefault(row.key, config) == config, f"{row.name} is another {row.key}"
        assert of_config.setdefault(config, row.key) == row.key, f"{row.name} has two keys"
    for experiment in EXPERIMENTS.values():
        keys = [row.key for row in experiment.rows[scale]]
        assert len(set(keys)) == len(keys)


def test_the_ablation_adds_one_thing_a_row():
    # What changes from row to row of Table 2, and nothing else does.
    configs = [tokenizer_config("ade20k", "full", row) for row in EXPERIMENTS["table2"].rows["full"]]
    baseline, prior, mask, contrast, probabilistic, masked = configs
    assert (baseline.quantizer.quantizer, baseline.loss.contrastive) == ("vq-gan", "none")
    assert prior == override(baseline, quantizer="reg-vq", mask_ratio=0.0)
    assert mask == override(prior, mask_ratio=0.4)
    assert contrast == override(mask, contrastive="cl")
    assert masked == override(probabilistic, contrastive_region="masked")
    assert (
        probabilistic
        == override(contrast, contrastive="pcl")
        == parse_config(VQGAN_PRESETS, ["--preset", "ade20k", "--data", "images"], "")
    )


def test_vq_vae_has_neither_perceptual_distance_nor_discriminator():
    row = next(row for row in EXPERIMENTS["table1"].rows["full"] if row.name == "VQ-VAE")
    loss = tokenizer_config("celebahq", "full", row).loss
    assert (loss.perceptual_weight, loss.disc_start, loss.contrastive) == (0.0, None, "none")


def test_masking_sweep_and_codebook_sizes_are_what_the_paper_varies():
    ratios = [
        tokenizer_config("ade20k", "full", row).quantizer.mask_ratio for row in EXPERIMENTS["masking"].rows["full"]
    ]
    assert ratios == [row.x for row in EXPERIMENTS["masking"].rows["full"]] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    # Without a contrastive loss, whose weights would change with the mask, the tiny sweep shares two rows of Table 2.
    tiny = EXPERIMENTS["masking"].rows["tiny"]
    configs = [tokenizer_config("scenes", "tiny", row) for row in tiny]
    assert [c.quantizer.mask_ratio for c in configs] == [row.x for row in tiny] == [0.0, 0.2, 0.4, 0.6, 1.0]
    assert {c.loss.contrastive for c in configs} == {"none"}
    ablation = {row.key: row.flags for row in EXPERIMENTS["table2"].rows["tiny"]}
    assert sum(ablation.get(row.key) == row.flags for row in tiny) == 2
    for scale, sizes in {"tiny": [256, 1024, 4096], "full": [1024, 4096, 8192]}.items():
        rows = EXPERIMENTS["codebook-size"].rows[scale]
        found = [(tokenizer_config("scenes", scale, row).quantizer, row) for row in rows]
        assert [(q.quantizer, q.num_codes) for q, _ in found] == [
            (name, size) for name in ("vq-gan", "reg-vq") for size in sizes
        ]
        assert all(q.num_codes == row.x for q, row in found)


def test_published_numbers_are_those_of_the_paper():
    # Table 1, Reg-VQ's row and VQ-VAE's, and Table 2's last row in the paper, which is Table 1's Reg-VQ on ADE20K.
    table1 = {row.name: row.published for row in EXPERIMENTS["table1"].rows["full"]}
    assert {name: tuple(numbers) for name, numbers in table1["Reg-VQ"].items()} == {
        "ade20k": (23.69, 18.44, 34.47),
        "celebahq": (10.09, 22.05, 15.34),
        "cub200": (10.84, 20.39, 14.14),
        "coco": (13.76, 18.64, 19.91),
    }
    assert table1["VQ-VAE"]["coco"].fid_r == 32.48
    ablation = [row for row in EXPERIMENTS["table2"].rows["full"] if row.published]
    assert len(ablation) == 5
    assert ablation[-1].published["ade20k"] == table1["Reg-VQ"]["ade20k"]
    assert ablation[0].published["ade20k"] == table1["VQ-GAN"]["ade20k"]
    # Each step of the ablation lowers FID[R] and FID[G].
    for before, after in itertools.pairwise(row.published["ade20k"] for row in ablation):
        assert after.fid_r < before.fid_r
        assert after.fid_g < before.fid_g


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("preset", ["scenes", "ade20k", "celebahq", "cub200", "coco"])
def test_priors_of_every_preset_are_configurations_that_their_scripts_accept(preset, scale):
    kind, chosen = prior_of(preset), recipe(preset, scale)
    presets = PRIORS[kind].presets
    config = parse_config(presets, ["--preset", chosen.preset, "--cache", "tokens", *chosen.prior], "")
    assert type(config) is type(presets["scenes"])
    assert published_dataset(preset) == ("ade20k" if preset == "scenes" else preset)


@pytest.mark.parametrize("scale", SCALES)
def test_the_study_compares_quantizers_on_equal_terms(scale):
    rows = EXPERIMENTS["quantizers"].rows[scale]
    sizes, series = [row.x for row in rows], [row.series for row in rows]
    assert sorted(set(sizes)) == [256, 1024, 4096, 16384]
    assert sizes == sorted(sizes)  # a table by codebook size
    assert set(zip(sizes, series, strict=True)) == set(itertools.product(set(sizes), set(series)))
    assert len(rows) == len(set(zip(sizes, series, strict=True)))
    for preset in ("scenes", "a folder"):
        configs = [tokenizer_config(preset, scale, row, "quantizers") for row in rows]
        with_table = [config.quantizer for config in configs if config.quantizer.quantizer not in ("fsq", "lfq", "bsq")]
        assert {quantizer.num_codes for quantizer in with_table} == set(sizes)
        assert len({quantizer.code_dim for quantizer in with_table}) == 1
        # A lattice has about as many codes, and channels of its own.
        assert all(abs(config.quantizer.num_codes / n - 1) < 0.1 for config, n in zip(configs, sizes, strict=True))
        # The quantizer and its own settings aside, all rows are one configuration.
        assert len({dataclasses.replace(config, quantizer=configs[0].quantizer) for config in configs}) == 1
        chosen = EXPERIMENTS["quantizers"].own_recipe(scale, preset == "scenes")
        prior = parse_config(PRIORS["ar"].presets, ["--cache", "tokens", "--condition", "none", *chosen.prior], "")
        assert prior.run.eval_every * 4 <= prior.optimizer.steps  # its fall in the last quarter is measured
        arguments = [] if preset == "scenes" else ["--data", "images"]
        cache = tyro.cli(CacheConfig, args=["--tokenizer", "vq", "--out", "tokens", *arguments, *chosen.cache])
        if arguments:  # the images of the cache are those that the tokenizer was trained on
            assert (cache.crop, cache.flip) == (configs[0].data.crop, configs[0].data.flip)


def test_all_quantizers_are_tuned_over_as_many_settings_and_the_chosen_ones_are_among_them():
    assert TRIALS.keys() == QUANTIZER_FLAGS.keys()
    assert {len(set(trials)) for trials in TRIALS.values()} == {6}
    assert all(settings in TRIALS[name] for name, settings in CHOSEN.items())
    rows = EXPERIMENTS["tuning"].rows["tiny"]
    assert len({row.key for row in rows}) == len({row.name for row in rows}) == 7 * len(TRIALS)
    study = {row.key: row.flags for row in EXPERIMENTS["quantizers"].rows["tiny"] if row.x == TUNED_SIZE}
    assert sum(study.get(row.key) == row.flags for row in rows) == len(TRIALS)  # those of the study are one run
    for row in rows:
        assert tokenizer_config("scenes", "tiny", row, "tuning").quantizer.num_codes in range(960, 1090)
