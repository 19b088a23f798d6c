"""Choosing films that teach order: shots, blur, likeness of shots, and rules with thresholds (arXiv:2503.16929; lscpku/TEMPLE).

``mmalign data select CONFIG``: `settings` says the thresholds, `shots` looks at every frame once, `features` at one frame of
every shot, `rules` decides, `run` writes the table of kept films with a page of kept and refused ones.
"""
