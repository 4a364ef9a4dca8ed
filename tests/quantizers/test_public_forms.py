"""The baselines are their public implementations: values and every gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.plain_ibq import IndexPropagationQuantize
from torch import Tensor, nn

from regvq_fast.integrations import as_lucidrains
from regvq_fast.ops import tiling
from regvq_fast.quantizers import EMAQuantizer, IBQQuantizer, NearestQuantizer, Quantizer, SimVQQuantizer
from regvq_fast.quantizers.ema import k_means

library = pytest.importorskip("vector_quantize_pytorch")
M, N, D = 120, 24, 8
MAPS = (3, D, 8, 5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def equal(ours: object, theirs: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def step(module: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Quantized maps, indices, loss and the gradients of the input and of all parameters that train."""
    z = z.clone().requires_grad_()
    out = module(z)
    quantized, indices, loss = (out.quantized, out.indices, out.loss) if isinstance(module, Quantizer) else out[:3]
    upstream = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(5))
    leaves = [z, *(p for p in module.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad((quantized * upstream).sum() + 100 * loss, leaves)
    return quantized.detach(), indices, loss.detach(), list(gradients)


def is_row(codes: Tensor, rows: Tensor) -> Tensor:
    """True for codes (N, D) that are one of some rows (M, D)."""
    return (codes[:, None] - rows).norm(dim=2).amin(1) < 1e-4


@pytest.mark.parametrize("rotation", [True, False])
def test_simvq(rotation: bool) -> None:
    theirs = library.SimVQ(D, N, channel_first=True, rotation_trick=rotation).double()
    ours = SimVQQuantizer(N, D, rotation_trick=rotation).double()
    torch.testing.assert_close(ours.embedding.weight.std(), theirs.frozen_codebook.std(), rtol=0.2, atol=0)
    torch.testing.assert_close(ours.proj.weight.std(), theirs.code_transform.weight.std(), rtol=0.2, atol=0)
    assert SimVQQuantizer(N, D).settings.rotation_trick == library.SimVQ(D, N).rotation_trick
    ours.load_state_dict(
        {"embedding.weight": theirs.frozen_codebook, "proj.weight": theirs.code_transform.weight.detach()}
    )
    z = torch.randn(MAPS).double()
    equal(step(ours, z), step(theirs, z))
    indices = ours(z).indices
    assert len(indices.unique()) > N / 2
    equal(ours.codes_of(indices), theirs.indices_to_codes(indices))


def test_the_rotation_trick() -> None:
    theirs = library.VectorQuantize(
        D, N, rotation_trick=True, learnable_codebook=True, ema_update=False, accept_image_fmap=True
    )
    ours = NearestQuantizer(N, D, rotation_trick=True, commitment=1)
    ours.load_state_dict({"embedding.weight": theirs.codebook.detach()})
    z = torch.randn(MAPS)
    z[0, :, 0, 0] *= 1e-3
    quantized, indices, loss, (z_grad, codes_grad) = step(theirs, z)
    # The library's one loss has the gradients of both of ours, which have its value each.
    equal(step(ours, z), (quantized, indices, 2 * loss, [z_grad, codes_grad[0]]))
    plain = NearestQuantizer(N, D, commitment=1)
    plain.load_state_dict(ours.state_dict())
    assert not torch.allclose(step(plain, z)[3][0], z_grad)


def test_the_rotation_trick_turns_and_scales_gradients_as_the_latent_is() -> None:
    quantizer = NearestQuantizer(2, 2, rotation_trick=True, commitment=0)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 3.0], [-9.0, -9.0]]))
    z = torch.tensor([[2.0, 0.0]], requires_grad=True)  # (B, D)
    out = quantizer(z)
    assert torch.equal(out.quantized.detach(), torch.tensor([[0.0, 3.0]]))
    along, across = (torch.autograd.grad(out.quantized[0, k], z, retain_graph=True)[0] for k in (1, 0))
    # A quarter turn from the first axis to the second, times 3 / 2.
    torch.testing.assert_close(along, torch.tensor([[1.5, 0.0]]))
    torch.testing.assert_close(across, torch.tensor([[0.0, -1.5]]))


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("threshold", [0, 1])
def test_vq_vae_moves_its_codes_and_revives_the_dead_as_the_library_does(threshold: int, rotation: bool) -> None:
    """Its threshold is a count of a batch of M rows, ours a fraction of the M / N of uniform use."""
    theirs = library.VectorQuantize(
        D, N, decay=0.9, eps=0, commitment_weight=0.25, threshold_ema_dead_code=threshold, rotation_trick=rotation,
        accept_image_fmap=True,
    )  # fmt: skip
    ours = EMAQuantizer(N, D, decay=0.9, dead_threshold=threshold * N / M, rotation_trick=rotation)
    codes = torch.randn(N, D)
    codes[:4] = 50  # which no row selects
    ours.load_state_dict({"embedding.weight": codes}, strict=False)
    book = theirs._codebook
    book.embed.copy_(codes)
    book.embed_avg.copy_(codes * M / N)
    book.cluster_size.fill_(M / N)
    died = torch.zeros(N, dtype=torch.bool)
    for _ in range(20):
        z = torch.randn(MAPS)
        found, expected = step(ours, z), step(theirs, z)
        rows = z.permute(0, 2, 3, 1).reshape(-1, D)
        equal(found, expected)
        revived = is_row(ours.embedding.weight, rows)
        assert torch.equal(revived, is_row(book.embed[0], rows))
        died |= revived
        equal(ours.embedding.weight[~revived], book.embed[0][~revived])
        # The samples are others: continue with its own.
        with torch.no_grad():
            ours.embedding.weight.copy_(book.embed[0])
            ours.cluster_share.copy_(book.cluster_size[0] / M)
            ours.cluster_sum.copy_(book.embed_avg[0] / M)
    assert died[:4].all() == (threshold > 0)


