"""Rewards: text, clinical and format scores of a report, rank normalisation, and Eq. 3 to 9, which compose them."""

import lazy_loader

# Names are imported when they are asked for, so that no chapter waits for the libraries of another.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "text": ["register", "scorer"],
        "ranknorm": ["rank_norm", "rank_reward"],
        "compose": ["advantages", "is_clinical_step"],
    },
)
