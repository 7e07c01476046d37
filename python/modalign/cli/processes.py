"""One command in several processes of this machine, started by itself through torchrun's launcher or by torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher import LaunchConfig, elastic_launch

__all__ = ["launch", "under_torchrun"]

Work = Callable[..., None]  # of any arguments, with the process group as `process_group`
INTERRUPTED = 130


def launch(count: int, device: str, work: Work, *arguments: Any) -> None:
    """Run `work` in `count` processes. The first of them to fail ends all, and its error is raised here.

    Nobody else can reach them: they meet in a file of a private folder, and talk through the loopback interface.
    """
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[variable] = "lo"
    logging.disable(logging.CRITICAL)  # torch would tell of failures in forty lines; they are told here
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
            elastic_launch(config, _rank_of_launch)(f"file://{folder}/ranks", device, work, arguments)
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise typer.Exit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode == INTERRUPTED:
            raise KeyboardInterrupt from None
        told = failure.message if isinstance(failure.message, dict) else {"message": failure.message, "extraInfo": {}}
        kind, _, text = told["message"].partition(": ")
        if kind == ValueError.__name__:
            raise ValueError(text) from None
        raise RuntimeError(f"process {rank} of {count} failed: {told['extraInfo'].get('py_callstack', told['message'])}") from None
    finally:
        logging.disable(logging.NOTSET)


def _rank_of_launch(meeting: str, device: str, work: Work, arguments: tuple[Any, ...]) -> None:
    os.setpgrp()  # Ctrl-C reaches the launcher, which passes it on: once, and not twice
    try:
        _rank(meeting, device, work, arguments)
    except OSError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


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
    if torch.device(device).type == "cuda":
        if torch.device(device).index is not None:
            raise ValueError(f"device must be cuda without a number, since every process takes the next one, got {device}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=count)
    work(*arguments, process_group=dist.group.WORLD)
    dist.destroy_process_group()
