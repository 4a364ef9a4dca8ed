"""Non-finite values are skipped, counted and named; codebook collapse is reported."""

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import FAST, assert_equal, checkpoints, records, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import regvq_fast.training.vqgan_recipe
from regvq_fast import ranks
from regvq_fast.config import VQGANConfig, override
from regvq_fast.quantizers import QUANTIZERS
from regvq_fast.training.optimization import AveragedWeights, Rollback, Watch
from regvq_fast.training.trainer import Trainer
from regvq_fast.training.vqgan_recipe import CodebookMeter, VQGANRecipe

NAN, INF = float("nan"), float("inf")


def tiny_trainer(**changes: Any) -> Trainer[Any]:
    config = override(
        VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=99,
        batch_size=4, perceptual_weight=0, contrastive="none", device="cpu", disc_start=0, disc_filters=4, ema=0.5,
    )  # fmt: skip
    return Trainer(VQGANRecipe, override(config, **changes))


def numbers(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def trained(trainer: Trainer[Any]) -> dict[str, Any]:
    """Return the state that only a completed step changes."""
    state = trainer.state()
    average = {name: value for name, value in trainer.eval_model.state_dict().items() if name != "quantize.tau"}
    model = {
        name: value for name, value in trainer.networks.model.state_dict().items() if name != "quantize.tau"
    }  # a schedule
    optimizers = [optimizer["state"] for optimizer in state["optimizers"]]
    return copy.deepcopy(
        {"model": model, "average": average, "optimizers": optimizers, "discriminator": state["others"]}
        | {"auxiliary": state["companions"]}
    )


def let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ops take what is not finite, as they do on a GPU, where looking would mean waiting."""
    for op in ("vector_quantize", "assign_codes", "weighted_info_nce", "softmax_statistics"):
        monkeypatch.setattr(sys.modules[f"regvq_fast.ops.{op}"], "check_finite", lambda *_: 0.0)
    monkeypatch.setattr("regvq_fast.quantizers.quantizer.check_finite", lambda *_: 0.0)


def break_images(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = NAN) -> None:
    """Put one bad pixel into the images of these steps."""
    original, step = regvq_fast.training.vqgan_recipe.to_float, Trainer.step
    broken = []

    def to_float(images: Tensor) -> Tensor:
        images = original(images)
        if broken:
            images[0, 0, 3, 5] = value
        return images

    def counted(trainer: Trainer[Any], number: int) -> None:
        if number in steps:
            broken.append(number)
        step(trainer, number)
        broken.clear()

    monkeypatch.setattr(regvq_fast.training.vqgan_recipe, "to_float", to_float)
    monkeypatch.setattr(Trainer, "step", counted)


def break_terms(monkeypatch: pytest.MonkeyPatch, trainer: Trainer[Any], *names: str) -> None:
    """Make terms of the loss that the step reports not finite."""
    recipe = trainer.recipe
    original = recipe.train_step

    def step(*arguments: Any, **others: Any) -> Any:
        metrics, indices = original(*arguments, **others)
        return {name: value * NAN if name in names else value for name, value in metrics.items()}, indices

    monkeypatch.setattr(recipe, "train_step", step)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(("value", "cause"), [(NAN, "latents"), (INF, "l1"), (NAN, "l1")])
def test_a_bad_pixel_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, quantizer: str, value: float, cause: str
) -> None:
    trainer = tiny_trainer(quantizer=quantizer, num_codes=256, dropout=0.1, lecam_weight=0.1, r1_weight=0.1, r1_every=1)
    break_images(monkeypatch, {2, 3}, value)
    if cause != "latents":
        let_through(monkeypatch)
    for step in range(2):
        trainer.step(step)
    before = trained(trainer)
    assert before["auxiliary"]["lecam"]["averages"].abs().min() > 0
    for step in (2, 3):
        trainer.step(step)
        assert trainer.optimization.watch.last_step_was_skipped()
    assert_equal(before, trained(trainer), quantizer)
    values, warnings = trainer.record()
    assert warnings == []
    assert (values["skipped"], values["not_finite"]) == (2, cause)
    assert all(value == value for value in values.values()), "means are over the finite numbers"
    assert trainer.optimization.warnings(max_skipped=20) == [
        f"2 steps were skipped since the last record, non-finite: {cause}"
    ]

    trainer.step(4)
    values, _ = trainer.record()
    assert values["skipped"] == 0
    assert "not_finite" not in values
    assert trainer.optimization.warnings(max_skipped=20) == []
    assert not torch.equal(trainer.networks.model.last_layer, before["model"]["decoder.conv_out.weight"])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (["loss", "quantizer", "kl"], "kl"),
        (["generator"], "generator"),
        (["discriminator", "lambda"], "discriminator"),
        (["loss"], "loss"),
    ],
)
def test_the_term_that_was_first_is_named(
    monkeypatch: pytest.MonkeyPatch, names: list[str], cause: str, parts: int
) -> None:
    trainer = tiny_trainer(accumulate=parts)
    before = trained(trainer)
    break_terms(monkeypatch, trainer, *names)
    trainer.step(0)
    for name in ("model", "average", "discriminator"):
        assert_equal(before[name], trained(trainer)[name], name)
    assert trainer.record()[0]["not_finite"] == cause
    (warning,) = trainer.optimization.warnings(max_skipped=20)
    assert re.search(rf"\ba step .*{cause}$", warning)


def test_a_gradient_that_is_not_finite_is_noticed_without_clipping() -> None:
    trainer = tiny_trainer(clip_grad=0)
    before = trained(trainer)["model"]
    trainer.recipe.discriminator.main[0].weight.register_hook(lambda gradient: gradient * INF)
    trainer.step(0)
    assert_equal(before, trained(trainer)["model"], "weights")
    values, _ = trainer.record()
    assert values["not_finite"] == "grad_norm_discriminator"
    assert values["grad_norm"] > 0


def test_each_optimizer_takes_gradients_of_at_most_the_norm_of_clip_grad() -> None:
    """AdamW's first moment is then a tenth of what it was given."""

    def taken(clip_grad: float) -> dict[str, Tensor]:
        trainer = tiny_trainer(clip_grad=clip_grad)
        trainer.step(0)
        moments = {
            name: [10 * state["exp_avg"].flatten() for state in adamw.state.values()]
            for name, (adamw,) in trainer.optimization.optimizers.items()
        }
        return {name: torch.cat(values) for name, values in moments.items()}

    whole, clipped, loose = taken(0), taken(1e-3), taken(1e6)
    assert len(whole) == 2
    for name, gradient in whole.items():
        assert gradient.norm() > 2e-3, name
        torch.testing.assert_close(clipped[name], gradient * (1e-3 / gradient.norm()), rtol=1e-3, atol=1e-9)
        assert torch.equal(loose[name], gradient), name


def test_a_step_never_waits_for_the_device() -> None:
    class NoLook(TorchDispatchMode):
        """On a GPU, looking at a value is what waits."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
            assert func is not torch.ops.aten.nonzero.default, "a shape depends on values"
            return func(*args, **(kwargs or {}))

    trainer = tiny_trainer(lecam_weight=0.1, r1_weight=0.1, r1_every=1)
    trainer.step(0)
    with NoLook():
        trainer.step(1)
    with pytest.raises(AssertionError, match="a value was read"), NoLook():
        trainer.optimization.watch.last_step_was_skipped()


def test_the_watch_of_a_window() -> None:
    watch = Watch(torch.device("cpu"))
    for l1, kl, norm, skip in [(1.0, 2.0, 4.0, 0), (NAN, 3.0, INF, 1), (3.0, INF, 5.0, 1), (5.0, 4.0, 6.0, 0)]:
        watch.add(numbers(quantizer=kl / 10, l1=l1, kl=kl))
        watch.judge(numbers(grad_norm=norm))
        assert watch.skip.item() == skip
    watch.add(numbers(l1=7.0))
    watch.judge(numbers(grad_norm=INF))
    reading = watch.read()
    assert reading.means == pytest.approx({"l1": 4.0, "kl": 3.0, "quantizer": 0.3, "grad_norm": 5.0})
    assert (reading.skipped, sorted(reading.causes), reading.longest) == (3, ["grad_norm", "kl", "l1"], 2)
    watch.add(numbers(l1=NAN))
    watch.judge(numbers(grad_norm=1.0))
    state = copy.deepcopy(watch.state_dict())
    for each in (watch, again := Watch(torch.device("cpu"))):
        if each is again:
            again.load_state_dict(state)
        reading = each.read()
        assert reading.means == {"grad_norm": 1.0}
        assert (reading.skipped, reading.causes, reading.longest) == (1, ["l1"], 2), "the row spans two windows"


def test_skipped_averages_and_forward_passes_leave_no_trace() -> None:
    skip = torch.ones(())
    linear = nn.Linear(3, 3)
    average = AveragedWeights(linear, 0.75, skip)
    before = copy.deepcopy(average.module.state_dict())
    nn.init.constant_(linear.weight, 8.0)
    average.update(linear)
    assert_equal(before, average.module.state_dict(), "skipped")
    skip.zero_()
    average.update(linear)
    torch.testing.assert_close(average.module.weight, 0.75 * before["weight"] + 0.25 * 8)

    module = nn.BatchNorm1d(3)
    rollback = Rollback(module)
    rollback.save()
    module(torch.full((4, 3), NAN))
    assert module.running_mean is not None
    assert module.running_mean.isnan().all()
    rollback.restore(torch.ones(()))
    assert torch.equal(module.running_mean, torch.zeros(3))
    assert int(module.num_batches_tracked or 0) == 0
    rollback.save()
    module(torch.randn(4, 3))
    rollback.restore(torch.zeros(()))
    assert int(module.num_batches_tracked or 0) == 1


def test_a_run_that_only_skips_is_stopped_and_keeps_its_last_good_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_images(monkeypatch, set(range(5, 99)))
    out = tmp_path / "run"
    flags = ["--steps", 40, "--checkpoint-every", 2, "--max-skipped", 6, "--log-every", 4]
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", out, *flags)
    assert stop.value.code == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"step 12\b.*\b7 steps .*--max-skipped 6\b.* latents\b.* step-0000004\b", said)
    assert re.search("--lr.*--clip-grad.*--no-amp", said)
    assert said.endswith(f": python train/vq.py --resume --out {out}")
    assert checkpoints(out) == ["step-0000002", "step-0000004"]
    assert [(row["step"], row["skipped"]) for row in records(out)] == [(1, 0), (4, 0), (8, 3), (12, 4)]


def test_a_rank_whose_step_fails_says_so_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_images(monkeypatch, {3})
    step = Trainer.step

    def on_rank_1(trainer: Trainer[Any], number: int) -> None:
        if number == 3:  # the others would be waiting for its gradients
            two = SimpleNamespace(**{**vars(ranks), "world_size": lambda: 2})
            monkeypatch.setattr("regvq_fast.training.trainer.ranks", two)
            monkeypatch.setattr("regvq_fast.cli.train.rank", lambda: 1)
        step(trainer, number)

    monkeypatch.setattr(Trainer, "step", on_rank_1)
    with pytest.raises(SystemExit) as stop:
        train(*FAST, "--out", tmp_path / "run", "--checkpoint-every", 2)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert re.search(r"step 3: x has .* step-0000002\b.*--lr", said)


def test_a_checkpoint_waits_for_a_good_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_images(monkeypatch, {2, 3})
    train(*FAST, "--out", tmp_path / "run", "--steps", 6, "--checkpoint-every", 3)
    assert checkpoints(tmp_path / "run") == ["step-0000005", "step-0000006"]
    assert re.search(r"warning: 2 steps .*latents", " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize(
    ("counts", "threshold", "alarm"),
    [
        ([25, 75, 0, 0, 0, 0, 0, 0, 0, 0], 0.3, True),
        ([25, 75, 0, 0, 0, 0, 0, 0, 0, 0], 0.2, False),
        ([100, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0.0, False),
        ([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], 0.3, False),  # two tokens can't use more
        ([2, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0.6, True),
    ],
)
def test_a_collapse_is_told_of_once(counts: list[int], threshold: float, alarm: bool) -> None:
    config = override(VQGANConfig(), num_codes=10, collapse_threshold=threshold)
    meter = CodebookMeter(config, torch.device("cpu"))
    first = meter.collapse(torch.tensor(counts))
    assert (first is not None) == alarm
    assert meter.collapse(torch.tensor(counts)) is None
    if first:
        assert f"{sum(count > 0 for count in counts):d}0.0% of 10 codes were used" in first


def test_a_run_tells_of_a_collapse_after_its_warm_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def collapsed(update: Callable[..., None]) -> Callable[..., None]:
        return lambda usage, indices: update(usage, torch.zeros_like(indices))

    usage = regvq_fast.training.vqgan_recipe.CodebookUsage
    monkeypatch.setattr(usage, "update", collapsed(usage.update))
    flags = ["--steps", 8, "--warmup-steps", 4, "--log-every", 1]
    train(*FAST, "--out", tmp_path / "run", *flags)
    lines = capsys.readouterr().out.splitlines()
    told = [k for k, line in enumerate(lines) if line.startswith("warning: the codebook is collapsing: 6.2% of 16")]
    assert len(told) == 1
    assert lines[told[0] - 1].startswith("step 5/8")
