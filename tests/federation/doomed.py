"""A process that kills itself before a chosen operation on files: what SIGKILL does, at a place that can be chosen."""

import itertools
import os
import signal
import sys

import torch

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def doomed(target, due, place, log, *settings):
    """Run ``target`` in this process; before operation ``due`` on files in ``place`` the process kills itself."""
    torch.set_num_threads(1)
    if due:
        numbers, record = itertools.count(1), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def operation(event, arguments):
            writes = event == "open" and arguments[1] and set(arguments[1]) & set("wa")
            if (writes or event in CHANGES) and place in str(arguments[0]) and next(numbers) == due:
                name = str(arguments[0]).rsplit("/", 1)[-1].replace(f".{os.getpid()}.", ".")
                os.write(record, f"{event} {name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(operation)
    target(*settings)
