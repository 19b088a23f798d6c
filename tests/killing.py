"""Processes to be killed for real: forked from a server that has the heavy libraries loaded, so that twenty cost seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
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


def start(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that does some work, a function that can be imported."""
    process = forks().Process(target=work, args=arguments)
    process.start()
    return process


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
