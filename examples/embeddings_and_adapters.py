"""Prune a headless embedding model, and a model with two inputs and a dict output."""

import timm
import torch
from torch import Tensor, nn

import tpvprune

images = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(16)

# An embedding model: the outputs whose variance counts are the features.
embedder = timm.create_model("test_resnet", num_classes=0).eval()
result = tpvprune.prune(embedder, images, keep=0.6)
before, after = embedder(images[0]), result.model(images[0])
print("embedding", tuple(after.shape), "similarity", torch.cosine_similarity(before, after).mean())


class TwoInputs(nn.Module):
    """Takes an image and a mask, returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.mask = nn.Conv2d(1, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return {"logits": [B, 5], "map": [B, 16, H, W]}."""
        features = self.image(image) * self.mask(mask).sigmoid()
        return {"logits": self.head(features.mean((2, 3))), "map": features}


class Adapter(nn.Module):
    """One tensor in, the output that counts out: what every stage of tpvprune expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, packed: Tensor) -> Tensor:
        """Return the logits; channels 0 to 2 are the image, 3 is the mask."""
        return self.model(packed[:, :3], packed[:, 3:])["logits"]


packed = [torch.cat([x, (x[:, :1] > 0).float()], 1) for x in images]
two = tpvprune.prune(Adapter(TwoInputs().eval()), packed, keep=0.5)
smaller = two.model.model  # without the adapter: two inputs, a dict
print({k: tuple(v.shape) for k, v in smaller(packed[0][:, :3], packed[0][:, 3:]).items()})
print("MACs", two.report["pruned"]["macs"] / two.report["dense"]["macs"])
