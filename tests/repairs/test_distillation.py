"""Distillation: its losses against formulas, its promises, and that a killed run goes on."""

import copy
import math

import pytest
import torch
from cases import Chain, Residual, batches, build
from torch import nn

from tpvprune.images.augmentation import HeldImages
from tpvprune.passes.evaluation import output_variance
from tpvprune.repairs import duration
from tpvprune.repairs.batchnorm import recalibrate_batchnorm
from tpvprune.repairs.distillation import distill, divergence, feature_error
from tpvprune.repairs.finetuning import finetune
from tpvprune.repairs.training import Recipe

NUM_CLASSES = 3


def pair(kind=Residual):
    """Return a student and the dense model that it has strayed from."""
    dense = build(kind)
    student = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.2 * p.std(correction=0) * torch.randn(p.shape, generator=generator).to(p))
    return student, dense


def tensors(model):
    return list(model.state_dict().values())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# ---- losses ---------------------------------------------------------------------------------


def test_divergence_is_the_sum_over_classes_and_its_gradient_the_difference_of_softmaxes():
    torch.manual_seed(2)
    outputs = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    wanted, t = 3 * torch.randn(4, 5, dtype=torch.float64), 3.0
    total, gradient = 0.0, torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        q = [math.exp(float(z) / t) for z in outputs[i].detach()]
        p = [math.exp(float(z) / t) for z in wanted[i]]
        for k in range(5):
            pk, qk = p[k] / sum(p), q[k] / sum(q)
            total += t * t * pk * math.log(pk / qk) / 4
            gradient[i, k] = t * (qk - pk) / 4
    loss = divergence(outputs, wanted, temperature=t)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(outputs.grad, gradient, rtol=1e-10, atol=1e-14)


def test_divergence_at_high_temperature_is_half_the_variance_of_the_change():
    # Hinton et al., section 2.1: T² KL -> Var_k(z - z') / 2 for T -> infinity.
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 7, dtype=torch.float64)
    limit = (a - b).var(1, correction=0).mean() / 2
    assert float(divergence(a, b, temperature=1e4)) == pytest.approx(float(limit), rel=1e-3)


def test_feature_error_is_the_relative_square():
    a, b = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = sum(float(x - y) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True))
    expected /= sum(float(y) ** 2 for y in b.flatten())
    assert float(feature_error(a, b)) == pytest.approx(expected, rel=1e-12)
    assert float(feature_error(7 * a, 7 * b)) == pytest.approx(expected, rel=1e-12)
    assert float(feature_error(0 * a, 0 * b)) == 0


@pytest.mark.parametrize("loss", [lambda a, b: divergence(a, b, temperature=3), feature_error])
def test_equal_outputs_have_no_loss_and_no_gradient(loss):
    a = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    value = loss(a, a.detach())
    value.backward()
    assert value.item() == 0
    assert a.grad.abs().max() < 1e-15


def test_a_student_like_the_dense_model_stays_as_it_is():
    _, dense = pair()
    # Statistics frozen, as batch statistics are other outputs; no decay, which has a gradient.
    student = distill(dense, dense, batches(16, 8), epochs=2, freeze_batchnorm=True, weight_decay=0)
    for a, b in zip(tensors(student), tensors(dense), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-15)


# ---- the loop -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "of"),
    [
        ("divergence", lambda a, b: divergence(a, b, temperature=3)),
        ("logits", lambda a, b: 50 * (a - b).square().sum() / b.square().sum()),
    ],
)
def test_one_update_is_nesterov_sgd_with_decay_of_weights_only(loss, of):
    student, dense = pair(Chain)
    [x] = batches(8, 8)
    options = {"epochs": 1, "lr": 0.1, "warmup_epochs": 0, "freeze_batchnorm": True, "loss": loss}
    options["clip_grad"] = None
    found = distill(student, dense, [x], weight_decay=0.3, **options)
    copied = student.eval()
    of(copied(x), dense.eval()(x).detach()).backward()
    for (name, p), q in zip(copied.named_parameters(), found.parameters(), strict=True):
        gradient = p.grad + 0.3 * p.detach() * (p.ndim > 1)
        assert torch.allclose(q, p - 0.1 * 1.9 * gradient, rtol=0, atol=1e-12), name


