"""Questions about films with options to choose from: files of public benchmarks that the user supplies, and how a model does
on them.

``mmalign evaluate-video CONFIG``: `formats` reads the file, `run` asks a model or a trained run, and counts. Nothing is
downloaded.
"""
