"Of `make lab`: a notebook that is saved is cleaned as `nbdev_clean` would, so that Run All and saving leave `make test` green."

from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821 (Jupyter defines c)
