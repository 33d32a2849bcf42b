"""Of `make lab`: notebooks open unmarked, and saving after Run All leaves them clean, so that `make test`
stays green.

A notebook on disk has no more metadata than every machine can agree on (tests/check_notebooks.py).
JupyterLab takes a notebook for changed whose metadata differ from what the kernel says of itself, the version
of Python included. So they are filled in when a notebook is read, and taken out again when it is saved.
"""

import sys

from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import get_kernel_spec
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_jupyter

LANGUAGE = {"name": "python"}  # what stays of language_info on disk


def cleaned(path, model, contents_manager, **kwargs):
    "What JupyterLab calls before it saves `model`; `path` is relative to the server's root."
    if model["type"] == "notebook":
        model["content"]["metadata"]["language_info"] = LANGUAGE
    clean_jupyter(path=contents_manager._get_os_path(path), model=model)


class Contents(AsyncLargeFileManager):
    async def get(self, path, content=True, **kwargs):
        "The file `path`; a notebook with the metadata of this machine's kernel."
        model = await super().get(path, content, **kwargs)
        if content and model["type"] == "notebook":
            spec = get_kernel_spec("python3")
            name = dict(name="python3", display_name=spec.display_name, language=spec.language)
            language = IPythonKernel.language_info | {"version": sys.version.split()[0]}
            model["content"]["metadata"] |= dict(kernelspec=name, language_info=language)
        return model


c.ContentsManager.pre_save_hook = cleaned  # noqa: F821 (Jupyter defines c)
c.ServerApp.contents_manager_class = Contents  # noqa: F821