def test_the_rate_ends_near_zero():
    student, dense = pair(Chain)
    # The last of many updates moves nearly nothing: without warm-up the first one moves far.
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", spy)
        distill(student, dense, batches(40, 4), epochs=2, lr=0.5, warmup_epochs=0.3)
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.5, rel=0.06)
    assert rates[-1] < 0.01
    for done, rate in enumerate(rates[3:], 3):
        assert rate == pytest.approx(0.25 * (1 + math.cos(math.pi * done / 20)))


# ---- so many minutes ------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is set forward: [seconds]."""
    now = [1000.0]
    monkeypatch.setattr(duration, "monotonic", lambda: now[0])
    return now


def rates_of(clock, cost, *, minutes=1.0, fetch=0.0, **options):
    """Return the rates of all updates in time; update number n takes ``cost(n)`` seconds."""
    student, dense = pair(Chain)
    rates, times, step = [], [], torch.optim.SGD.step
    begin = clock[0]

    def spy(self, *args):
        times.append(clock[0] - begin)
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    def slow(x):
        clock[0] += fetch
        return x

    def watch(_):
        clock[0] += cost(len(rates))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", spy)
        options = {"augment": slow, "watch": watch, "lr": 0.5, **options}
        distill(student, dense, batches(20, 4), minutes=minutes, **options)
    return rates, times, clock[0] - begin


@pytest.mark.parametrize("cost", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("fetch", [0.0, 0.5])
def test_the_rate_follows_the_clock_whatever_an_update_costs(clock, cost, fetch):
    rates, times, end = rates_of(clock, lambda _: cost, fetch=fetch)
    each = cost + fetch
    # No update ends late, and none that there was time for is missing; statistics of BatchNorm
    # have had a batch each, and so has the image that tells that time is up.
    assert 60 - 2 * each <= times[-1] + cost <= 60
    assert end <= 60 + fetch
    assert max(rates) <= 0.5 and rates[-1] <= 0.5 * (math.pi * (3 * each / 60) / 2) ** 2
    for time, rate in zip(times, rates, strict=True):
        if time > 1.2:  # after the rise: 0.2 tenths of the minutes
            assert rate == pytest.approx(0.25 * (1 + math.cos(math.pi * time / 60)), abs=1e-4)


def test_the_rate_follows_the_clock_where_updates_get_slower(clock):
    rates, times, end = rates_of(clock, lambda n: 0.2 if n < 100 else 2.0)
    assert 56 <= end <= 62  # of the mean duration, which lags behind
    assert rates[-1] < 0.01
    half = min(range(len(times)), key=lambda i: abs(times[i] - 30))
    assert rates[half] == pytest.approx(0.25, abs=0.05)


def test_too_few_minutes_make_one_update(clock):
    rates, _, end = rates_of(clock, lambda _: 100.0, minutes=0.5)
    assert (len(rates), end) == (1, 100.0)


def test_a_run_of_minutes_goes_on_with_what_is_left_of_them(clock, tmp_path):
    state = tmp_path / "run.safetensors"

    def dies(n):
        if n == 17:  # of five updates an epoch
            raise Killed
        return 1.0

    with pytest.raises(Killed):
        rates_of(clock, dies, state=state)
    clock[0] += 1e6  # what lies between does not count
    rates, _, end = rates_of(clock, lambda _: 1.0, state=state)
    assert len(rates) == 60 - 15
    assert end == 45.0
    assert rates[0] == pytest.approx(0.25 * (1 + math.cos(math.pi * 15 / 60)), abs=1e-3)
    again, _, _ = rates_of(clock, lambda _: 1.0, state=state)
    assert again == []


def test_fine_tuning_has_a_budget_of_time_too(clock):
    student, _ = pair(Chain)
    done = []

    def progress(stage, now, total):
        clock[0] += 6.0
        done.append((stage, now / total))

    data = [(x, torch.arange(4) % NUM_CLASSES) for x in batches(8, 4)]
    finetune(student, data, recipe=Recipe(minutes=0.5), progress=progress)
    assert [stage for stage, _ in done] == ["epoch 1"] * 2 + ["epoch 2"] * 2 + ["epoch 3"]
    assert [part for _, part in done] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=2e-4)


