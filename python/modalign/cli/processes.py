"""One command in several processes of this machine, started by itself through torchrun's launcher or by torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.launcher import LaunchConfig, elastic_launch

from ..bench.environment import all_threads

__all__ = ["launch", "under_torchrun"]

Work = Callable[..., None]  # of any arguments, with the process group as `process_group`
INTERRUPTED = 130
TOLD_FIRST = 1.0  # seconds: who talks to a rank that is gone fails too, and should not be seen before it by the launcher, which looks ten times a second


def launch(count: int, device: str, work: Work, *arguments: Any) -> None:
    """Run `work` in `count` processes. The first of them to fail ends all, and its error is raised here.

    Nobody else can reach them: they meet in a file of a private folder, and talk through the loopback interface.
    """
    if device == "cpu" and count > all_threads():  # of GPUs each process asks for its own
        raise ValueError(f"nproc must be from 1 to the {all_threads()} cores that this process may use, got {count}")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[variable] = "lo"
    logging.disable(logging.CRITICAL)  # torch would tell of failures in forty lines; they are told here
    # Processes begin with Ctrl-C blocked, which they inherit from this thread, until they can end well; here another thread takes it.
    resource_tracker.ensure_running()  # it would unblock
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id="modalign",
                rdzv_backend="c10d",
                rdzv_endpoint=f"{folder}/launcher",
                rdzv_configs={"store_type": "file"},
                local_addr="127.0.0.1",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            try:
                elastic_launch(config, _rank_of_launch)(f"file://{folder}/ranks", device, work, arguments)
            except ChildFailedError as failed:
                raise _as_error(*failed.get_first_failure()) from None
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise typer.Exit(128 + stopped.sigval) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        logging.disable(logging.NOTSET)


def _as_error(rank: int, failure: ProcessFailure) -> BaseException:
    if failure.exitcode == INTERRUPTED:
        return KeyboardInterrupt()
    if failure.exitcode < 0:
        return ValueError(f"rank {rank} must come to its end, got {failure.signal_name()}")  # such as that of a system short of memory
    kind, _, text = failure.message["message"].partition(": ")
    if kind == ValueError.__name__:
        return ValueError(text)
    return RuntimeError(f"rank {rank} failed:\n{failure.message['extraInfo']['py_callstack']}")


def _rank_of_launch(meeting: str, device: str, work: Work, arguments: tuple[Any, ...]) -> None:
    os.setpgrp()  # Ctrl-C reaches the launcher, which passes it on: once, and not twice
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        record(_told)(meeting, device, work, arguments)
    except BaseException as error:  # the launcher tells what was recorded
        sys.stdout.flush()
        if not isinstance(error, (ValueError, KeyboardInterrupt)):
            time.sleep(TOLD_FIRST)
        os._exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)  # threads of the group may still wait for other ranks


def _told(meeting: str, device: str, work: Work, arguments: tuple[Any, ...]) -> None:
    """With errors that a user can act on as ValueErrors."""
    try:
        _rank(meeting, device, work, arguments)
    except OSError as error:
        raise ValueError(str(error)) from error


def under_torchrun(device: str, work: Work, *arguments: Any) -> None:
    """Run `work` as one of the processes that torchrun started. Of errors that all have, the first alone tells; torchrun reports which was the first."""
    try:
        record(_rank)("env://", device, work, arguments)
    except KeyboardInterrupt:
        if os.environ["RANK"] == "0":
            raise
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError) as error:
        if os.environ["RANK"] == "0":
            raise
        raise typer.Exit(1) from error


def _rank(meeting: str, device: str, work: Work, arguments: tuple[Any, ...]) -> None:
    rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.device(device).type == "cuda"
    if cuda:
        if torch.device(device).index is not None or local >= torch.cuda.device_count():
            raise ValueError(f"device must be cuda without a number and have a GPU for every process, got {device} and {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=meeting, rank=rank, world_size=count)
    work(*arguments, process_group=dist.group.WORLD)
    dist.destroy_process_group()
