"""Processes to be killed or to work together: forked from a server that has the heavy libraries loaded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

LOADED = (
    "mmalign.experiment.running", "mmalign.experiment.caching", "mmalign.report", "mmalign.models.diffusion.sd",
    "mmalign.models.diffusion.kohya", "mmalign.trainers.mapo", "mmalign.trainers.freeze_as_guard", "pandas", "rich",
    "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "PIL.ImageSequence", "PIL.ImageChops",
    "accelerate", "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim", "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_unipc_multistep", "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip", "peft",
)  # fmt: skip
DEADLINE = 120.0


def forks() -> ForkServerContext:
    """A context whose processes start with the libraries in memory and no thread of the tests'."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    return context


def free_port() -> int:
    """A port of this machine that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that does some work, a function that can be imported."""
    process = forks().Process(target=work, args=arguments)
    process.start()
    return process


def run_code(code: str, *arguments: str) -> None:
    """A program that stands in a text, as ``python -c`` runs it."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


def launched(count: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Some work on several processes, as `accelerate launch` starts them on a CPU; all of them have to come to a good end."""
    port = free_port()
    processes = [start(_one_of, rank, count, port, work, arguments) for rank in range(count)]
    for process in processes:
        process.join(timeout=2 * DEADLINE)
        if process.exitcode != 0:
            for each in processes:
                each.kill()
            raise AssertionError(f"a process failed, or waits for another for ever (exit code {process.exitcode})")


def _one_of(rank: int, count: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    work(*arguments)


def kill_when(process: BaseProcess, due: Callable[[], bool], *, pause: float = 0.001) -> bool:
    """SIGKILL as soon as something is so; False where the process ended before it was.

    Raises:
        TimeoutError: neither came.
    """
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if process.exitcode is not None:
            return False
        if due():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return process.exitcode == -signal.SIGKILL
        time.sleep(pause)
    process.kill()
    raise TimeoutError("the process neither ended nor came to where it was to be killed")
