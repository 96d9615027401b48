"""Slow, obvious, independent ways to the numbers that the package computes fast."""

import copy
import itertools

import torch
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---- scores ---------------------------------------------------------------------------------


def output_changes(model, group, x, replace=lambda module, a: a):
    """Return u [B, K, C] = -df/d eps for readers' inputs a - eps_c r_c, r = replace(reader, a).

    Forward hooks put eps in; torch.func differentiates.
    """
    modules = dict(model.named_modules())

    def outputs(eps):
        def insert(reader):
            def hook(_, args):
                a = args[0].movedim(reader.channel_dim, -1)
                r = replace(reader, a)
                scale = torch.zeros(len(a), a.shape[-1], dtype=a.dtype).index_add(
                    1, reader.index, eps[:, reader.channel]
                )
                scale = scale.reshape(len(a), *[1] * (a.ndim - 2), -1)
                return ((a - scale * r).movedim(-1, reader.channel_dim),)

            return modules[reader.module].register_forward_pre_hook(hook)

        hooks = [insert(reader) for reader in group.readers]
        try:
            # Samples do not mix, so the gradient of the sum is that of each one.
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(model, dict(model.state_dict()), (x,)).sum(0)
        finally:
            for hook in hooks:
                hook.remove()

    return -jacrev(outputs)(torch.zeros(len(x), group.num_channels, dtype=x.dtype)).movedim(1, 0)


def reader_rows(model, readers, x):
    """Return, by module, what it reads: [positions of all images, inputs]."""
    modules, rows, hooks = dict(model.named_modules()), {}, []
    for reader in readers:

        def look(_, args, reader=reader):
            a = args[0].movedim(reader.channel_dim, -1)
            rows[reader.module] = a.reshape(-1, a.shape[-1])

        hooks.append(modules[reader.module].register_forward_pre_hook(look))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return rows


def ridge_fit(inputs, targets, penalty):
    """Return B with inputs @ B ~ targets, minimising mean square + penalty |B|^2, by lstsq."""
    num, width = inputs.shape
    eye = (num * penalty) ** 0.5 * torch.eye(width, dtype=inputs.dtype)
    zeros = torch.zeros(width, targets.shape[1], dtype=inputs.dtype)
    return torch.linalg.lstsq(torch.cat([inputs, eye]), torch.cat([targets, zeros])).solution


def stand_in(rows, leaving, ridge):
    """Return (mean, B): the centred inputs that stay, times B, predict those that leave."""
    mean = rows.mean(0)
    centred = rows - mean
    penalty = ridge * centred.square().mean()
    stays = torch.ones(rows.shape[1], dtype=torch.bool)
    stays[leaving] = False
    b = torch.zeros(rows.shape[1], len(leaving), dtype=rows.dtype)
    b[stays] = ridge_fit(centred[:, stays], centred[:, leaving], penalty)
    return mean, b


def unpredictable(model, group, x, channels, *, ridge):
    """Return the map (reader, a) -> a part of which the channels that stay predict nothing.

    Inputs of channels that are not in ``channels`` come out as they are.
    """
    rows = reader_rows(model, group.readers, x)
    maps = {}
    for reader in group.readers:
        leaving = reader.index[torch.isin(reader.channel, torch.as_tensor(channels))]
        maps[reader.module] = (leaving, *stand_in(rows[reader.module], leaving, ridge))

    def replace(reader, a):
        leaving, mean, b = maps[reader.module]
        centred = a - mean
        r = a.clone()
        r[..., leaving] = centred[..., leaving] - centred @ b
        return r

    return replace


def all_signs(num):
    """Return every vector of signs, [2^num, num]."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=num)), dtype=torch.float64)


# ---- removal --------------------------------------------------------------------------------


@torch.no_grad()
def without_channel(model, group, channel):
    """Return a copy whose consumers no longer read one channel."""
    cut = copy.deepcopy(model)
    parameters = dict(cut.named_parameters())
    for part in group.slices:
        if part.side == "consumer":
            gone = part.index[part.channel == channel]
            parameters[part.param].movedim(part.dim, 0)[gone] = 0
    return cut


@torch.no_grad()
def removal_variance(model, group, x):
    """Return E|f without c - f|^2 for every channel, by brute force: [C]."""
    outputs = model(x)
    return torch.stack(
        [
            (without_channel(model, group, c)(x) - outputs).square().sum(1).mean()
            for c in range(group.num_channels)
        ]
    )


# ---- selection ------------------------------------------------------------------------------


def prefixes(order, costs, budget):
    """Return the shortest prefix of removals (unit, cost saved) that meets the budget."""
    total, removed = sum(costs.values()), []
    for unit in order:
        if total <= budget:
            break
        total -= costs[unit]
        removed.append(unit)
    return removed


def best_widths(damage, cost, widths, budget):
    """Return the least summed damage over all combinations of widths that fit the budget."""
    best = None
    for combination in itertools.product(*widths.values()):
        chosen = dict(zip(widths, combination, strict=True))
        if cost(chosen) <= budget * (1 + 1e-9):
            total = sum(damage(name, width) for name, width in chosen.items())
            best = total if best is None else min(best, total)
    return best


# ---- compensation ---------------------------------------------------------------------------


def im2col(x, conv):
    """Return [groups, positions of all images, inputs per group * taps] by torch's unfold."""
    columns = torch.nn.functional.unfold(
        x, conv.kernel_size, conv.dilation, conv.padding, conv.stride
    )  # [B, C * taps, positions]
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return rows.reshape(len(rows), conv.groups, -1).transpose(0, 1)


def refit(x, conv, target):
    """Return (weight, bias) of least squares from inputs x to pre-activations [B, O, H, W]."""
    if isinstance(conv, torch.nn.Linear):
        rows, y = x.reshape(1, -1, x.shape[-1]), target.reshape(-1, target.shape[-1])
    else:
        rows, y = im2col(x, conv), target.movedim(1, -1).reshape(-1, target.shape[1])
    outputs = y.shape[1] // len(rows)
    weights, biases = [], []
    for i, inputs in enumerate(rows):
        design = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=x.dtype)], 1)
        part = y[:, i * outputs : (i + 1) * outputs]
        solution = torch.linalg.lstsq(design, part, driver="gelsd").solution
        weights.append(solution[:-1].T)
        biases.append(solution[-1])
    return torch.cat(weights).reshape(conv.weight.shape), torch.cat(biases)
