"""Small networks trained in many ways, and every measure taken of each: the sets of papers.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune import PruningResult, evaluate, find_groups, prune
from tpvprune.cifar_resnet import CifarResNet
from tpvprune.diagnostics.jacobian_norms import jacobian_norms
from tpvprune.diagnostics.measures import (
    channel_tpv,
    l2_norm,
    pac_bayes_origin,
    path_norm,
    sharpness,
)
from tpvprune.diagnostics.normalized_loss import normalized_loss
from tpvprune.diagnostics.rescaling import rescale
from tpvprune.diagnostics.trajectory import Trajectory, input_lipschitz
from tpvprune.diagnostics.volume import local_volume
from tpvprune.images.loading import choose_images, in_memory
from tpvprune.images.preprocessing import Preprocessing, resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.repairs.compensation import compensate_weights
from tpvprune.widths.limits import Limits

BATCH, FEW = 64, 128
KEEP, NUM_TO_PRUNE = 0.5, 512  # of the MACs; images that pruning sees
CHAIN_CURVES = (("sgd", 0.05), ("sgd", 0.01), ("adam", 1e-3))


@dataclass(frozen=True)
class Images:
    """Training and test images with labels."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Way:
    """How one network is trained.

    A part of the labels may be replaced by random ones: for the first epochs only
    (``pretrain_wrong``), or for good (``wrong``); ``attack`` adds so many images with random
    labels to the training set, which the network must learn beside the true ones.
    """

    set: str
    seed: int = 0
    init_scale: float = 1.0
    pretrain_wrong: float = 0.0
    wrong: float = 0.0
    attack: int = 0
    num_train: int = 1000
    opt: str = "sgd"
    lr: float = 0.05
    target: float = 0.01
    max_epochs: int = 200
    arch: str = "chain"
    weight_decay: float = 0.0
    mirrored: bool = False


def digits(seed: int = 0) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, 1,000 of them to train."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.as_tensor(found.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1000], order[1000:]
    return Images("digits", (x[train], y[train]), (x[test], y[test]))


def folder(name: str, train_dir: str, test_dir: str, nums: tuple[int, int]) -> Images:
    """So many labelled images to train and to test, at 32 pixels."""
    how: Preprocessing = resolve_preprocessing(
        nn.Identity(), input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0
    )
    parts = []
    for place, num in zip((train_dir, test_dir), nums, strict=True):
        chosen = choose_images(
            open_images(place, labelled=True), how, num_images=num, seed=0, batch_size=BATCH,
            workers=1, labelled=True,
        )  # fmt: skip
        x, y = (torch.cat(t) for t in zip(*in_memory(chosen), strict=True))
        parts.append((x, y))
    return Images(name, parts[0], parts[1])


def network(images: Images, way: Way) -> nn.Module:
    """A chain of convolutions with ReLU and no BatchNorm, He's initialisation times a scale.

    Or a ResNet for CIFAR of the depth in its name, 6 n + 2.
    """
    torch.manual_seed(way.seed)
    if way.arch != "chain":
        return CifarResNet((int(way.arch.removeprefix("resnet")) - 2) // 6)
    channels, size = images.train[0].shape[1], images.train[0].shape[2]
    width = 16 if size <= 8 else 24
    layers: list[nn.Module] = []
    while size > 4:
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU()]
        channels, width, size = width, min(2 * width, 48), size // 2
    layers += [nn.Flatten(), nn.Linear(channels * size**2, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.weight.data.mul_(way.init_scale)
            nn.init.zeros_(module.bias)
    return model


def trained(images: Images, way: Way) -> tuple[nn.Module, Trajectory, tuple[Tensor, Tensor], int]:
    """Train until the loss on all training images is at ``target`` or epochs run out.

    Returns:
        The network, its trajectory, the images that it was trained on with the labels that it
        saw (attack set left out), and the epochs taken.
    """
    generator = torch.Generator().manual_seed(1000 + way.seed)
    x, y = (t[: way.num_train] for t in images.train)
    y = corrupted(y, way.wrong, generator)
    first = corrupted(y, way.pretrain_wrong, generator)
    more = (images.test[0][:0], y[:0])
    if way.attack:
        kept = images.train[0][way.num_train : way.num_train + way.attack]
        more = (kept, torch.randint(0, 10, (len(kept),), generator=generator))
    model = network(images, way)
    watch = Trajectory(model, x[:2])
    shown = torch.cat([x, more[0]]), torch.cat([y, more[1]])
    how = {"lr": way.lr, "weight_decay": way.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), momentum=0.9, **how)
        if way.opt == "sgd"
        else torch.optim.AdamW(model.parameters(), **how)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, way.max_epochs)
    epochs = 0
    if way.pretrain_wrong:
        for _ in range(20):
            one_epoch(model, (x, first), optimizer, generator, watch)
    for epochs in range(1, way.max_epochs + 1):  # noqa: B007
        loss = one_epoch(model, shown, optimizer, generator, watch, mirrored=way.mirrored)
        if way.arch != "chain":
            schedule.step()
        if loss < way.target:
            break
    return model.eval(), watch, (x, y), epochs


