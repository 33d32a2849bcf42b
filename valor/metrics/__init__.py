"""Metrics: statistics of reports, their intervals, and `valor evaluate`."""

import lazy_loader

# Names are imported when they are asked for, so that no chapter waits for the libraries of another.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
    },
)
