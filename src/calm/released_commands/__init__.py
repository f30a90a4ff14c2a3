"""The commands of the released code, as its README has them: main.py, eval_pixel_perturb.py, eval_cue_location.py.

They read the released flags, translate them, and call this package's functions. Nothing is computed here that the rest
of the package computes too.
"""