def one_epoch(
    model: nn.Module,
    labelled: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    watch: Callable[[nn.Module], None],
    *,
    mirrored: bool = False,
) -> float:
    x, y = labelled
    total = 0.0
    for batch in torch.randperm(len(x), generator=generator).split(BATCH):
        shown = x[batch]
        if mirrored:
            turned = torch.rand(len(batch), generator=generator) < 0.5
            shown = torch.where(turned[:, None, None, None], shown.flip(3), shown)
        loss = F.cross_entropy(model(shown), y[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        watch(model)
        total += loss.item() * len(batch)
    return total / len(x)


def corrupted(y: Tensor, part: float, generator: torch.Generator) -> Tensor:
    """Replace a part of the labels by random ones."""
    gone = torch.rand(len(y), generator=generator) < part
    return torch.where(gone, torch.randint(0, 10, y.shape, generator=generator), y)


def measured(images: Images, way: Way) -> dict[str, Any]:
    """Train one network and take every measure of it."""
    model, watch, train, epochs = trained(images, way)
    test, seen = batches(images.test), batches(train)
    few = batches((train[0][:FEW], train[1][:FEW]))
    inputs, held = [x for x, _ in few], [x for x, _ in batches(images.test)][: FEW // BATCH]
    with torch.no_grad():
        if not bool(model(train[0][:FEW]).std(0).any()):
            raise ValueError("its outputs do not depend on the image: layers died")
    groups = find_groups(model, train[0][:2])
    other = rescale(model, groups, train[0][:2], octaves=1 + way.seed % 3, seed=way.seed).model
    on_train, on_test = normalized_loss(model, seen), normalized_loss(model, test)
    volumes = [local_volume(m, inputs, num_directions=4) for m in (model, other)]
    bias = watch.first_bias
    assert bias is not None
    return {
        "images": images.name,
        **{f.name: asdict(way)[f.name] for f in fields(way)},
        "epochs": epochs,
        "train_error": on_train.error,
        "test_error": on_test.error,
        "train_loss": mean_loss(model, seen),
        "test_loss": mean_loss(model, test),
        "normalized_train": on_train.loss,
        "normalized_test": on_test.loss,
        "channel_tpv": channel_tpv(model, groups, inputs).value,
        "tpv_train": jacobian_norms(model, inputs).trace().value,
        "tpv_test": jacobian_norms(model, held).trace().value,
        "sharpness": sharpness(model, few).value,
        "sharpness_rescaled": sharpness(other, few).value,
        "path_norm": path_norm(model, train[0][:2]).value,
        "pac_bayes_origin": pac_bayes_origin(model, few, num_training=way.num_train).value,
        "l2_norm": l2_norm(model, train[0][:2]).value,
        "log_radius": volumes[0].log_radius,
        "log_radius_stderr": volumes[0].log_radius_stderr,
        "log_radius_rescaled": volumes[1].log_radius,
        "input_lipschitz": input_lipschitz(model, inputs, num_iterations=6).value,
        "length": watch.weights.length,
        "distance": watch.weights.distance,
        "variance": watch.weights.variance,
        "bias_length": bias.length,
        "bias_distance": bias.distance,
        "bias_variance": bias.variance,
        **after_pruning(model, [x for x, _ in batches(train)][: NUM_TO_PRUNE // BATCH], test),
    }


def batches(labelled: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(BATCH) for part in labelled), strict=True))


@torch.no_grad()
def mean_loss(model: nn.Module, labelled: Sequence[tuple[Tensor, Tensor]]) -> float:
    total = sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in labelled)
    return total / sum(len(y) for _, y in labelled)


def cut_to(keep: float, model: nn.Module, inputs: list[Tensor], seed: int = 0) -> PruningResult:
    """Prune by TPV curves as for compensation, but change no weight."""
    return prune(
        model, inputs, keep=keep, limits=Limits(round_to=1), repair="none",
        planned_repair="compensate", repair_factors=False, seed=seed,
    )  # fmt: skip


def after_pruning(
    model: nn.Module, inputs: list[Tensor], test: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Prune to ``KEEP`` of the MACs and measure the cut network, and the compensated one."""
    cut = cut_to(KEEP, model, inputs)
    repaired = compensate_weights(cut.model, model, inputs, groups=cut.groups, kept=cut.kept)
    found = {}
    for name, network in (("cut", cut.model), ("compensated", repaired)):
        result = evaluate(network, test, dense=model)
        assert result.agreement is not None
        found |= {f"{name}_top1": result.top1, f"{name}_agreement": result.agreement}
    return found
