"""What detectors find in a picture, its masks as run lengths, and its drawing. None of it needs
mmdetection: :mod:`kw.deploy` and :mod:`kw.detection` both build on it.
"""
