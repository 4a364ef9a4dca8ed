"""The driver and its report: rows run once, resumed, never mixed; tables say what was measured."""

import csv
import itertools
import json
import os
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from PIL import Image

from regvq_fast.cli.evaluate import RESULTS
from regvq_fast.paper import driver
from regvq_fast.paper.commands import Commands
from regvq_fast.paper.driver import PaperConfig, reproduce
from regvq_fast.paper.report import Report

NET = "random-vgg16"


def measurement(name, value, **facts):
    return {"name": name, "value": value, "images": 64, "image_size": 32, **facts}


def evaluation(k):
    """Results of `regvq evaluate`, with numbers that identify row k."""
    versions = {"torch": "2.13.0"}
    return {
        "psnr": measurement("PSNR (dB)", 18 + k, device="CPU", versions=versions),
        "utilization": measurement("codebook utilization", 0.5 + k / 100),
        "fid_r": measurement("Fréchet distance[R] (a net)", 20.0 - k, features="a net", features_sha256="abc"),
    }


def words(line):
    """Return the words of a command of `regvq` that a stage runs: "train vq"."""
    return " ".join(itertools.takewhile(lambda word: not word.startswith("-"), line))


class Ran:
    """Stand-in for the processes: notes each command, and leaves what it is expected to leave."""

    def __init__(self):
        self.commands = []
        self.fails_at = None

    def __call__(self, _function, line, _launcher, _output):
        self.commands.append(line)
        name, out = words(line), Path(line[line.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if name.startswith("train "):
            (out / "config.json").touch()
            (out / "checkpoints" / "step-0000001").mkdir(parents=True, exist_ok=True)
        if len(self.commands) == self.fails_at:
            return 3
        if name == "evaluate":
            (out / RESULTS).write_text(json.dumps(evaluation(len(self.commands))))
        elif name != "tokens":
            summary = {} if name == "train vq" else {"agreement of samples": 0.25}
            (out / "summary.json").write_text(json.dumps(summary))
        return 0

    @property
    def names(self):
        return [words(command) for command in self.commands]


@pytest.fixture
def ran(monkeypatch):
    stand_in = Ran()
    monkeypatch.setattr(Commands, "run", lambda self, *arguments: stand_in(*arguments))
    monkeypatch.setattr(Report, "write_figures", lambda self, device: None)
    return stand_in


def table2(tmp_path, **changes):
    return PaperConfig("table2", out=tmp_path / "out", **{"rows": ("vq-gan", "reg-vq"), "fid_features": NET, **changes})


def test_a_row_is_tokenizer_tokens_prior_and_metrics(ran, tmp_path):
    reproduce(table2(tmp_path, rows=("reg-vq",), seeds=(4,), amp=True))
    assert ran.names == ["train vq", "tokens", "train ar", "evaluate"]
    folder = tmp_path / "out" / "runs" / "reg-vq" / "seed-4"
    tokenizer, cache, prior, metrics = map(" ".join, ran.commands)
    assert "--seed 4" in tokenizer
    assert "--amp" in tokenizer
    assert f"--tokenizer {folder / 'vq'}" in cache
    assert f"--cache {folder / 'tokens'}" in prior
    assert "--seed 4" in prior
    assert f"--run {folder / 'vq'} --prior-run {folder / 'prior'}" in metrics
    # What is run is what can be run by hand.
    record = json.loads((folder / "stages.json").read_text())
    assert record["prior"]["commands"] == [shlex.join(["regvq", *ran.commands[2]])]


def test_without_out_the_committed_results_stay_as_they_are(ran, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reproduce(PaperConfig("table2", rows=("reg-vq",), fid_features=NET))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert (tmp_path / "runs" / "paper" / "scenes-tiny" / "table2.md").exists()


def test_what_is_done_is_not_run_again_and_experiments_share_it(ran, tmp_path):
    reproduce(table2(tmp_path))
    assert len(ran.commands) == 8
    reproduce(table2(tmp_path))
    assert len(ran.commands) == 8
    reproduce(table2(tmp_path, seeds=(0, 1)))
    assert len(ran.commands) == 16
    # The sweep of masking ratios has 40 % and 20 % here, without a prior: the first tokenizer is there.
    reproduce(table2(tmp_path, rows=("reg-vq-no-contrast",)))
    rows = ("reg-vq-no-contrast", "reg-vq-mask-0.2-no-contrast")
    reproduce(PaperConfig("masking", out=tmp_path / "out", rows=rows, fid_features=NET))
    assert ran.names[20:] == ["train vq", "evaluate", "evaluate"]


def test_a_row_that_failed_goes_on_where_it_stopped(ran, tmp_path):
    ran.fails_at = 3
    with pytest.raises(ValueError, match=r"seed-0 .*\b3\b"):
        reproduce(table2(tmp_path, rows=("reg-vq",), amp=True))
    reproduce(table2(tmp_path, rows=("reg-vq",), compile=True, device="cpu"))
    assert ran.names == ["train vq", "tokens", "train ar", "train ar", "evaluate"]
    prior = tmp_path / "out" / "runs" / "reg-vq" / "seed-0" / "prior"
    # As fast as this call asks for, not as the one that was interrupted did.
    assert ran.commands[3][2:] == [*"--resume --device cpu --no-amp --compile --out".split(), str(prior)]


def test_a_row_that_is_removed_while_the_next_one_runs_is_an_error(ran, tmp_path, monkeypatch):
    """The table would be without it, with status 0."""
    first = tmp_path / "out" / "runs" / "vq-gan"

    def remove(self, *arguments):
        if first.exists() and "reg-vq" in str(arguments):
            shutil.rmtree(first)
        return ran(*arguments)

    monkeypatch.setattr(Commands, "run", remove)
    with pytest.raises(FileNotFoundError, match=r"VQ-GAN.*seed 0 .*summary\.json of the tokenizer was removed; run"):
        reproduce(table2(tmp_path))
    made = len(ran.commands)
    reproduce(table2(tmp_path))
    assert len(ran.commands) == made + 4


def test_what_was_stopped_before_its_first_checkpoint_begins_anew(ran, tmp_path):
    folder = tmp_path / "out" / "runs" / "reg-vq" / "seed-0" / "vq"
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.json").touch()
    reproduce(table2(tmp_path, rows=("reg-vq",)))
    assert "--resume" not in ran.commands[0]
    assert not (folder / "pictures").exists()  # a new run refuses a folder that isn't empty


def test_rows_made_with_old_spellings_of_flags_are_the_same(ran, tmp_path):
    config = PaperConfig("codebook-size", out=tmp_path / "out", rows=("reg-vq-f4-kl-0.3-256",), fid_features=NET)
    reproduce(config)
    made = len(ran.commands)
    (record,) = (tmp_path / "out").rglob("stages.json")
    assert "--kl-weight" in record.read_text()
    record.write_text(record.read_text().replace("--kl-weight", "--prior-weight"))
    reproduce(config)
    assert len(ran.commands) == made


def test_rows_of_other_settings_are_refused_before_anything_runs(ran, tmp_path):
    weights = tmp_path / "vgg.pth"
    weights.touch()
    reproduce(table2(tmp_path))
    with pytest.raises(ValueError, match=r"--preset scenes .*--out"):
        reproduce(table2(tmp_path, perceptual_weights=weights))
    reproduce(table2(tmp_path, compile=True, amp=True))  # speed is no setting
    assert len(ran.commands) == 8


def test_tables_hold_what_was_measured_beside_the_paper(ran, tmp_path):
    reproduce(table2(tmp_path, seeds=(0, 1)))
    out = tmp_path / "out"
    lines = list(csv.DictReader((out / "table2.csv").open()))
    # Four commands a row and seed; the number of the last one is in its numbers.
    assert [(line["row"], line["seed"], float(line["fid_r"])) for line in lines] == [
        ("baseline (VQ-GAN)", "0", 16.0),
        ("baseline (VQ-GAN)", "1", 8.0),
        ("+ PCL instead of CL", "0", 12.0),
        ("+ PCL instead of CL", "1", 4.0),
    ]
    header, _, baseline, ours = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (out / "table2.md").read_text().splitlines()
        if line.startswith("|")
    ]
    row = dict(zip(header, ours, strict=True))
    assert row["FD[R]"] == "8.00 ± 5.66"  # not called FID: the features aren't Inception's
    assert row["agreement of samples"] == "25.0 % ± 0.0"
    assert (row["paper: FID[R]"], row["paper: PSNR[R]"], row["paper: FID[G]"]) == ("23.69", "18.44", "34.47")
    assert dict(zip(header, baseline, strict=True))["paper: FID[R]"] == "28.17"
    text = (out / "table2.md").read_text()
    assert "64 validation images of 32 px, 2 seeds a row" in text
    assert "compare the order of the rows, not the values" in text
    details = json.loads((out / "table2.json").read_text())
    run = details["+ PCL instead of CL"]["1"]
    assert run["metrics"]["fid_r"]["features_sha256"] == "abc"
    assert run["protocol"] == {"images": 64, "image_size": 32}  # of all metrics, which have their names and values
    assert run["metrics"]["utilization"] == {"name": "codebook utilization", "value": 0.66}


def test_a_table_has_all_that_is_there_whatever_is_run(ran, tmp_path):
    reproduce(table2(tmp_path))
    reproduce(table2(tmp_path, rows=("reg-vq",), seeds=(1,)))
    lines = list(csv.DictReader((tmp_path / "out" / "table2.csv").open()))
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("baseline (VQ-GAN)", "0"),
        ("+ PCL instead of CL", "0"),
        ("+ PCL instead of CL", "1"),
    ]


def test_a_seed_without_its_prior_counts_where_it_was_measured(ran, tmp_path):
    reproduce(table2(tmp_path, rows=("reg-vq",)))
    reproduce(table2(tmp_path, rows=("reg-vq",), seeds=(1,), prior="none"))
    reproduce(table2(tmp_path, rows=("reg-vq",), seeds=(0, 1), report_only=True))
    lines = list(csv.DictReader((tmp_path / "out" / "table2.csv").open()))
    assert [(line["seed"], line["fid_r"] != "", line["agreement of samples"]) for line in lines] == [
        ("0", True, "0.25"),
        ("1", True, ""),
    ]


def test_a_report_of_nothing_is_an_error(ran, tmp_path):
    with pytest.raises(ValueError, match=r"no finished row of table2.*--report-only.*--out"):
        reproduce(table2(tmp_path, report_only=True))
    assert not (tmp_path / "out").exists()
    assert not ran.commands


def test_rows_side_by_side_share_the_cores_and_leave_their_output_in_files(ran, tmp_path, monkeypatch):
    threads, together = [], threading.Barrier(2, timeout=20)

    def side_by_side(self, function, line, launcher, output):
        if words(line) == "train vq":
            together.wait()  # both rows are at it
        threads.append(self._threads)
        output.write_text("its output")
        return ran(function, line, launcher, output)

    monkeypatch.setattr(Commands, "run", side_by_side)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    reproduce(table2(tmp_path, jobs=2))
    assert sorted(ran.names) == sorted(["train vq", "tokens", "train ar", "evaluate"] * 2)
    assert set(threads) == {4}
    assert [path.read_text() for path in (tmp_path / "out" / "runs").glob("*/seed-0/output.txt")] == ["its output"] * 2
    assert len(list(csv.DictReader((tmp_path / "out" / "table2.csv").open()))) == 2


def test_a_row_that_fails_lets_the_others_end_their_stage_and_begins_no_more(ran, tmp_path, monkeypatch):
    failed, together = threading.Event(), threading.Barrier(2, timeout=20)

    def one_fails(self, function, line, launcher, output):
        together.wait()
        if "vq-gan" in line:
            failed.set()
            return 3
        failed.wait(20)
        while not self.stopping:
            time.sleep(0.01)
        return ran(function, line, launcher, output)

    monkeypatch.setattr(Commands, "run", one_fails)
    with pytest.raises(ValueError, match=r"status 3; .*output\.txt has its output.*--quantizer vq-gan"):
        reproduce(table2(tmp_path, jobs=2, seeds=(0, 1)))
    assert ran.names == ["train vq"]


def test_numbers_of_other_protocols_are_not_compared(ran, tmp_path):
    reproduce(table2(tmp_path))
    path = tmp_path / "out" / "runs" / "reg-vq" / "seed-0" / "prior" / RESULTS
    for fact, value in (("features_sha256", "def"), ("top_p", 0.5)):
        found = json.loads(path.read_text())
        other = found | {"fid_r": found["fid_r"] | {fact: value}}
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=rf"\+ PCL instead of CL, seed 0.*{fact}"):
            reproduce(table2(tmp_path))
        path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("Reg-VAE",)}, "table2 .*'Reg-VAE'.*'baseline"),
        ({"preset": "ade20k"}, "--preset ade20k"),
        ({"data": Path("images")}, "--data images"),
        ({"preset": "ade20k", "data": Path("nowhere")}, "nowhere"),
        ({"seeds": ()}, "--seeds"),
        ({"fid_features": "vgg16:nowhere.pth"}, "nowhere.pth"),
        ({"fid_features": "none"}, "--fid-features none"),
        ({"processes": 0}, r"--processes .*\b0$"),
    ],
)
def test_bad_settings_are_refused(ran, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        reproduce(table2(tmp_path, **changes))
    assert not ran.commands
    assert not (tmp_path / "out").exists()


def test_what_a_prior_lacks_is_said_before_a_tokenizer_is_trained_for_it(ran, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for k in range(2):
            path = tmp_path / "photos" / split / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(path)
            path.with_suffix(".txt").write_text("a photograph")
    photos = {"preset": "coco", "data": tmp_path / "photos"}
    with pytest.raises(FileNotFoundError, match=r"\b2 .*photos .*segmentation"):
        reproduce(table2(tmp_path, **photos, prior="ar"))
    with pytest.raises(ValueError, match=r"--prior ar .*--preset coco.* scenes, ade20k"):
        reproduce(table2(tmp_path, **photos, prior="ar", scale="full"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"'openai/clip-vit-base-patch32' .*transformers"):
        reproduce(table2(tmp_path, **photos, scale="full"))
    assert not ran.commands
    reproduce(table2(tmp_path, **photos))  # the tiny scale has its own encoder of words
    assert "train diffusion" in ran.names


def test_several_gpus_train_under_torchrun(ran, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Commands, "run", lambda self, function, *of_command: lines.append((function, of_command)) or 1)
    with pytest.raises(ValueError, match=r"status 1\b.* torchrun --standalone --nproc-per-node 4 -m -- regvq_fast"):
        reproduce(table2(tmp_path, processes=4))
    (function, (line, launcher, output)), started = lines[0], []
    monkeypatch.setattr(torch.distributed.run, "main", started.append)
    monkeypatch.setattr(os, "setsid", lambda: None)
    function([*line, "--run", "runs/vq"], launcher, output)  # as metrics have it
    launched = torch.distributed.run.parse_args(started[0])
    assert (launched.nproc_per_node, launched.standalone) == ("4", True)
    assert launched.module
    assert launched.training_script == "regvq_fast"
    assert launched.training_script_args[:2] == ["train", "vq"]
    assert launched.training_script_args[-2:] == ["--run", "runs/vq"]


def test_a_command_that_made_nothing_may_be_corrected(ran, tmp_path, monkeypatch):
    """The tokenizer's, and that of metrics, which lie in the folder of what they are of."""
    wrong = {"perceptual_weights": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(Commands, "run", lambda self, *arguments: 1)
        with pytest.raises(ValueError, match=r"tokenizer .*status 1\b"):
            reproduce(table2(tmp_path, **wrong))
    reproduce(table2(tmp_path, rows=("vq-gan",)))
    assert not any(str(tmp_path) == flag for command in ran.commands for flag in command)

    (result,) = (tmp_path / "out" / "runs").rglob(RESULTS)
    result.unlink()
    ran.fails_at = len(ran.commands) + 1
    other = {"rows": ("vq-gan",), "fid_features": "vgg16"}
    with monkeypatch.context() as patch:
        patch.setattr(driver, "load_feature_net", lambda spec: None)
        with pytest.raises(ValueError, match="metrics with prior"):
            reproduce(table2(tmp_path, **other))
    reproduce(table2(tmp_path, rows=("vq-gan",)))
    assert result.exists()


def test_a_study_takes_any_data_and_has_settings_of_its_own(ran, tmp_path):
    with pytest.raises(ValueError, match=r"quantizers .*leave out --preset coco"):
        reproduce(PaperConfig("quantizers", preset="coco", data=tmp_path, out=tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--jobs .*\b0$"):
        reproduce(PaperConfig("quantizers", jobs=0, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
