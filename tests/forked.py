"""Work for several processes on this machine, asked for on stdin: JSON [job, size, folder, ...].

The packages are imported once, then processes are forked for every line. Each leaves what its job
returned in FOLDER/RANK.pt and what it printed in FOLDER/RANK.txt; exit codes and ends go to
stdout.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tpvprune
import tpvprune.pipeline.setup
import tpvprune.widths.ranking
from tpvprune.cli.entry import main
from tpvprune.groups import with_blocked
from tpvprune.images.augmentation import HeldImages
from tpvprune.passes.drawing import hold_back
from tpvprune.processes import membership
from tpvprune.processes import shares as distributed
from tpvprune.scores.criteria import scorer

TIMEOUT = 300.0


def flat(values):
    return torch.cat([value.double().flatten() for value in values])


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(6, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 1)

    def forward(self, x):
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(9))
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).relu().mean((2, 3)))


def images(num=21):
    return torch.randn(num, 3, 12, 12, dtype=torch.float64)


def subject():
    torch.manual_seed(0)
    model = Net().double().eval()
    x = images()
    # 21 images in batches of 8: the last has 5, and of 2 or 3 processes no two have as many.
    batches = list(zip(x.split(8), (torch.arange(21) % 10).split(8), strict=True))
    return model, batches, tpvprune.find_groups(model, x[:1], verify=False)


def statistics():
    """Everything that is a sum over images, on one uneven set."""
    model, pairs, groups = subject()
    labelled = distributed.shard(pairs)
    batches = distributed.shard([x for x, _ in pairs])
    found = {}
    for metric in ("logits", "fisher", "pseudo"):
        scores = tpvprune.tpv_scores(model, groups, batches, metric=metric, num_probes=2)
        found[f"{metric} scores"] = flat(scores.values())
        found[f"{metric} errors"] = flat(scores.stderr.values())
    found["number of samples"] = torch.tensor(float(scores.num_samples))
    for criterion in ("taylor", "jacobian", "activation_variance"):
        source = batches if criterion == "activation_variance" else labelled
        found[criterion] = flat(scorer(criterion)(model, groups, source).values())
    curves = tpvprune.variance_curves(model, groups, batches, max_rows=18)
    found["curves"] = flat(curve.variance for curve in curves.values())
    kept = tpvprune.allocate(groups, curves, keep=0.6)
    found["kept"] = flat(kept.values())
    small = tpvprune.remove_channels(model, groups, kept)
    recalibrated = tpvprune.recalibrate_batchnorm(small, batches)
    refitted = tpvprune.compensate_weights(
        small, model, batches, groups=groups, kept=kept, min_rows=256, rows_per_input=2
    )
    few = tpvprune.compensate_weights(
        small, model, batches, groups=groups, kept=kept, max_bytes=1 << 18
    )
    views = tpvprune.compensate_weights(
        small, model, batches, groups=groups, kept=kept, num_views=3, min_rows=256
    )
    rebuilt = tpvprune.reconstruct_blocks(
        small, model, batches, groups=groups, kept=kept, rounds=1, iterations=1, num_views=1
    )
    models = {
        "recalibration": recalibrated, "compensation": refitted, "reconstruction": rebuilt,
        "compensation with views": views,
    }  # fmt: skip
    for name, repaired in {**models, "compensation with little memory": few}.items():
        found[name] = flat(repaired.state_dict().values())
    measured = tpvprune.evaluate(recalibrated, labelled, dense=model)
    found["evaluation"] = torch.tensor(
        [measured.num_images, measured.top1, measured.agreement, measured.output_variance]
    )
    return found


def pipeline():
    model, pairs, _ = subject()
    batches = distributed.shard([x for x, _ in pairs])
    result = tpvprune.prune(model, batches, keep=0.5, repair="auto", steps=2)
    report = result.report
    numbers = [report["num_images"], report["num_held_back"], report["output_second_moment"]]
    return {
        "weights": flat(result.model.state_dict().values()),
        "report": torch.tensor([*numbers, *report["output_variance"].values()]),
    }


def drawing():
    """Draw some of the images, of batches and of a loader that all processes share."""
    whole = torch.arange(21.0)[:, None, None].expand(21, 1, 2).contiguous()
    loader = DataLoader(TensorDataset(whole), batch_size=4)
    found = {}
    for name, source in {"batches": whole.split(8), "loader": loader}.items():
        for num_images in (9, 30):
            fit, held = hold_back(distributed.shard(source), num_images=num_images, seed=1)
            found[f"{num_images} of {name}"] = torch.cat(distributed.gathered(fit))
            held_sum = sum(float(x.square().sum()) for x in held)
            found[f"held {num_images} of {name}"] = torch.tensor(distributed.total(held_sum))
    return found


def training(state=None):
    model, _, _ = subject()
    pixels = torch.randint(0, 256, (22, 3, 12, 12), dtype=torch.uint8)
    held = HeldImages(pixels, mean=[0.5] * 3, std=[0.2] * 3, batch_size=7)
    student = tpvprune.recalibrate_batchnorm(model, [images(4)])
    trained = tpvprune.distill(
        student, model, held, epochs=2, opt="adamw", clip_grad=1.0, ema_decay=0.5, state=state
    )
    return {"weights": flat(trained.state_dict().values())}


def dealing():
    def work(task):
        assert membership.num_processes() == 1
        yield from [(task, i) for i in range(task % 3)]

    return {"results": list(distributed.dealt(range(7), work))}


def command(*argv):
    return main(argv)


def slow_command(*argv):
    """A command whose first process is the last to leave."""
    tell = membership._told

    def late(*args):
        time.sleep(1)
        return tell(*args)

    if os.environ["RANK"] == "0":
        membership._told = late
    return main(argv)


def disagreement():
    distributed.check_same("numbers", torch.arange(3))
    try:
        distributed.check_same("numbers", {"a": torch.tensor(membership.rank())})
    except ValueError as error:
        return {"message": str(error)}
    return None


def other_groups():
    """Prune where verification blocks a group in one process only."""
    model, pairs, _ = subject()

    def found(*args, **kwargs):
        groups = tpvprune.find_groups(*args, **kwargs, verify=False)
        return with_blocked(groups, {"stem": "here only"} if membership.rank() else {})

    tpvprune.pipeline.setup.find_groups = found
    try:
        tpvprune.prune(model, distributed.shard([x for x, _ in pairs]), keep=0.5)
    except ValueError as error:
        return {"message": str(error)}
    return None


def lost(how, *argv):
    """A command in which the last process is killed, is stopped or fails while it scores."""

    def fail(*_, **__):
        Path("lost").touch()
        if how == "fails":
            raise OSError("the disk of this machine is full")
        os.kill(os.getpid(), {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}[how])

    tpvprune.pipeline.setup.find_groups = partial(tpvprune.find_groups, verify=False)

    def impatient(*args, **kwargs):
        # Only now: a process that imports on a busy machine may be silent for long.
        membership._SILENCE = 6.0
        return tpvprune.variance_curves(*args, **kwargs)

    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    tpvprune.widths.ranking.variance_curves = fail if last else impatient
    membership._BEAT, membership._GRACE = 0.2, 2.0
    return main(argv)


def run(job, arguments):
    # These join by themselves.
    if job in {"command", "slow_command", "lost"}:
        return globals()[job](*arguments)
    with membership.joined():
        torch.save(globals()[job](*arguments), f"{os.environ['RANK']}.pt")
    return 0


def child(rank, size, port, job, arguments):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), **address)
    code = 99
    try:
        with Path(f"{rank}.txt").open("w") as out, contextlib.redirect_stderr(out):
            sys.stdout = out
            sys.__stderr__ = out
            code = run(job, arguments)
    except BaseException:
        Path(f"{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def fork(job, size, arguments):
    """Return exit code (minus the signal) and end of each; None where only a kill helped."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start, running, ended = time.monotonic(), {}, {}
    for rank in range(size):
        number = os.fork()
        if not number:
            child(rank, size, port, job, arguments)
        running[number] = rank
    while running and time.monotonic() - start < TIMEOUT:
        for number in list(running):
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                ended[running.pop(number)] = (os.waitstatus_to_exitcode(status), time.time())
        if job == "lost" and list(running.values()) == [size - 1]:
            break  # it hangs, as it was told to
        time.sleep(0.02)
    for number, rank in running.items():
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        ended[rank] = (None, None)
    return [ended[rank] for rank in range(size)]


if __name__ == "__main__":
    for line in sys.stdin:
        name, number_of_them, folder, *rest = json.loads(line)
        os.chdir(folder)
        print(json.dumps(fork(name, number_of_them, rest)), flush=True)
