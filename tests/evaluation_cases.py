"""A world whose data and networks are exact, for tests of the evaluation."""

import torch

from fastdiff.diffusion_model import DiffusionModel
from fastdiff.schedule import Schedule

K, SHAPE, D = 3, (1, 8, 8), 64
SCHEDULE = Schedule.named("linear")


class World:
    """Images of K classes, each a Gaussian around its own mean: data, and networks whose outputs are exact."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        smooth = torch.nn.functional.interpolate(torch.randn(K + 10, 1, 4, 4, generator=g), size=8, mode="bicubic")
        patterns = smooth.flatten(1).double()
        self.means = 0.15 * patterns[:K]
        # classes overlap along what tells them apart, so that guidance has something to narrow
        basis = torch.cat([0.1 * patterns[:K], 0.08 * patterns[K:]])
        self.cov = basis.T @ basis + 0.03**2 * torch.eye(D, dtype=torch.double)
        self.values, self.vectors = torch.linalg.eigh(self.cov)
        self.g = g

    def draw(self, n):
        labels = torch.arange(n) % K
        z = torch.randn(n, D, generator=self.g, dtype=torch.double) * self.values.clamp(min=0).sqrt()
        return (self.means[labels] + z @ self.vectors.T).float().clamp(-1, 1).view(-1, *SHAPE), labels

    def denoise(self, x, t, y):
        """E[x0 | x, y]; for the null label K the posterior mixes the classes."""
        abar = torch.from_numpy(SCHEDULE.abar(t.double().numpy()))[:, None, None]
        var = abar * self.values + (1 - abar)
        r = (x.flatten(1).double()[:, None] - abar.sqrt() * self.means) @ self.vectors  # (B, K, D)
        x0 = self.means + (abar.sqrt() * self.values / var * r) @ self.vectors.T
        posterior = torch.softmax(-0.5 * (r**2 / var).sum(2), dim=1)  # (B, K)
        chosen = torch.nn.functional.one_hot(y.clamp(max=K - 1), K).double()
        mix = torch.where((y == K)[:, None], posterior, chosen)
        return (mix[:, :, None] * x0).sum(1).to(x.dtype).view_as(x)


def diffusion(network):
    return DiffusionModel(
        network, SCHEDULE, prediction="x0", num_classes=K, null_label=K, image_shape=SHAPE, clip_x0=False
    )


def memoriser(images, labels):
    """The denoiser of the training images themselves: what a network that overfits perfectly becomes."""

    def network(x, t, y):
        abar = torch.from_numpy(SCHEDULE.abar(t.double().numpy()))[:, None]
        a = images.flatten(1).double()
        # log N(x; sqrt(abar) a, 1 - abar), less what all images share
        log_p = (abar.sqrt() * (x.flatten(1).double() @ a.T) - 0.5 * abar * (a**2).sum(1)) / (1 - abar)
        log_p = log_p.masked_fill((y[:, None] != labels) & (y[:, None] != K), -torch.inf)
        return (torch.softmax(log_p, 1) @ a).to(x.dtype).view_as(x)

    return diffusion(network)


WORLD = World()
TRAIN, HELDOUT = WORLD.draw(600), WORLD.draw(150)
OPTIONS = dict(weights=(0.0, 1.5, 4.0), images=300, seeds=(0, 1, 2), steps=40, progress=False)
SMALL = dict(
    weights=(0.0, 1.0), images=30, seeds=(0, 1), steps=5, progress=False, model_sha256="ab" * 32, commit="c0ffee"
)
