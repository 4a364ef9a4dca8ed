"""The masked prior: how many and which tokens are masked, its loss, its bound, and what it refuses."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from regvq_fast.models.model import read_model
from regvq_fast.priors import class_ids
from regvq_fast.priors.maskgit import MaskGIT
from regvq_fast.priors.maskgit.config import MASKGIT_PRESETS

SEED = torch.tensor(3)
CODES, CLASSES = 12, 5


def make_model(**options):
    torch.manual_seed(0)
    arguments = {"token_shape": (2, 3), "width": 16, "depth": 2, "heads": 2}
    return MaskGIT(CODES, CLASSES, **(arguments | options))


def randomized(model: MaskGIT) -> MaskGIT:
    """Give all weights a size at which each of them matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def make_batch(images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(CODES, (images, 2, 3), generator=generator)
    condition = torch.randint(CLASSES + 1, (images, 2, 3), generator=generator)
    image, position = torch.arange(images)[:, None], torch.arange(6)
    return tokens, condition, (image + position) % (image % 3 + 2) == 0  # 3, 2 and 1 tokens, and so on


@pytest.fixture
def model() -> MaskGIT:
    return randomized(make_model().double()).eval()


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_is_the_cross_entropy_of_masked_tokens(model, smoothing):
    tokens, condition, masked = make_batch()
    logits = model(torch.where(masked, CODES, tokens.flatten(1)), condition)
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    expected = torch.zeros(3, dtype=torch.float64)
    for image, position in masked.nonzero().tolist():
        target = torch.full((CODES,), smoothing / CODES, dtype=torch.float64)
        target[tokens.flatten(1)[image, position]] += 1 - smoothing
        expected[image] -= (target * log_p[image, position]).sum() / masked[image].sum()
    found = model.loss(tokens, condition, masked, label_smoothing=smoothing)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert model.bfloat16().loss(tokens, condition, masked).dtype == torch.float32


def test_every_position_sees_all_others_but_masked_tokens(model):
    tokens, condition, _ = make_batch()
    masked = torch.zeros(3, 6, dtype=torch.bool).index_fill_(1, torch.tensor([2]), True)
    logits = model(tokens.flatten(1).masked_fill(masked, CODES), condition)
    for position in (0, 5):
        others = tokens.flatten(1).clone()
        others[:, position] = (others[:, position] + 1) % CODES
        assert (model(others.masked_fill(masked, CODES), condition)[:, 2] != logits[:, 2]).any(-1).all()
    others = tokens.flatten(1).clone()
    others[:, 2] = (others[:, 2] + 1) % CODES
    loss = model.loss(tokens, condition, masked)
    torch.testing.assert_close(loss, -logits[:, 2].log_softmax(-1).gather(1, tokens.flatten(1)[:, 2:3])[:, 0].float())
    torch.testing.assert_close(
        model.loss(others, condition, masked),
        -logits[:, 2].log_softmax(-1).gather(1, others[:, 2:3])[:, 0].float(),
    )


def test_chunks_and_checkpoints_change_nothing(model, monkeypatch):
    batch = make_batch()
    expected = model.loss(*batch)
    expected_gradients = torch.autograd.grad(expected.sum(), model.parameters())
    monkeypatch.setattr(class_ids, "_LOSS_ELEMENTS", 5 * CODES)  # 18 rows: chunks of 5, 5, 5 and 3
    model.checkpoint_activations()
    value = model.loss(*batch)
    torch.testing.assert_close(value, expected)
    found = torch.autograd.grad(value.sum(), model.parameters())
    for ours, theirs in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # the logits of the loss are fp32


def test_the_head_has_the_weights_of_the_embedding(model):
    tokens, condition, _ = make_batch()
    before = model(tokens, condition)
    with torch.no_grad():
        model.tok_emb.weight[CODES] += 1.0  # the mask, which is no code
    assert torch.equal(model(tokens, condition), before)
    with torch.no_grad():
        model.tok_emb.weight.zero_()
        model.bias.copy_(torch.arange(CODES))
    assert torch.equal(model(tokens, condition)[0, 0], torch.arange(CODES).double())


# --- masks -----------------------------------------------------------------------------------------------------------


def test_training_masks_the_fractions_of_a_cosine(model):
    images, length = 20000, 6
    counts = model.training_counts(images, seed=SEED, first_image=0)
    # ceil(6 cos(pi/2 u)) = k for u between 2/pi acos(k/6) and 2/pi acos((k-1)/6).
    levels = [2 / math.pi * math.acos(k / length) for k in range(length + 1)]
    expected = images * torch.tensor([before - after for before, after in itertools.pairwise(levels)])
    found = counts.bincount(minlength=length + 1)
    assert found[0] == 0
    assert float(((found[1:] - expected) ** 2 / expected).sum()) < 25.7  # 5 degrees of freedom: 99.99 %
    uniform = model.uniform_counts(images, seed=SEED, first_image=0).bincount(minlength=length + 1)
    assert uniform[0] == 0
    assert float(((uniform[1:] - images / length) ** 2 / (images / length)).sum()) < 25.7


def test_masks_have_their_counts_and_any_positions(model):
    counts = torch.arange(6 * 4000) % 7
    masked = model.mask(counts, seed=SEED, first_image=5)
    assert torch.equal(masked.sum(1), counts)
    pairs = masked[counts == 2].long() @ (1 << torch.arange(6))
    found = pairs.bincount(minlength=64)
    found = found[found > 0]
    assert len(found) == 15
    expected = float(found.sum()) / 15
    assert float(((found - expected) ** 2 / expected).sum()) < 42.6  # 14 degrees of freedom: 99.99 %


def test_masks_do_not_depend_on_the_split_of_a_batch(model):
    def masks(batch: int, first_image: int | Tensor) -> Tensor:
        counts = model.training_counts(batch, seed=SEED, first_image=first_image)
        return model.mask(counts, seed=SEED, first_image=first_image)

    whole = masks(8, 100)
    assert torch.equal(torch.cat([masks(3, 100), masks(5, torch.tensor(103))]), whole)
    assert not torch.equal(masks(8, 108), whole)


def test_conditions_are_dropped_with_the_probability_asked_for(model):
    condition = (torch.arange(3000) % CLASSES)[:, None].expand(-1, 6)
    dropped = model.drop_condition(condition, 0.1, seed=SEED, first_image=0)
    null = (dropped == CLASSES).all(1)
    assert torch.equal(dropped[~null], condition[~null])
    assert abs(float(null.double().mean()) - 0.1) < 5 * math.sqrt(0.09 / 3000)
    assert torch.equal(dropped[1000:], model.drop_condition(condition[1000:], 0.1, seed=SEED, first_image=1000))


# --- bound -----------------------------------------------------------------------------------------------------------


def test_the_bound_holds_and_is_the_mean_over_orders():
    """The mean of the loss over all masks of each count is the mean of -log p over all orders, and above -log p."""
    model = randomized(make_model(token_shape=(1, 3)).double()).eval()
    tokens, condition = torch.tensor([[4, 0, 7]]), torch.tensor([[1, 3, 0]])
    masks = (torch.arange(1, 8)[:, None] >> torch.arange(3)) % 2 == 1
    counts = masks.sum(1)
    losses = model.loss(tokens.expand(7, -1), condition.expand(7, -1), masks).double()
    of_each = torch.stack([losses[counts == count].mean() for count in (1, 2, 3)])

    def log_p(order: list[int]) -> Tensor:
        seen = torch.full((1, 3), CODES)
        total = torch.zeros((), dtype=torch.float64)
        for position in order:
            total += model(seen, condition)[0, position].log_softmax(-1)[tokens[0, position]]
            seen[0, position] = tokens[0, position]
        return total

    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    each = torch.stack([log_p(order) for order in orders])
    torch.testing.assert_close(of_each.mean(), -each.mean() / 3, rtol=1e-6, atol=0)
    assert of_each.mean() > -(each.logsumexp(0) - math.log(6)) / 3


# --- settings, weights, refusals -------------------------------------------------------------------------------------


def test_the_imagenet_preset_is_the_papers():
    config = MASKGIT_PRESETS["imagenet"]
    model, optimizer = config.model, config.optimizer
    assert (model.depth, model.width, model.heads, model.dropout, model.label_smoothing) == (24, 768, 8, 0.1, 0.1)
    assert (optimizer.lr, optimizer.betas, optimizer.batch_size, optimizer.epochs) == (1e-4, (0.9, 0.96), 256, 300)
    with torch.device("meta"):
        network = MaskGIT(1024, 1000, label_names=[str(k) for k in range(1000)])
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == pytest.approx(172e6, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_classes": 2, "label_names": ("cat", "dog")}, {"num_classes": 0}],
    ids=["map", "label", "none"],
)
def test_saved_and_read_it_is_the_same(options, tmp_path):
    arguments = {"num_classes": CLASSES, "token_shape": (2, 3), "width": 16, "depth": 2, "heads": 2}
    model = randomized(MaskGIT(CODES, **(arguments | options))).eval()
    model.save_pretrained(tmp_path / "prior")
    again = read_model(tmp_path / "prior", MaskGIT)
    assert again.architecture() == model.architecture()
    conditions = {"segmentation": torch.ones(3, 2, 3), "label": torch.tensor([0, 1, 0]), "none": torch.zeros(3, 0)}
    ids = model.condition_ids(conditions[model.conditioned_on])
    tokens = make_batch()[0]
    assert torch.equal(again(tokens, ids), model(tokens, ids))


def test_it_compiles_to_one_graph(model):
    batch = make_batch()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*batch), model.loss(*batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 18, "heads": 4}, "width 18 .*4 heads"),
        ({"dropout": 1.0}, r"dropout .*\b1\.0$"),
        ({"token_shape": (16,)}, r"token_shape .*\(16,\)$"),
        ({"label_names": ("a", "b")}, r"\b2 label_names.*\b5$"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_wrong_batches_are_refused(model):
    tokens, condition, masked = make_batch()
    for given, message in [
        ((tokens[:, :1], condition), r"tokens .*\(3, 1, 3\)$"),
        ((tokens, condition[:2]), r"tokens .*condition .*3, 2$"),
        ((tokens + 2, condition), r"tokens .*\[0, 13\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*given)
    with pytest.raises(ValueError, match=r"tokens .*\[0, 12\)"):  # the mask is no target
        model.loss(torch.full_like(tokens, CODES), condition, masked)
    with pytest.raises(TypeError, match=r"tokens .*int32"):
        model(tokens.int(), condition)
    with pytest.raises(ValueError, match=r"condition_dropout .*-0\.5$"):
        model.drop_condition(condition, -0.5, seed=SEED, first_image=0)


def test_smoothing_that_is_no_fraction_is_refused():
    with pytest.raises(ValueError, match=r"--label-smoothing .*1\.5"):
        type(MASKGIT_PRESETS["scenes"].model)(label_smoothing=1.5).check()


def test_its_loss_is_in_nats_of_a_uniform_guess():
    """An untrained network has a loss of log N per masked token."""
    model = make_model()
    with torch.no_grad():
        model.tok_emb.weight.zero_()
    tokens, condition, masked = make_batch()
    torch.testing.assert_close(model.loss(tokens, condition, masked), torch.full((3,), math.log(CODES)))
