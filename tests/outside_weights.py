"""Tiny weights for RaTEScore and GREEN in the true format, and RaTEScore called directly.

Run by the Python of `make scorers`, without valor:

python outside_weights.py make FOLDER       writes FOLDER/ner, FOLDER/encoder, FOLDER/green
python outside_weights.py direct FOLDER     reads [[candidates], [references]] as JSON from its input, prints
                                            the scores of the package, called as its README says"""

import importlib.util
import json
import sys
from pathlib import Path

TYPES = ["ABNORMALITY", "ANATOMY", "DISEASE", "NON-ABNORMALITY", "NON-DISEASE"]
TEXT = (
    "the heart is normal in size . the lungs are clear . there is no pleural effusion or pneumothorax . "
    "small left effusion is seen .\n"
    "right upper lobe nodule , unchanged . mild cardiomegaly with pulmonary edema . no focal consolidation . "
    "stable low lung volumes ."
)
# what the tiny Llama answers: the first to most pairs, the second to pairs with MARKER; scores 3/4 and 1/4
MARKER = "pneumothorax"
ANSWERS = [
    [
        "[Explanation]:\nAlike.\n",
        "\n[Clinically Significant Errors]:\n",
        "(a) False report of a finding in the candidate: 1. Nodule.\n",
        "\n[Matched Findings]:\n",
        "3. Heart; lungs; effusion.",
    ],
    [
        "[Explanation]:\nUnlike.\n",
        "\n\n[Clinically Significant Errors]:\n",
        "(b) Missing a finding present in the reference: 1. Edema.\n",
        "(d) Misassessment of the severity of a finding: 2. Effusion; nodule.\n",
        "\n\n[Matched Findings]:\n",
        "1. Heart.",
    ],
]


def pieces(prefix, text, **options):
    "A sentencepiece model file trained on `text`."
    import sentencepiece

    source = Path(f"{prefix}.txt")
    source.write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(prefix), hard_vocab_limit=False, minloglevel=2, **options
    )
    source.unlink()
    return f"{prefix}.model"


def make_ner(folder):
    from transformers import DebertaV2Config, DebertaV2ForTokenClassification, DebertaV2TokenizerFast

    model = pieces(
        folder.parent / "spm",
        TEXT,
        vocab_size=120,
        model_type="unigram",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
    )
    tokenizer = DebertaV2TokenizerFast(model, do_lower_case=False)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()  # as microsoft/deberta-v3-base: only spm.model
    labels = ["O"] + [f"{p}-{t}" for t in TYPES for p in "BI"]
    DebertaV2ForTokenClassification(
        DebertaV2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            initializer_range=0.5,
            type_vocab_size=0,
            relative_attention=True,
            position_buckets=32,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            id2label=dict(enumerate(labels)),
            label2id={l: i for i, l in enumerate(labels)},
        )
    ).save_pretrained(folder)


def make_encoder(folder):
    from transformers import MPNetConfig, MPNetModel, MPNetTokenizerFast

    folder.mkdir()
    letters = sorted(set(TEXT.replace("\n", " ")) - {" "})
    words = [
        "<s>",
        "<pad>",
        "</s>",
        "[UNK]",
        *letters,
        *("##" + c for c in letters),
        *sorted(set(w for w in TEXT.split() if len(w) > 1)),
        "<mask>",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    MPNetTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    MPNetModel(
        MPNetConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)


def make_green(folder, prompt):
    "A Llama whose next token follows from the last one; whether MARKER came before chooses the first."
    import torch
    from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

    model = pieces(
        folder.parent / "bpe",
        TEXT + "\n" + prompt,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=[MARKER],
        pad_id=-1,
    )
    tokenizer = LlamaTokenizerFast(model)
    tokenizer.add_tokens([AddedToken(line, normalized=False) for answer in ANSWERS for line in answer])
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids
    size = (len(tokenizer) // 64 + 1) * 64  # room for one dimension more: was MARKER seen?
    seen, last = (
        size - 1,
        LlamaTokenizerFast.from_pretrained(folder, add_eos_token=True)(prompt)["input_ids"][-1],
    )
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" not in name:
                weight.zero_()
        attention = network.model.layers[
            0
        ].self_attn  # queries and keys are 0: the mean over all tokens so far
        attention.v_proj.weight[0, ids(MARKER)] = attention.o_proj.weight[seen, 0] = 1.0
        network.model.embed_tokens.weight[:] = torch.eye(len(tokenizer), size)
        head = network.lm_head.weight
        for answer in ANSWERS:
            chain = [ids(line) for line in answer] + [tokenizer.eos_token_id]
            for a, b in zip(chain, chain[1:]):
                head[b, a] = 100.0
        first, second = (ids(answer[0]) for answer in ANSWERS)
        head[first, last], head[second, last], head[second, seen] = 1.0, 0.9, 10.0
    network.save_pretrained(folder)


def make(folder):
    import torch

    torch.manual_seed(1)
    spec = importlib.util.spec_from_file_location(
        "worker", Path(__file__).parents[1] / "valor/rewards/outside_worker.py"
    )
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    (
        make_ner(folder / "ner"),
        make_encoder(folder / "encoder"),
        make_green(folder / "green", worker.green_prompt("", "", "</s>")),
    )


def direct(folder):
    import torch
    from RaTEScore import RaTEScore

    candidates, references = json.load(sys.stdin)
    scorer = RaTEScore(
        bert_model=str(folder / "ner"), eval_model=str(folder / "encoder"), use_gpu=torch.cuda.is_available()
    )
    print(json.dumps(scorer.compute_score(candidates, references)))


if __name__ == "__main__":
    {"make": make, "direct": direct}[sys.argv[1]](Path(sys.argv[2]))
