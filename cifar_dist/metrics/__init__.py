"""Hugging Face `evaluate` modules that ship with the project, so that scoring needs no Hub.

All take the same inputs: ``predictions``, N rows of K scores (probabilities for the cross-entropy and the
calibration), and ``references``, N class numbers. So they can be put together with ``evaluate.combine``.
"""
