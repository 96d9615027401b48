"""Evaluation: hand numbers, closed forms of MACs, and untouched arguments."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tpvprune.passes.evaluation import (
    agreement,
    count_macs,
    count_params,
    evaluate,
    measure_latency,
    model_outputs,
    output_variance,
)


class Table(nn.Module):
    """Return the rows of a fixed table that the inputs [B, 1] name."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, x):
        return self.rows[x[:, 0].long()]


def images(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


ROWS = [
    [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    [0.0, 9.0, 0.0, 0.0, 0.0, 0.0],
]


def test_top1_and_top5_by_hand():
    batches = [(images(0, 1), torch.tensor([0, 0])), (images(2), torch.tensor([1]))]
    result = evaluate(Table(ROWS), batches)
    assert (result.num_images, result.top1, result.top5) == (3, 2 / 3, 2 / 3)
    assert result.agreement is None
    assert result.output_variance is None
    assert result.latency_ms is None


def test_agreement_and_variance_by_hand():
    changed = [list(row) for row in ROWS]
    changed[0][0] = 4.5  # class 1 wins now; squared change 2.25
    changed[2][0] = 2.0  # class 1 still wins; squared change 4
    dense, pruned = Table(ROWS), Table(changed)
    batches = [(images(0, 1), torch.tensor([0, 5])), (images(2), torch.tensor([1]))]
    result = evaluate(pruned, batches, dense=dense)
    assert result.agreement == agreement(pruned, dense, batches) == 2 / 3
    assert result.output_variance == output_variance(pruned, dense, batches) == 6.25 / 3


def test_numbers_do_not_depend_on_batch_split():
    torch.manual_seed(0)
    pruned, dense = nn.Linear(4, 7), nn.Linear(4, 7)
    inputs, labels = torch.randn(12, 4), torch.randint(7, (12,))
    whole = evaluate(pruned, [(inputs, labels)], dense=dense)
    split = evaluate(pruned, list(zip(inputs.split(5), labels.split(5), strict=True)), dense=dense)
    assert whole.top1 == split.top1
    assert whole.agreement == split.agreement
    assert whole.output_variance == pytest.approx(split.output_variance, rel=1e-6)


def test_model_agrees_with_itself_and_has_no_variance():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    batches = [torch.randn(6, 3, 4, 4)]
    assert agreement(model, model, batches) == 1.0
    assert output_variance(model, model, batches) == 0.0


def test_image_with_output_that_is_not_finite_is_wrong_and_disagrees():
    broken = [[float("nan")] * 6, *ROWS[1:]]
    result = evaluate(Table(broken), [(images(0, 2), torch.tensor([0, 1]))], dense=Table(broken))
    assert (result.top1, result.agreement) == (0.5, 0.5)


def test_top5_is_absent_below_five_classes():
    result = evaluate(nn.Linear(2, 3), [(torch.randn(2, 2), torch.tensor([0, 2]))])
    assert result.top5 is None


def test_first_tensor_of_tuple_or_mapping_is_taken():
    class Wrapped(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.model, self.wrap = Table(ROWS), wrap

        def forward(self, x):
            return self.wrap(self.model(x))

    batches = [images(0, 1, 2)]
    for wrap in (lambda y: (y, None), lambda y: {"logits": y, "aux": -y}, lambda y: [[y]]):
        assert agreement(Wrapped(wrap), Table(ROWS), batches) == 1.0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        ([images(0)], "expected pairs"),
        ([(images(0, 1), torch.tensor([0]))], "one class index per image"),
        ([(images(0), torch.tensor([0.5]))], "one class index per image"),
        ([(images(0), torch.tensor([6]))], r"labels in \[0, 6\)"),
        ([(images(0), torch.tensor([-1]))], r"labels in \[0, 6\)"),
    ],
)
def test_bad_labelled_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Table(ROWS), batches)


def test_models_with_other_heads_are_not_compared():
    with pytest.raises(ValueError, match="same head"):
        agreement(nn.Linear(2, 3), nn.Linear(2, 4), [torch.randn(1, 2)])


def conv_macs(conv, size):
    return size * size * conv.weight.numel()


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_convolutions_in_closed_form(batch):
    plain = nn.Conv2d(3, 8, 3, padding=1)
    grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
    depthwise = nn.Conv2d(12, 12, 5, stride=2, padding=2, groups=12)
    model = nn.Sequential(plain, nn.BatchNorm2d(8), nn.ReLU(), grouped, depthwise)
    expected = conv_macs(plain, 16) + conv_macs(grouped, 16) + conv_macs(depthwise, 8)
    assert expected == 256 * 3 * 8 * 9 + 256 * 12 * 2 * 9 + 64 * 12 * 25
    assert count_macs(model, torch.randn(batch, 3, 16, 16)) == expected