def digits():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images = torch.as_tensor(load_digits().images, dtype=torch.float64)[:600, None] / 8 - 1
    images = images.expand(-1, 3, -1, -1)
    return list(images[100:].split(50)), [images[:100]]


def pair_on_digits():
    """Return a pair that is at home on digits: the statistics of BatchNorm are theirs."""
    student, dense = pair(Chain)
    return tuple(recalibrate_batchnorm(m, digits()[0]) for m in (student, dense))


def test_outputs_come_nearer_on_images_that_were_held_back():
    (student, dense), (seen, held) = pair_on_digits(), digits()
    trained = distill(student, dense, seen, epochs=4, lr=0.001)
    before, after = (output_variance(m, dense, held) for m in (student, trained))
    assert after < 0.3 * before


def test_features_come_nearer_without_a_classifier():
    (student, dense), (seen, held) = pair_on_digits(), digits()
    student.fc, dense.fc, dense.num_classes = nn.Identity(), nn.Identity(), 0
    trained = distill(student, dense, seen, epochs=4, lr=0.005)
    before, after = (output_variance(m, dense, held) for m in (student, trained))
    assert after < 0.2 * before
    with pytest.raises(ValueError, match="loss: expected logits for a model without classes"):
        distill(student, dense, seen, epochs=1, loss="divergence")


def test_batchnorm_statistics_are_trained_or_frozen():
    student, dense = pair()
    trained, frozen = (
        distill(student, dense, batches(16, 8), epochs=1, freeze_batchnorm=flag)
        for flag in (False, True)
    )
    assert not torch.equal(trained.bn1.running_mean, student.bn1.running_mean)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(frozen.bn1, name), getattr(student.bn1, name))
    assert not torch.equal(frozen.bn1.weight, student.bn1.weight)


def test_average_without_memory_is_the_last_model():
    student, dense = pair()
    last, average, long = (
        distill(student, dense, batches(32, 8), epochs=1, ema_decay=decay)
        for decay in (None, 1e-12, 0.9)
    )
    for a, b in zip(tensors(last), tensors(average), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-9)
    assert not same(last, long)


def test_average_of_one_update_is_the_model_after_it():
    student, dense = pair()
    options = {"epochs": 1, "warmup_epochs": 0}
    last, average = (
        distill(student, dense, batches(8, 8), ema_decay=decay, **options) for decay in (None, 0.99)
    )
    assert same(last, average)


