"""IBQ as its authors write it, with several M x N matrices."""

import torch.nn.functional as F
from torch import nn


class IndexPropagationQuantize(nn.Module):
    """Computation of SEED-Voken's class (src/IBQ/modules/vqvae/quantize.py), under its names; it isn't on PyPI."""

    def __init__(
        self,
        n_e,
        e_dim,
        beta=0.25,
        use_entropy_loss=False,
        remap=None,
        entropy_temperature=0.01,
        sample_minimization_weight=1.0,
        batch_maximization_weight=1.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(n_e, e_dim)
        self.beta, self.use_entropy_loss, self.remap = beta, use_entropy_loss, remap
        self.entropy_temperature = entropy_temperature
        self.sample_minimization_weight = sample_minimization_weight
        self.batch_maximization_weight = batch_maximization_weight

    def forward(self, z, temp=None, return_logits=False):
        codebook, rows = self.embedding.weight, z.permute(0, 2, 3, 1)
        logits = rows @ codebook.t()
        soft = logits.softmax(-1)
        indices = soft.argmax(-1)
        hard = F.one_hot(indices, len(codebook)).to(soft)
        quantized, codes = (hard - soft.detach() + soft) @ codebook, hard @ codebook
        loss = F.mse_loss(quantized, rows) + F.mse_loss(codes.detach(), rows)
        loss = loss + self.beta * F.mse_loss(codes, rows.detach())
        if self.use_entropy_loss:
            log_p = (logits / self.entropy_temperature).log_softmax(-1).flatten(0, 2)
            mean_p = log_p.exp().mean(0)
            entropies = -(log_p.exp() * log_p).sum(1).mean(), -(mean_p * (mean_p + 1e-5).log()).sum()
            balance = self.sample_minimization_weight * entropies[0] - self.batch_maximization_weight * entropies[1]
            loss = (loss, *entropies, balance)
        return quantized.permute(0, 3, 1, 2), loss, (None, None, indices.flatten())


IndexPropagationQuantize.__module__ = "src.IBQ.modules.vqvae.quantize"
