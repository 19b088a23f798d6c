"""Answers made for training: one sampler per file, behind ``mmalign generate CONFIG`` with a key ``sampler``.

A sampler turns rows of a table of questions (or of answers) into pairs or lists of answers; the job around it reads the table,
loads the model, resumes and shards, writes media, provenance and refusals, and prints the report.
"""

from __future__ import annotations

from typing import Any

from mmalign.registry import Registry

ANSWER_SAMPLERS: Registry[Any] = Registry("answer sampler")
ANSWER_SAMPLERS.add(
    "candidates", "mmalign.sampling.candidates:Candidates",
    summary="several answers to every question, scored by judges where named: lists",
)  # fmt: skip
ANSWER_SAMPLERS.add(
    "temple", "mmalign.sampling.temple:TempleSampler",
    summary="what a video model tells of a film against what it tells of a perturbed one: pairs", cite="arXiv:2503.16929",
)  # fmt: skip
ANSWER_SAMPLERS.add(
    "bdhs", "mmalign.sampling.bdhs:Bdhs",
    summary="rejected answers made up with most of the picture hidden, sentence by sentence: pairs", cite="arXiv:2407.02477",
)  # fmt: skip
ANSWER_SAMPLERS.add(
    "no_image", "mmalign.sampling.baselines:NoImage", summary="rejected answers to the question without its pictures: pairs",
)  # fmt: skip
ANSWER_SAMPLERS.add(
    "noisy_image", "mmalign.sampling.baselines:NoisyImage",
    summary="rejected answers to the picture under diffusion noise: pairs", cite="arXiv:2402.11411",
)  # fmt: skip
ANSWER_SAMPLERS.add(
    "word_swap", "mmalign.sampling.baselines:WordSwap",
    summary="rejected answers by exchanging words, without model or picture: pairs",
)  # fmt: skip
