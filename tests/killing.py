"""Commands that are killed, asked for on stdin: JSON [folder, moment, argument, ...] a line.

The packages are imported once; a process is forked for every command. The moment is null (never),
["clock", seconds] or ["step", n]: just before the n-th step that opens, makes, renames or removes
a file. ["here"] runs the command in this process, so that whatever it imports is there. The exit
code (minus the signal) and the seconds go to stdout.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from tpvprune.cli import benchmark, commands, training  # noqa: F401
from tpvprune.cli.entry import main

STEPS = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"),
    *("shutil.rmtree", "ctypes.dlsym", "os.link"),
}


def watch(last, home):
    """Count steps of files under a folder; kill this process before the last one."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event not in STEPS or (event != "ctypes.dlsym" and not is_under(arguments[0])):
            return
        if event == "open" and not is_writing(arguments):
            return
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def is_under(path):
        return isinstance(path, (str, Path)) and Path.cwd().joinpath(path).is_relative_to(home)

    sys.addaudithook(hook)
    return lambda: count


def is_writing(arguments):
    mode, flags = arguments[1:3]
    return any(c in (mode or "") for c in "wax+") or (flags & (os.O_WRONLY | os.O_RDWR)) != 0


def child(folder, moment, argv):
    os.chdir(folder)
    code = 99
    try:
        with Path("said.txt").open("w") as sys.stderr:
            steps = watch(moment[1] if moment and moment[0] == "step" else None, Path.cwd())
            code = main(argv)
        Path("steps.txt").write_text(str(steps()))
    except BaseException:
        Path("said.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def run(folder, moment, argv):
    start = time.monotonic()
    if moment == ["here"]:
        with contextlib.redirect_stderr(io.StringIO()):
            os.chdir(folder)
            return main(argv), time.monotonic() - start
    number = os.fork()
    if not number:
        child(folder, moment, argv)
    if moment and moment[0] == "clock":
        time.sleep(moment[1])
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        where, when, *arguments = json.loads(line)
        print(json.dumps(run(where, when, arguments)), flush=True)
