"""Answers that a model makes up because it sees little of the picture (BDHS, arXiv:2407.02477), and what they need."""