def test_k_means() -> None:
    from vector_quantize_pytorch.vector_quantize_pytorch import kmeans

    rows = torch.randn(M, D) + 3 * torch.randn(5, D).repeat(M // 5, 1)
    start = torch.cat([rows[: N - 2], torch.full((2, D), 99.0)])  # two that no row is nearest to
    codes, counts = k_means(rows, start, 10)
    their_codes, their_counts = kmeans(rows[None], N, 10, sample_fn=lambda *_: start[None].clone())
    equal(codes, their_codes[0])
    assert torch.equal(counts, their_counts[0])


def test_vq_vae_starts_at_the_means_of_its_latents() -> None:
    centres = 10 * F.normalize(torch.randn(6, D), dim=1)
    z = (centres[torch.randint(6, (M,))] + 0.1 * torch.randn(M, D)).view(3, 8, 5, D).movedim(-1, 1)
    errors = {}
    for kmeans_init in (False, True):
        quantizer = EMAQuantizer(N, D, kmeans_init=kmeans_init)
        torch.manual_seed(3)
        quantizer.initialize(z)
        fresh = copy.deepcopy(quantizer)
        torch.manual_seed(4)
        quantizer(z)
        errors[kmeans_init] = float(F.mse_loss(quantizer.eval()(z).quantized, z))
    # Between two steps of k-means codes hardly move: the averages start as if they had always been there.
    used = fresh.cluster_share * M > 1
    torch.testing.assert_close(quantizer.embedding.weight[used], fresh.embedding.weight[used], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fresh.cluster_share.sum(), torch.tensor(1.0))
    assert errors[True] < 0.8 * errors[False]
    stand_in = as_lucidrains(EMAQuantizer(N, D, kmeans_init=True), accept_image_fmap=True)
    torch.manual_seed(3)
    stand_in(z)  # the first batch in training is what it starts from
    torch.testing.assert_close(stand_in.embedding.weight[used], fresh.embedding.weight[used], rtol=1e-3, atol=1e-3)
    many = EMAQuantizer(2 * M, D, kmeans_init=True)  # more codes than latents: half of them are dead
    many.initialize(z)
    assert int((many.cluster_share == 0).sum()) == M
    assert torch.isfinite(many(z).quantized).all()
    assert torch.isfinite(many.embedding.weight).all()


@pytest.mark.parametrize(
    ("dtype", "options", "settings"),
    [
        (torch.float32, {}, {"entropy_weight": 0}),
        (torch.float32, {"beta": 0.5}, {"entropy_weight": 0, "codebook_weight": 0.5}),
        (torch.float64, {"use_entropy_loss": True}, {}),
        (
            torch.float64,
            {"use_entropy_loss": True, "entropy_temperature": 0.7},
            {"entropy_temperature": 0.7, "entropy_weight": 0.3},
        ),
    ],
)
def test_ibq(dtype: torch.dtype, options: dict, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TILE_ELEMENTS": 1, "_MIN_TILE_ROWS": 16, "KEPT_ELEMENTS": 0}.items():
        monkeypatch.setattr(tiling, name, value)
    ours = IBQQuantizer(N, D, **settings).to(dtype)
    theirs = IndexPropagationQuantize(N, D, **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())

    class Public(nn.Module):
        """Its loss as SEED-Voken's training adds it up."""

        def __init__(self) -> None:
            super().__init__()
            self.quantizer = theirs

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            quantized, loss, (_, _, indices) = theirs(z)
            if theirs.use_entropy_loss:
                loss = loss[0] + ours.settings.entropy_weight * loss[3]
            return quantized, indices.view(len(z), *z.shape[2:]), loss

    z = torch.randn(MAPS, dtype=dtype)
    found, expected = step(ours, z), step(Public(), z)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(gradient.abs().sum(-1).min() > 0 for gradient in found[3][1:]), "every code learns"
    theirs.use_entropy_loss = False  # unused in evaluation
    torch.testing.assert_close(ours.eval()(z).loss, theirs(z)[1], rtol=1e-4, atol=1e-4)
