"""A local page where people choose between two pictures, and the file their choices go to."""

from __future__ import annotations
