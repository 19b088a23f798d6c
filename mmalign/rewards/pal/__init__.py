"""PAL (arXiv:2406.08469): rewards for people who differ, as mixtures of a few shared ideal points on frozen embeddings."""

from __future__ import annotations
