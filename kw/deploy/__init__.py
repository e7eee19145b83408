"""Trained networks in use: exported files, a classifier or detector from them, predictions.

::

    classifier = kw.load("work_dirs/kw_resnet18_1x")  # or a file of these formats
    classifier.predict(["cat.jpg"], k=5)

- :mod:`.source`: a training run's network and its description;
- :mod:`.description`: the metadata of every exported file: classes, preprocessing, configuration;
- :mod:`.graph`, :mod:`.onnx_file`, :mod:`.runtimes`, :mod:`.weights`: the formats;
- :mod:`.quantize`: INT8;
- :mod:`.verify`: a written file against PyTorch; :mod:`.card`: the model card;
- :mod:`.classifier`: ``kw.load``; :mod:`.predict`: files and folders;
- :mod:`.detector`: detectors' files, without mmdetection; :mod:`kw.detection.export` writes them.
"""

from .classifier import Classifier, Prediction, load
from .description import Description, ExportError
from .export import Written, export
from .predict import find_images, predict_files
from .source import Source, read_source

__all__ = [
    "Classifier",
    "Description",
    "ExportError",
    "Prediction",
    "Source",
    "Written",
    "export",
    "find_images",
    "load",
    "predict_files",
    "read_source",
]
