"""The released modeling_maira2.py has this layout: parts on the model itself (transformers 4.46 to 4.51)."""

from transformers import (
    AutoBackbone,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    LlavaPreTrainedModel,
)

from .configuration_maira2 import Maira2Config
from .modeling_maira2 import Projector


class Maira2ForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = Maira2Config

    def __init__(self, config):
        super(LlavaPreTrainedModel, self).__init__(config)
        self.vision_tower = AutoBackbone.from_config(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
