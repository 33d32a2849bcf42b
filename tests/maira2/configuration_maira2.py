"""Stands for the file of this name in microsoft/maira-2: a LLaVA configuration with a deeper projector."""

from transformers import LlavaConfig


class Maira2Config(LlavaConfig):
    "`projector_n_layers`: linear layers between the image's features and the language model."

    model_type = "maira2"

    def __init__(self, projector_n_layers=4, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size = self.text_config.hidden_size
        self.projector_n_layers = projector_n_layers