def test_gradients_are_clipped():
    student, dense = pair(Chain)
    options = {"epochs": 1, "lr": 1.0, "warmup_epochs": 0, "weight_decay": 0}
    options["freeze_batchnorm"] = True
    found = distill(student, dense, batches(8, 8), clip_grad=1e-3, **options)
    moved = [(p - q).norm() for p, q in zip(student.parameters(), found.parameters(), strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(1.9e-3, rel=1e-3)


def test_mixed_precision_trains_float32_weights():
    student, dense = (m.float() for m in pair())
    data = [x.float() for x in batches(32, 8)]
    options = {"epochs": 2, "lr": 1e-3}
    full, mixed = (distill(student, dense, data, amp=t, **options) for t in (None, torch.bfloat16))
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert not same(full, mixed)
    for p, q in zip(full.parameters(), mixed.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=0.02)  # bfloat16 holds 3 digits


def test_modes_are_those_of_the_argument_and_frozen_parameters_stay():
    student, dense = pair()
    student.train()
    student.bn1.eval()
    student.conv1.requires_grad_(False)
    trained = distill(student, dense, batches(16, 8), epochs=1)
    assert [m.training for m in trained.modules()] == [m.training for m in student.modules()]
    assert torch.equal(trained.conv1.weight, student.conv1.weight)
    assert not torch.equal(trained.conv2.weight, student.conv2.weight)


# ---- promises -------------------------------------------------------------------------------


class Poison:
    """A label that must not be looked at."""

    def __getattribute__(self, name):
        raise AssertionError(f"a label was read: {name}")


def test_labels_are_never_read():
    student, dense = pair()
    data = batches(16, 8)
    plain = distill(student, dense, data, epochs=2)
    poisoned = distill(student, dense, [(x, Poison()) for x in data], epochs=2)
    assert same(plain, poisoned)


def holed(kind=Residual):
    """Return a student with zeroed weights, the masks of what stays, and the dense model."""
    student, dense = pair(kind)
    generator = torch.Generator().manual_seed(3)
    masks = {
        name: torch.rand(weight.shape, generator=generator) < 0.5
        for name, weight in student.named_parameters()
        if weight.ndim == 4
    }
    with torch.no_grad():
        for name, mask in masks.items():
            student.get_parameter(name).mul_(mask)
    return student, masks, dense


@pytest.mark.parametrize("opt", ["sgd", "adamw", "muon"])
def test_weights_outside_of_masks_stay_zero_and_the_others_are_trained(opt):
    student, masks, dense = holed()
    inputs = batches(32)
    recipe = {"epochs": 2, "lr": 1e-3, "opt": opt, "ema_decay": 0.5}
    labelled = [(x, torch.arange(len(x)) % NUM_CLASSES) for x in inputs]
    for trained in (
        distill(student, dense, inputs, masks=masks, **recipe),
        finetune(student, labelled, recipe=Recipe(**recipe), masks=masks),
    ):
        for name, mask in masks.items():
            weight, before = trained.get_parameter(name), student.get_parameter(name)
            assert not weight[~mask].count_nonzero(), name
            assert (weight[mask] != before[mask]).float().mean() > 0.9, name


def test_masks_that_keep_all_change_nothing():
    student, dense = pair()
    whole = {n: torch.ones_like(p, dtype=torch.bool) for n, p in student.named_parameters()}
    inputs = batches(16)
    assert same(
        distill(student, dense, inputs, epochs=1, masks=whole),
        distill(student, dense, inputs, epochs=1),
    )


def test_masks_of_another_model_are_refused():
    student, masks, dense = holed()
    inputs, name = batches(16), next(iter(masks))
    wrong = [
        ({"nothing": masks[name]}, "found 'nothing' with .* the model has none"),
        ({name: masks[name][1:]}, "expected names and shapes of parameters"),
        ({name: ~masks[name]}, "expected zeros where they are False"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            distill(student, dense, inputs, epochs=1, masks=given)


def test_arguments_and_random_state_are_untouched(untouched):
    student, dense = pair()
    student.train()
    data = batches(16, 8)
    before = [x.clone() for x in data]

    def augment(x):
        return x + torch.randn_like(x)

    with untouched(student, dense):
        distill(student, dense, data, epochs=1, augment=augment, ema_decay=0.9)
    with untouched(student, dense), pytest.raises(ValueError, match="lower lr"):
        distill(student, dense, data, epochs=9, lr=1e30)
    assert all(torch.equal(x, y) for x, y in zip(before, data, strict=True))


def test_dense_model_teaches_in_eval_mode_whatever_its_own():
    student, dense = pair()
    expected = distill(student, dense, batches(16, 8), epochs=1)
    dense.train()
    assert same(expected, distill(student, dense, batches(16, 8), epochs=1))
    assert all(m.training for m in dense.modules())


def test_epochs_differ_in_augmentation_and_a_seed_repeats_them():
    student, dense = pair()
    seen = []

    def augment(x):
        seen.append(torch.rand(()).item())
        return x

    for seed in (0, 0, 1):
        distill(student, dense, batches(16, 8), epochs=2, augment=augment, seed=seed)
    first, again, other = seen[:6], seen[6:12], seen[12:]
    assert first == again
    assert first[:2] == first[2:4]  # BatchNorm is brought up to date with the first epoch's
    assert len(set(first + other)) == 8


def test_shuffling_loader_gives_another_order_each_epoch():
    student, dense = pair()
    inputs = torch.cat(batches(16, 8))
    dataset = torch.utils.data.TensorDataset(inputs)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    seen = []
    distill(student, dense, loader, epochs=2, augment=lambda x: seen.append(x[0, 0, 0, 0]) or x)
    assert len({float(x) for x in seen}) > 2


class SeesLeftFromRight(nn.Module):
    """Logits that a mirror image changes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, NUM_CLASSES)

    def forward(self, x):
        return self.fc(x.flatten(1))


def test_mirrored_teacher_is_the_mean_over_both_images():
    dense, student = build(SeesLeftFromRight), build(SeesLeftFromRight)
    symmetric = copy.deepcopy(dense)
    weight = dense.fc.weight.detach().view(-1, 3, 8, 8)
    symmetric.fc.weight.data = ((weight + weight.flip(3)) / 2).flatten(1)
    data, options = batches(16, 8), {"epochs": 2, "lr": 0.01}
    mirrored = distill(student, dense, data, mirrored=True, **options)
    taught = distill(student, symmetric, data, **options)
    for a, b in zip(tensors(mirrored), tensors(taught), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert not same(mirrored, distill(student, dense, data, **options))


def test_mirrored_teacher_needs_images_and_one_vector_of_outputs():
    student, dense = build(nn.Conv2d, 3, 3, 1), build(nn.Conv2d, 3, 3, 1)
    with pytest.raises(ValueError, match="mirrored: expected inputs"):
        distill(student, dense, batches(4, 4), epochs=1, mirrored=True)


def test_dense_model_runs_only_in_views_that_are_new():
    student, dense = pair()
    calls = []
    # One image alone only asks in which memory layout the model can run.
    dense.register_forward_hook(lambda _m, args, _o: calls.append(1) if len(args[0]) > 1 else None)
    data = HeldImages(torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), mean=(0.5,) * 3,
                      std=(0.2,) * 3, batch_size=8)  # fmt: skip
    student, dense = student.float(), dense.float()
    held = distill(student, dense, data, epochs=5, num_views=2)
    assert len(calls) == 2 * len(data)
    assert not same(held, distill(student, dense, data, epochs=5))
    assert same(
        distill(student, dense, data, epochs=2),
        distill(student, dense, data, epochs=2, num_views=2),
    )


# ---- going on -------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Droppy(Chain):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def killed(after, student, dense, data, **options):
    def progress(_stage, done, _total):
        if done == after:
            raise Killed

    with pytest.raises(Killed):
        distill(student, dense, data, progress=progress, **options)


@pytest.mark.parametrize("after", [1, 4, 6, 9])
@pytest.mark.parametrize(
    "options",
    [{"ema_decay": 0.8}, {"opt": "adamw", "num_views": 2}, {"opt": "sgd", "amp": torch.bfloat16}],
    ids=["sgd with average", "adamw with views", "mixed precision"],
)
def test_killed_run_goes_on_to_the_result_of_the_unbroken_one(tmp_path, after, options):
    student, dense = (m.float() for m in pair(Droppy))
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    data = HeldImages(images, mean=(0.5,) * 3, std=(0.2,) * 3, batch_size=10)
    state = tmp_path / "run.safetensors"
    options = {"epochs": 3, **options}
    unbroken = distill(student, dense, data, **options)
    killed(after, student, dense, data, state=state, **options)
    assert state.exists() == (after >= 4)
    done = []
    found = distill(
        student, dense, data, state=state, progress=lambda _, n, __: done.append(n), **options
    )
    assert same(found, unbroken)
    assert len(done) == 9 - (after - 1) // 3 * 3
    assert [p.name for p in tmp_path.iterdir()] == [state.name]


def test_finished_run_returns_its_model_again(tmp_path):
    student, dense = pair()
    state = tmp_path / "run.safetensors"
    first, again = (distill(student, dense, batches(8, 4), epochs=2, state=state) for _ in "ab")
    assert same(first, again)


@pytest.mark.parametrize(
    "change", ["lr", "temperature", "seed", "student", "dense", "number of batches"]
)
def test_state_of_another_run_is_refused(tmp_path, change):
    student, dense = pair()
    state, data = tmp_path / "run.safetensors", batches(8, 4)
    distill(student, dense, data, epochs=1, warmup_epochs=0, state=state)
    options = {"epochs": 1, "warmup_epochs": 0}
    if change in ("lr", "temperature", "seed"):
        options[change] = 7
    elif change == "number of batches":
        data = batches(8, 2)
    else:
        with torch.no_grad():
            {"student": student, "dense": dense}[change].fc.bias[0] += 1
    with pytest.raises(ValueError, match="expected the state of this run"):
        distill(student, dense, data, state=state, **options)


def test_damaged_state_is_refused(tmp_path):
    student, dense = pair()
    state = tmp_path / "run.safetensors"
    distill(student, dense, batches(8, 4), epochs=1, state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected the state of an unfinished run"):
        distill(student, dense, batches(8, 4), epochs=1, state=state)


def test_writing_that_fails_leaves_the_earlier_state(tmp_path, monkeypatch):
    student, dense = pair()
    state = tmp_path / "run.safetensors"
    killed(3, student, dense, batches(8, 4), epochs=2, state=state)
    before = state.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tpvprune.disk.tensors.save_file", full)
    with pytest.raises(ValueError, match="No space left"):
        distill(student, dense, batches(8, 4), epochs=2, state=state)
    assert state.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [state.name]


# ---- with labels ----------------------------------------------------------------------------


def test_finetuning_is_cross_entropy_with_the_same_updates():
    student, _ = pair(Chain)
    [x] = batches(8, 8)
    y = torch.arange(8) % NUM_CLASSES
    recipe = Recipe(epochs=1, lr=0.1, warmup_epochs=0, freeze_batchnorm=True, weight_decay=0)
    found = finetune(student, [(x, y)], recipe=recipe)
    copied = student.eval()
    (-copied(x).log_softmax(1)[range(8), y].mean()).backward()
    for p, q in zip(copied.parameters(), found.parameters(), strict=True):
        assert torch.allclose(q, p - 0.1 * 1.9 * p.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labelled batches"),
        (torch.full((4,), 3), r"expected labels in \[0, 3\)"),
        (torch.zeros(4), "pass integer labels"),
    ],
)
def test_finetuning_needs_labels_of_the_model(labels, message):
    student, _ = pair(Chain)
    data = [x if labels is None else (x, labels) for x in batches(8, 4)]
    with pytest.raises(ValueError, match=message):
        finetune(student, data, recipe=Recipe(epochs=1))


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, found 0"),
        ({"minutes": 1}, "epochs: expected a number of epochs or of minutes, found both"),
        ({"epochs": None}, "epochs: expected a number of epochs or of minutes, found neither"),
        ({"epochs": None, "minutes": 0}, "minutes: expected a number above 0, found 0"),
        ({"epochs": None, "minutes": math.nan}, "minutes: expected a number above 0, found nan"),
        ({"lr": 0}, "lr: expected a number above 0, at most 1e30, found 0"),
        ({"lr": math.nan}, "lr: expected a number above 0"),
        ({"loss": "prayer"}, "loss: expected logits or divergence, found 'prayer'"),
        ({"temperature": -1}, "temperature: expected a number above 0, found -1"),
        ({"opt": "sdg"}, "opt: expected a name of timm.optim, of first order, found 'sdg'"),
        ({"sched": "plateau"}, "sched: expected one of cosine"),
        ({"weight_decay": -1}, "weight_decay: expected at least 0"),
        ({"warmup_epochs": 1}, "warmup_epochs: expected 0 to less than epochs"),
        ({"clip_grad": 0}, "clip_grad: expected a number above 0"),
        ({"ema_decay": 1}, "ema_decay: expected between 0 and 1"),
        ({"num_views": 0}, "num_views: expected at least 1"),
        ({"amp": torch.int8}, "amp: expected bfloat16 or float16"),
        ({"amp": torch.float16}, "amp: expected bfloat16 on cpu, found float16"),
    ],
)
def test_options_out_of_range_are_one_line(options, message):
    student, dense = pair()
    with pytest.raises(ValueError, match=message) as caught:
        distill(student, dense, batches(8, 4), **{"epochs": 1, **options})
    assert "\n" not in str(caught.value)


def test_models_that_do_not_fit_are_one_line():
    student, dense = pair()
    with pytest.raises(ValueError, match="none that requires a gradient"):
        distill(copy.deepcopy(student).requires_grad_(False), dense, batches(8, 4), epochs=1)
    dense.fc = nn.Linear(5, 4).double()
    with pytest.raises(ValueError, match="models with the same head"):
        distill(student, dense, batches(8, 4), epochs=1)
    with pytest.raises(ValueError, match="expected at least one batch"):
        distill(student, dense, [], epochs=1)
