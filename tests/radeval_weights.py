"""Small random weights where RadEval looks for the real ones, laid out as its downloads are.

    PYTHON -I tests/radeval_weights.py FOLDER    # PYTHON: the one that has RadEval

`srrbert` runs on them as it is. What they say is made up; a test compares it with RadEval called directly."""

import json
import sys
from pathlib import Path

WORDS = "the heart is enlarged no pleural effusion small left nodule lungs are clear and . , 0 1 2 3".split()


def snapshot(home: Path, name: str) -> Path:
    "The folder of a hub repository's files in a cache, with the note that leads to it."
    place = home / f"models--{name.replace('/', '--')}"
    folder = place / "snapshots" / "made-up"
    folder.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("made-up")
    return folder


def write_tokenizer(folder: Path) -> int:
    "Write a word-piece tokenizer of a few words; returns the size of its vocabulary."
    from transformers import BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(chr, range(97, 123))]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_srrbert(home: Path) -> None:
    "SRR-BERT with RadEval's own number of labels, and its tokenizer."
    import radeval
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    mapping = Path(radeval.__file__).parent / "metrics/SRRBert/leaves_with_statuses_mapping.json"
    labels, size = (
        len(json.loads(mapping.read_text())),
        write_tokenizer(snapshot(home, "microsoft/BiomedVLP-CXR-BERT-general")),
    )
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(vocab_size=size, num_labels=labels, initializer_range=0.6, **shape)
    model = BertForSequenceClassification(config)
    model.save_pretrained(snapshot(home, "StanfordAIMI/SRR-BERT-Leaves-with-Statuses"))


def make_punkt(folder: Path) -> None:
    "nltk's sentence splitter without a learnt word."
    place = folder / "nltk_data/tokenizers/punkt_tab/english"
    place.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (place / name).write_text("")


if __name__ == "__main__":
    make_srrbert(Path(sys.argv[1]) / "hub")
    make_punkt(Path(sys.argv[1]))
