"""One recipe in, one run folder out: a model, its curve, its checkpoints, its report.

Read `loop.py` first; everything it calls is one idea in one file of this folder.
"""
