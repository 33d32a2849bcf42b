"""A miniature of microsoft/maira-2 in the true format (see tests/maira2 for its code)."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, BitImageProcessor, PreTrainedTokenizerFast

CODE = Path(__file__).with_name("maira2")
TEXT = (
    "the heart is enlarged . the lungs are clear . no pleural effusion or pneumothorax . "
    "there is a small left effusion . right upper lobe opacity . frontal lateral prior grounded findings "
    "indication technique comparison N/A cough and fever USER ASSISTANT INDICATION TECHNIQUE COMPARISON"
)
PATCH, SIDE = 14, 28  # pixels; 518 in the release
CHAT = (
    "{% for turn in messages %}{% if turn.role == 'user' %} USER: {% else %} ASSISTANT: {% endif %}"
    "{% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT: {% endif %}"
)


def make_tokenizer(folder):
    "As the release's: Llama's pieces, then phrases, boxes, 100 bins each way, and the images' tokens."
    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    pieces.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    bins = [f"<{axis}{i}>" for axis in "xy" for i in range(100)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.add_tokens(["<obj>", "</obj>", *bins, "<box>", "</box>"])
    tokenizer.add_tokens(["<image>", "<prev_im>", "<lat_image>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


def configuration(tokenizer):
    "The fields of the release's config.json, small."
    text = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_scaling=dict(type="linear", factor=1.5),
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    vision = dict(
        model_type="dinov2",
        architectures=["Dinov2Model"],
        apply_layernorm=True,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.6,
        out_features=["stage2"],
        out_indices=[2],
        stage_names=["stem", "stage1", "stage2"],
        reshape_hidden_states=False,
    )
    return dict(
        architectures=["Maira2ForConditionalGeneration"],
        auto_map={
            "AutoConfig": "configuration_maira2.Maira2Config",
            "AutoModelForCausalLM": "modeling_maira2.Maira2ForConditionalGeneration",
            "AutoModelForVision2Seq": "modeling_maira2.Maira2ForConditionalGeneration",
        },
        model_type="maira2",
        hidden_size=32,
        ignore_index=-100,
        image_seq_length=(SIDE // PATCH) ** 2,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        multimodal_projector_bias=True,
        pad_token_id=0,
        projector_hidden_act="gelu",
        projector_n_layers=4,
        text_config=text,
        vision_config=vision,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        torch_dtype="float32",
        tie_word_embeddings=False,
    )


def make_processor(folder):
    "The release's two files of the processor; its class lies in processing_maira2.py."
    code = {"AutoProcessor": "processing_maira2.Maira2Processor"}
    BitImageProcessor(
        size=dict(shortest_edge=SIDE),
        crop_size=dict(height=SIDE, width=SIDE),
        image_mean=[0.5307] * 3,
        image_std=[0.2583] * 3,
    ).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    named = dict(auto_map=code, processor_class="Maira2Processor")
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    processor = dict(
        processor_class="Maira2Processor",
        auto_map=code,
        image_token="<image>",
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_box_coord_bins=100,
        phrase_start_token="<obj>",
        phrase_end_token="</obj>",
        box_start_token="<box>",
        box_end_token="</box>",
    )
    (folder / "processor_config.json").write_text(json.dumps(processor))


def make(folder, seed=0):
    "Write the miniature into `folder` and return `folder`."
    folder.mkdir(parents=True)
    for path in CODE.glob("*_maira2.py"):
        shutil.copy(path, folder)
    tokenizer = make_tokenizer(folder)
    config = configuration(tokenizer)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.6)
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("<obj>") :] = 0  # it writes words alone
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))  # as the release has it
    tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    (folder / "generation_config.json").write_text(json.dumps(tokens))
    make_processor(folder)
    return folder
