"""Tiny weights of Med-Flamingo in the true format, and open-flamingo called as Med-Flamingo's demo calls it.

Run by the Python of `make flamingo`, without valor:

python flamingo_weights.py make FOLDER      writes FOLDER/llama-7b-hf, FOLDER/ViT-L-14.pt, FOLDER/model.pt
python flamingo_weights.py direct FOLDER    reads [[prompt, [image files]], …] as JSON from its input,
                                            prints what the model writes after each prompt
python flamingo_weights.py refuse FOLDER FILE …   prints what valor's worker says of each of these checkpoints

LLaMA is small. CLIP keeps the name and width (1,024) of ViT-L-14 and one layer; the perceiver is whole."""

import importlib.util
import json
import sys
from pathlib import Path

TEXT = (
    "the heart is normal in size . the lungs are clear . there is no pleural effusion or pneumothorax .\n"
    "small left effusion is seen . right upper lobe nodule , unchanged . mild cardiomegaly with edema .\n"
    "You are a helpful medical assistant. You are being provided with images, a question about the image and "
    "an answer. Follow the examples and answer the last question. Question: Answer:\n"
    "You are a radiologist. Write the report of this chest X-ray: the findings, then the impression.\n"
)
TOKENS = 24


def make_llama(folder):
    "As decapoda-research/llama-7b-hf: pytorch_model.bin in two parts, tokenizer.model, no tokenizer.json."
    import sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    folder.mkdir()
    source = folder.parent / "text"
    source.write_text(TEXT)
    options = dict(vocab_size=400, model_type="bpe", hard_vocab_limit=False, pad_id=-1)
    sentencepiece.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(folder / "tokenizer"), minloglevel=2, **options
    )
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"))
    tokenizer.save_pretrained(folder)
    config = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4)
    config |= dict(vocab_size=len(tokenizer), initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    llama = LlamaForCausalLM(LlamaConfig(max_position_embeddings=512, **config))
    llama.save_pretrained(folder, max_shard_size="500KB")


def make_clip(path):
    "As openai's file: a TorchScript archive in half precision."
    import torch
    from open_clip.model import CLIP

    vision = dict(image_size=28, layers=1, width=1024, head_width=64, patch_size=14)
    text = dict(context_length=8, vocab_size=32, width=64, heads=1, layers=1)
    clip = CLIP(32, vision, text, quick_gelu=True).eval()
    archive = torch.nn.Module()
    for name, value in clip.state_dict().items():
        *parts, last = name.split(".")
        place = archive
        for part in parts:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, torch.nn.Parameter(value.half(), requires_grad=False))
    torch.jit.script(archive).save(str(path))


def flamingo(folder):
    "The package's own model, as Med-Flamingo's demo makes it, before its checkpoint is loaded."
    import open_clip.factory
    from open_flamingo import create_model_and_transforms

    by_name = open_clip.factory.load_openai_model
    path = str(folder / "ViT-L-14.pt")
    open_clip.factory.load_openai_model = lambda name, **options: by_name(path, **options)
    llama = str(folder / "llama-7b-hf")
    return create_model_and_transforms(
        clip_vision_encoder_path="ViT-L-14",
        clip_vision_encoder_pretrained="openai",
        lang_encoder_path=llama,
        tokenizer_path=llama,
        cross_attn_every_n_layers=4,
    )


def make(folder):
    "`model.pt` is what the package's training writes: the trained weights, and buffers."
    import torch
    from open_flamingo.train.train_utils import get_checkpoint

    torch.manual_seed(1)
    make_llama(folder / "llama-7b-hf")
    make_clip(folder / "ViT-L-14.pt")
    model, _, _ = flamingo(folder)
    with torch.no_grad():
        for block in filter(None, model.lang_encoder.gated_cross_attn_layers):
            block.attn_gate.fill_(2.0)
            block.ff_gate.fill_(1.0)
            block.attn.to_out.weight.normal_(std=1.0)
    torch.save(get_checkpoint(model), folder / "model.pt")
    print(json.dumps(sorted(get_checkpoint(model))))


def direct(folder):
    import torch
    from einops import repeat
    from PIL import Image

    torch.manual_seed(0)
    model, preprocess, tokenizer = flamingo(folder)
    model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu"), strict=False)
    model.eval()
    said = []
    for prompt, images in json.load(sys.stdin):
        pixels = torch.stack([preprocess(Image.open(path)) for path in images])
        pixels = repeat(pixels, "N c h w -> b N T c h w", b=1, T=1)
        text = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(
            vision_x=pixels,
            lang_x=text["input_ids"],
            attention_mask=text["attention_mask"],
            max_new_tokens=TOKENS,
        )
        said.append(tokenizer.decode(tokens[0][len(text["input_ids"][0]) :]))
    print(json.dumps(said))


def refuse(folder, *checkpoints):
    path = Path(__file__).parents[1] / "valor/results/flamingo_worker.py"
    spec = importlib.util.spec_from_file_location("worker", path)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    model, said = flamingo(folder)[0], []
    for checkpoint in checkpoints:
        try:
            worker.load_trained(model, checkpoint)
            said.append("loaded")
        except ValueError as e:
            said.append(str(e))
    print(json.dumps(said))


if __name__ == "__main__":
    {"make": make, "direct": direct, "refuse": refuse}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
