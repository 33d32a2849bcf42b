"""Stands for the file of this name in microsoft/maira-2, in the layout of transformers 5.

As there: a DINOv2 backbone whose normed feature maps, without the first token, pass a projector of several
layers into a Llama."""

from torch import nn
from transformers import (
    AutoBackbone,
    AutoModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_maira2 import Maira2Config


class Projector(nn.Module):
    def __init__(self, config):
        super().__init__()
        text = config.text_config.hidden_size
        steps = [nn.Linear(config.vision_config.hidden_size, text)]
        for _ in range(config.projector_n_layers - 1):
            steps += [ACT2FN[config.projector_hidden_act], nn.Linear(text, text)]
        self.layers = nn.Sequential(*steps)

    def forward(self, features):
        return self.layers(features)


class Maira2Model(LlavaModel):
    config_class = Maira2Config

    def __init__(self, config):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoBackbone.from_config(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values, **_):
        "`pooler_output`: for each image its patches in the language model's space."
        found = self.vision_tower(pixel_values)
        patches = found.feature_maps[self.config.vision_feature_layer][:, 1:]
        features = list(self.multi_modal_projector(patches))
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=features)


class Maira2ForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = Maira2Config

    def __init__(self, config):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = Maira2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