def test_macs_of_linear_layers_on_tokens_and_vectors():
    assert count_macs(nn.Linear(6, 4), torch.randn(2, 5, 6)) == 5 * 6 * 4
    assert count_macs(nn.Linear(6, 4, bias=False), torch.randn(3, 6)) == 24


@pytest.mark.parametrize("bias", [False, True])
def test_macs_of_matrix_times_vector(bias):
    class OneVector(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            if bias:
                return torch.addmv(torch.zeros(4), self.weight, x[0])
            return self.weight @ x[0]

    assert count_macs(OneVector(), torch.randn(2, 6)) == 24


@pytest.mark.parametrize("fused", [True, False])
def test_macs_of_attention_count_both_products(fused):
    class Attention(nn.Module):
        def forward(self, q):
            if fused:
                return F.scaled_dot_product_attention(q, q, q)
            return (q @ q.transpose(-2, -1)).softmax(-1) @ q

    heads, tokens, width = 3, 10, 8
    expected = 2 * heads * tokens * tokens * width
    assert count_macs(Attention(), torch.randn(2, heads, tokens, width)) == expected


def test_macs_of_multihead_attention_and_its_fast_path_flag():
    before = torch.backends.mha.get_fastpath_enabled()
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    assert count_macs(model, (x, x, x)) == 5 * 16 * 16 * 4 + 2 * 5 * 5 * 16
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_macs_of_recurrent_layer():
    model = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
    assert count_macs(model, torch.randn(2, 5, 8)) == 2 * 5 * 4 * 16 * (8 + 16)


def test_params_count_shared_tensors_once():
    first = nn.Linear(3, 3)
    assert count_params(nn.Sequential(first, first, nn.BatchNorm1d(3))) == 12 + 6


def test_latency_is_positive_and_says_what_was_timed():
    result = measure_latency(nn.Linear(8, 8), torch.randn(4, 8), repeats=5, warmup=1)
    assert result.median_ms > 0
    assert result.sd_ms >= 0
    assert (result.repeats, result.batch_size, result.device) == (5, 4, "cpu")
    with pytest.raises(ValueError, match="repeats >= 2"):
        measure_latency(nn.Linear(8, 8), torch.randn(4, 8), repeats=1)


class Mixed(nn.Module):
    def __init__(self, *, fails=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 5)
        self.fails = fails
        self.train()
        self.body[1].eval()
        self.head.weight.requires_grad_(False)

    def forward(self, x):
        if self.fails:
            raise RuntimeError("this model always fails")
        return self.head(self.body(x))


CALLS = {
    "evaluate": lambda model, dense, batches: evaluate(
        model, batches, dense=dense, latency_repeats=2
    ),
    "agreement": agreement,
    "output_variance": output_variance,
    "count_macs": lambda model, dense, batches: count_macs(model, batches.dataset[:2][0]),
    "measure_latency": lambda model, dense, batches: measure_latency(
        model, batches.dataset[:2][0], repeats=2
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fails", [False, True])
def test_call_leaves_models_and_random_state_alone(name, fails, untouched):
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(5, (8,)))
    batches = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model, dense = Mixed(fails=fails), Mixed()
    raised = pytest.raises(RuntimeError, match="always fails") if fails else nullcontext()
    with untouched(model, dense), raised:
        CALLS[name](model, dense, batches)


def test_fused_and_plain_vit_cost_the_same():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, num_classes=10
    )
    dim, tokens, hidden = 192, 5, 768
    block = tokens * dim * (3 * dim + dim + 2 * hidden) + 2 * tokens * tokens * dim
    expected = 4 * 3 * 256 * dim + 2 * block + dim * 10
    for fused in (True, False):
        for layer in model.blocks:
            layer.attn.fused_attn = fused
        assert count_macs(model, torch.randn(2, 3, 32, 32)) == expected


def test_held_outputs_compare_as_the_model_does():
    torch.manual_seed(0)
    dense, pruned = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
    batches = [(torch.randn(n, 3, 2, 2), torch.randint(0, 3, (n,))) for n in (5, 2)]
    held = model_outputs(dense, batches)
    assert evaluate(pruned, batches, dense=held) == evaluate(pruned, batches, dense=dense)
    with pytest.raises(ValueError, match="expected outputs for every batch, found 1"):
        evaluate(pruned, batches, dense=held[:1])
