"""Conditions of priors: the choice of one, labels by name, rows of a grid; and models that have them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regvq_fast.models.model import Model, read_model
from regvq_fast.priors.autoregressive import TokenTransformer, sample_autoregressive
from regvq_fast.priors.autoregressive.sampler import ARSampler, ARSettings
from regvq_fast.priors.conditions import (
    choose_condition,
    conditions_of,
    fields_of,
    label_ids,
    no_conditions,
    render,
    take,
    trainable,
)
from regvq_fast.priors.diffusion import LabelEncoder, VQDiffusion, sample_diffusion
from regvq_fast.priors.diffusion.sampler import DiffusionSampler, DiffusionSettings
from regvq_fast.priors.maskgit import MaskGIT
from regvq_fast.priors.maskgit.sampler import MaskGITSampler, MaskGITSettings

NAMES = ("house cat", "Dog", "red fox")
TAKES = ("caption", "label", "none")


@pytest.mark.parametrize(
    ("wanted", "has", "chosen"),
    [
        (None, ("label", "segmentation"), "label"),
        (None, ("caption", "label"), "caption"),
        (None, ("segmentation",), "none"),
        (None, (), "none"),
        ("label", ("caption", "label"), "label"),
        ("none", ("caption", "label"), "none"),
    ],
)
def test_the_first_condition_that_is_there_is_taken(wanted: Any, has: Any, chosen: str) -> None:
    assert choose_condition(wanted, TAKES, has, "a cache") == chosen


@pytest.mark.parametrize(
    ("wanted", "has", "message"),
    [("segmentation", ("segmentation",), "caption, label, none"), ("label", ("caption",), r"a cache .*caption")],
)
def test_a_condition_that_is_not_there_is_refused(wanted: Any, has: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_condition(wanted, TAKES, has, "a cache")


def test_labels_are_found_by_name_or_number() -> None:
    assert label_ids(["dog", " House Cat ", "2", 0], NAMES, "--label").tolist() == [1, 0, 2, 0]
    assert label_ids(torch.tensor([2, 2]), NAMES, "labels").tolist() == [2, 2]
    assert label_ids(["1"], ("0", "2", "1"), "--label").tolist() == [2], "a name comes before a number"


@pytest.mark.parametrize(
    ("label", "message"), [("fox", "'fox' .*'red fox'"), ("zebra", "3 labels"), ("3", "3 is out of range"), (-1, "-1")]
)
def test_unknown_labels_are_refused_with_close_ones(label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"--label .*{message}"):
        label_ids([label], NAMES, "--label")


def test_conditions_of_a_batch() -> None:
    batch = {"tokens": torch.zeros(3, 2, 2), "caption": ["a", "b", "c"], "label": torch.tensor([2, 0, 1])}
    assert conditions_of(batch, "caption") == ["a", "b", "c"]
    assert conditions_of(batch, "none").shape == (3, 0)
    assert take(batch["caption"], [2, 0]) == ["c", "a"]
    assert take(batch["label"], [2, 0]).tolist() == [1, 2]
    assert (fields_of("label"), fields_of("none")) == (("label",), ())


def test_rows_of_a_grid() -> None:
    maps = torch.tensor([[[0, 2], [2, 2]]], dtype=torch.uint8)
    (row,), legend = render("segmentation", maps, (4, 8), NAMES)
    assert row.shape == (1, 3, 4, 8)
    assert legend == {0: "house cat", 2: "red fox"}
    (row,), legend = render("label", torch.tensor([1, 2]), (64, 64), NAMES)
    assert (row.shape[3], legend) == (192, {})
    assert row.shape[2] < 64, "a name needs no more than its line"
    assert not torch.equal(row[0], row[1])
    assert render("none", no_conditions(2), (64, 64)) == ([], {})


def test_priors_that_can_be_trained_are_described() -> None:
    takes = {"ar": ("segmentation", "label", "none"), "diffusion": TAKES}
    assert trainable(("label",), takes) == "ar by label, diffusion by label"
    assert trainable(("caption",), takes) == "ar without a condition, diffusion by caption"


def transformer(num_classes: int, names: tuple[str, ...] = ()) -> TokenTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"token_shape": (2, 3), "width": 16, "depth": 1, "heads": 2}
    model = TokenTransformer(7, num_classes, label_names=names, **sizes).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.cond_emb.weight)
    return model


def masked(names: tuple[str, ...]) -> MaskGIT:
    torch.manual_seed(0)
    model = MaskGIT(7, len(names), label_names=names, token_shape=(2, 3), width=16, depth=1, heads=2).eval()
    for embedding in (model.tok_emb, model.cond_emb, model.blocks[0].attn.qkv, model.blocks[0].attn.proj):
        torch.nn.init.normal_(embedding.weight)
    return model


def diffusion(encoder: Any) -> VQDiffusion:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"token_shape": (2, 3), "width": 16, "depth": 1, "heads": 2, "text_shape": (1, 16)}
    return VQDiffusion(7, text_encoder=encoder, num_steps=5, **sizes).eval()


def test_a_transformer_of_labels_is_one_of_maps_with_one_cell() -> None:
    """The mathematics of a prefix is the same: a 1 x 1 map and a label give equal logits and gradients."""
    model, twin = transformer(3, NAMES), transformer(3)
    twin = TokenTransformer(7, 3, token_shape=(2, 3), condition_shape=(1, 1), width=16, depth=1, heads=2).eval()
    twin.load_state_dict(model.state_dict())
    tokens, labels = torch.randint(7, (4, 2, 3)), torch.tensor([0, 2, 1, 3])
    expected = twin(tokens, twin.condition_ids(labels.view(4, 1, 1)))
    assert torch.equal(model(tokens, model.condition_ids(labels)), expected)
    assert model.conditioned_on == "label"
    assert not torch.equal(expected[0], expected[1])


@torch.no_grad()
def test_the_likelihood_of_a_label_prior_sums_to_one() -> None:
    """Over all images: in fp64, by enumeration."""
    torch.manual_seed(0)
    model = TokenTransformer(3, 2, label_names=("a", "b"), token_shape=(2, 2), width=8, depth=1, heads=2).double()
    torch.nn.init.normal_(model.head.weight)
    images = torch.cartesian_prod(*[torch.arange(3)] * 4)
    for label in (0, 1, 2):  # the last is the null condition
        logits = model(images, torch.full((len(images), 1), label))
        likelihood = logits.log_softmax(-1).gather(2, images[..., None]).sum((1, 2)).exp()
        assert abs(float(likelihood.sum()) - 1) < 1e-12
        loss = [float(model.loss(image[None], torch.tensor([[label]]))) for image in images[:5]]
        assert loss == pytest.approx((-likelihood[:5].log() / 4).tolist(), abs=1e-6)


def test_an_unconditional_transformer_always_sees_the_null_condition() -> None:
    model = transformer(0)
    assert (model.conditioned_on, model.condition_length) == ("none", 1)
    ids = model.condition_ids(no_conditions(5))
    assert ids.shape == (5, 1)
    dropped = model.corrupt(
        torch.zeros(5, 6, dtype=torch.int64), ids, seed=torch.tensor(1), first_image=0, condition_dropout=0.5
    )[1]
    assert torch.equal(dropped, ids)


def test_label_names_and_classes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"3 label_names.*2"):
        TokenTransformer(7, 2, label_names=NAMES)
    with pytest.raises(ValueError, match="negative"):
        TokenTransformer(7, -1)
    with pytest.raises(ValueError, match="names"):
        LabelEncoder(())


def test_a_label_is_a_text_of_one_word() -> None:
    model = diffusion(LabelEncoder(NAMES, width=16))
    assert (model.conditioned_on, model.label_names, model.text_shape) == ("label", NAMES, (1, 16))
    ids = model.condition_ids(torch.tensor([2, 0]))
    assert ids is not None
    assert torch.equal(ids, model.tokenize_text(["red fox", "house cat"]))
    tokens, t = torch.randint(8, (2, 6)), torch.tensor([1, 5])
    rows = model.text_encoder.embedding.weight[[2, 0]].view(2, 1, 16)
    assert torch.equal(model(tokens, t, ids), model(tokens, t, rows))
    assert not torch.equal(model(tokens, t, ids), model(tokens, t))


@pytest.mark.parametrize("model", [transformer(3, NAMES), transformer(0), diffusion(LabelEncoder(NAMES, width=8))])
def test_saved_priors_know_their_condition(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "prior")
    again: Any = read_model(tmp_path / "prior", TokenTransformer, VQDiffusion)
    assert again.conditioned_on == model.conditioned_on
    assert again.label_names == model.label_names
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


SAMPLERS: list[Any] = [
    (ARSampler, ARSettings, lambda names: transformer(len(names), names)),
    (DiffusionSampler, DiffusionSettings, lambda names: diffusion(LabelEncoder(names, width=16) if names else None)),
    (MaskGITSampler, MaskGITSettings, masked),
]


@pytest.mark.parametrize(("kind", "settings", "build"), SAMPLERS)
def test_samplers_take_labels_and_nothing(kind: Any, settings: Any, build: Any) -> None:
    sampler = kind(build(NAMES), settings(seed=3, guidance=2.0))
    labels = sampler.prepare(["dog", "red fox", "dog"], "--label")
    tokens = sampler.sample(labels)
    assert tokens.shape == (3, 2, 3)
    assert torch.equal(tokens[1:], sampler.sample(labels[1:], 1)), "an image depends on its number"
    assert not torch.equal(tokens, sampler.sample(torch.zeros(3, dtype=torch.int64)))

    sampler = kind(build(()), settings(seed=3))
    tokens = sampler.sample(no_conditions(3))
    assert torch.equal(tokens[2:], sampler.sample(no_conditions(1), 2))
    with pytest.raises(ValueError, match=r"--guidance 2 .*condition"):
        kind(build(()), settings(guidance=2.0))


def over_fitted(model: Any, loss: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def test_labels_bring_back_what_was_learned() -> None:
    """Both priors over-fit three labelled images, and give back each by its label."""
    images = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [6, 6, 0, 0, 6, 6]]).view(3, 2, 3)
    labels = torch.arange(3)
    torch.manual_seed(0)
    ar = TokenTransformer(7, 3, label_names=NAMES, token_shape=(2, 3), width=16, depth=1, heads=2)
    over_fitted(ar, lambda step: ar.loss(images, labels[:, None]), 200)
    found = sample_autoregressive(ar, labels[:, None], seed=0, temperature=0)
    assert torch.equal(found, images)

    vq_diffusion = diffusion(LabelEncoder(NAMES, width=16)).train()

    def loss(step: int) -> Tensor:
        t = torch.randint(1, 6, (3,), generator=torch.Generator().manual_seed(step))
        noisy = vq_diffusion.transition.corrupt(images.flatten(1), t, torch.tensor(step), 0)
        logits = vq_diffusion(noisy, t, vq_diffusion.condition_ids(labels))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), images.flatten())

    over_fitted(vq_diffusion, loss, 300)
    found = sample_diffusion(vq_diffusion, list(NAMES), seed=0, temperature=0)
    assert torch.equal(found, images)
