"""Image-text experts: the embedded one that a run trains, and frozen ones from elsewhere (Eq. 6)."""

import lazy_loader

# Names are imported when they are asked for, so that no chapter waits for the libraries of another.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "frozen": ["load_expert"],
    },
)
