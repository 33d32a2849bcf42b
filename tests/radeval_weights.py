"""Small random weights where RadEval looks for the real ones, in their formats and laid out as they are.

    PYTHON -I tests/radeval_weights.py FOLDER [METRIC ...]    # PYTHON: the one that has RadEval

METRIC: srrbert, radcliq, temporal or crimson; without one, all. What they say is made up; a test compares it
with RadEval called directly."""

import hashlib
import json
import os
import sys
import tarfile
import tempfile
from itertools import product
from pathlib import Path
from unittest import mock

WORDS = "the heart is enlarged no pleural effusion small left nodule lungs are clear and . , 0 1 2 3".split()
WORDS += ["new", "stable", "worse"]
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
PUBMED_BERT = "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext"  # RadGraph's encoder


def snapshot(home: Path, name: str) -> Path:
    "The folder of a hub repository's files in a cache, with the note that leads to it."
    place = home / f"models--{name.replace('/', '--')}"
    folder = place / "snapshots" / "made-up"
    if not folder.exists():
        folder.mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("made-up")
    return folder


def stay_home(folder: Path) -> None:
    "Let the packages look in `folder` only, and fetch nothing."
    places = dict(HF_HOME=folder, HF_HUB_CACHE=folder / "hub", XDG_CACHE_HOME=folder, HF_HUB_OFFLINE=1)
    os.environ.update({name: str(place) for name, place in places.items()})
    import nltk

    nltk.download = lambda *names, **options: True


def write_tokenizer(folder: Path) -> int:
    "Write a word-piece tokenizer of a few words; returns the size of its vocabulary."
    from transformers import BertTokenizer

    letters = list(map(chr, range(97, 123)))
    pieces = [*WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_punkt(folder: Path) -> None:
    "nltk's sentence splitter without a learnt word."
    place = folder / "nltk_data/tokenizers/punkt_tab/english"
    place.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (place / name).write_text("")


def make_srrbert(folder: Path) -> None:
    "SRR-BERT with RadEval's own number of labels, and its tokenizer."
    import radeval
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    mapping = Path(radeval.__file__).parent / "metrics/SRRBert/leaves_with_statuses_mapping.json"
    labels = len(json.loads(mapping.read_text()))
    size = write_tokenizer(snapshot(folder / "hub", "microsoft/BiomedVLP-CXR-BERT-general"))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=size, num_labels=labels, initializer_range=0.6, **SMALL)
    model = BertForSequenceClassification(config)
    model.save_pretrained(snapshot(folder / "hub", "StanfordAIMI/SRR-BERT-Leaves-with-Statuses"))
    make_punkt(folder)


# --- RadCliQ: BERTScore, CheXbert and RadGraph (its fourth part, BLEU, has no weights)


def write_distilroberta(folder: Path) -> None:
    "BERTScore's model, of whose six layers RadCliQ takes five, with a tokenizer of single bytes."
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    RobertaTokenizer(vocabulary, [], model_max_length=512).save_pretrained(folder)
    torch.manual_seed(1)
    shape = SMALL | dict(num_hidden_layers=6, max_position_embeddings=514, type_vocab_size=1)
    config = RobertaConfig(vocab_size=len(tokens), initializer_range=0.3, **shape)
    RobertaModel(config).save_pretrained(folder)


def write_chexbert(folder: Path, hub: Path) -> None:
    "`chexbert.pth`, with the names that training on several GPUs gave, and the BERT that it is built from."
    import torch
    from transformers import BertConfig, BertModel

    bert = snapshot(hub, "bert-base-uncased")
    torch.manual_seed(2)
    config = BertConfig(vocab_size=write_tokenizer(bert), initializer_range=0.5, **SMALL)
    config.save_pretrained(bert)
    model = torch.nn.Module()
    model.bert = BertModel(config)
    heads = [torch.nn.Linear(config.hidden_size, n) for n in [4] * 13 + [2]]
    model.linear_heads = torch.nn.ModuleList(heads)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}
    torch.save(checkpoint, folder / "chexbert.pth")


def radgraph_config() -> dict:
    "DyGIE's configuration, as in the released archive."
    bert = dict(type="pretrained_transformer_mismatched", model_name=PUBMED_BERT, max_length=512)
    share = dict(trigger_spans_per_word=0.3, argument_spans_per_word=0.8)
    model = dict(
        type="dygie",
        embedder=dict(token_embedders=dict(bert=bert)),
        initializer={},
        module_initializer={},
        feature_size=20,
        max_span_width=12,
        target_task="relation",
        feedforward_params=dict(num_layers=2, hidden_dims=150, dropout=0.4),
        loss_weights=dict(ner=0.2, relation=1.0, coref=0.0, events=0.0),
        modules=dict(
            coref=dict(spans_per_word=0.3, max_antecedents=100, coref_prop=0),
            ner={},
            relation=dict(spans_per_word=0.5),
            events=dict(share, loss_weights=dict(trigger=1.0, arguments=1.0)),
        ),
    )
    reader = dict(type="dygie", max_span_width=12, token_indexers=dict(bert=bert))
    return dict(dataset_reader=reader, model=model)


def write_radgraph(place: Path, hub: Path) -> None:
    "Configuration, names of labels and random weights of RadGraph in `place`, and its encoder on the hub."
    import radeval
    import torch
    from transformers import BertConfig, BertModel

    sys.modules.setdefault("RadEval", radeval)  # its RadGraph imports itself by this name
    from radeval.metrics.radgraph import RadGraph
    from RadEval.metrics.radgraph._vendor.dygie.models import dygie

    encoder = snapshot(hub, PUBMED_BERT)
    torch.manual_seed(3)
    config = BertConfig(vocab_size=write_tokenizer(encoder), initializer_range=0.3, **SMALL)
    BertModel(config).save_pretrained(encoder)
    words = place / "vocabulary"
    words.mkdir(parents=True)
    (words / "radgraph__ner_labels.txt").write_text("\n".join(["", "OBS-DP", "OBS-DA", "OBS-U", "ANAT-DP"]))
    (words / "radgraph__relation_labels.txt").write_text("\n".join(["modify", "located_at", "suggestive_of"]))
    (words / "non_padded_namespaces.txt").write_text("*labels\n*tags\n")
    (place / "config.json").write_text(json.dumps(radgraph_config()))
    (place / "weights.th").write_bytes(b"")
    keep = mock.patch.object(dygie.DyGIE, "load_state_dict", lambda *a, **k: None)
    with keep, mock.patch.object(torch, "load", lambda *a, **k: {}):
        package = RadGraph(model_type="radgraph", model_cache_dir=str(place.parent), cuda=-1)
    sharpen(package)
    torch.save(package.model.state_dict(), place / "weights.th")


def sharpen(package) -> None:
    "Shift RadGraph's last layers so that of a few words one span in ten is an entity of each kind."
    import torch

    network = package.model
    entities = network._ner._ner_scorers["radgraph__ner_labels"]
    relations = network._relation._relation_scorers["radgraph__relation_labels"]
    for scorer, last in ((entities, entities[1]._module), (relations, relations)):
        seen = []
        hook = scorer.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1].flatten(0, -2)))
        package(["the heart is enlarged . no pleural effusion .", "small left nodule , lungs are clear"])
        hook.remove()
        last.bias.data -= torch.cat(seen).detach().quantile(0.9, dim=0)


def make_radcliq(folder: Path) -> None:
    "The weights of RadCliQ-v1's parts: two files of one hub repository, each in the cache of its part."
    hub = folder / "hub"
    write_distilroberta(snapshot(hub, "distilroberta-base"))
    write_chexbert(snapshot(folder / "chexbert", "StanfordAIMI/RRG_scorers"), hub)
    archive = snapshot(folder / "radgraph/0.1.18", "StanfordAIMI/RRG_scorers") / "radgraph.tar.gz"
    with tempfile.TemporaryDirectory() as place:
        write_radgraph(Path(place) / "radgraph", hub)
        with tarfile.open(archive, "w:gz") as tar:
            for part in sorted((Path(place) / "radgraph").iterdir()):
                tar.add(part, part.name)


# --- temporal F1: stanza's tokenizer, its splitter of contracted words, and the tagger of radiology

LETTERS = [chr(i) for i in range(32, 127)]


def write_stanza_tokenizer(file: Path) -> None:
    """Words are runs of letters and digits, every other sign is a word; a point ends a sentence.

    Its weights are set by hand: a random tokenizer's pieces are no words that a tagger could know."""
    import torch
    from stanza.models.tokenization.trainer import Trainer
    from stanza.models.tokenization.vocab import Vocab

    vocab = Vocab([[(letter, 0) for letter in LETTERS]], "en")
    sizes = dict(vocab_size=len(vocab), emb_dim=4, hidden_dim=4, rnn_layers=1, feat_dim=5, conv_res="3")
    drop = dict(dropout=0.0, feat_dropout=0.0, unit_dropout=0.0, tok_noise=0.0)
    feats = ["space_before", "capitalized", "numeric", "end_of_para", "start_of_para"]
    more = dict(feat_funcs=feats, use_dictionary=False, num_dict_feat=0, use_mwt=True, hierarchical=False)
    learn = dict(lr0=0.002, weight_decay=0.0, batch_size=32, max_seqlen=300)
    args = dict(lang="en", shorthand="en_combined", skip_newline=False) | sizes | drop | more | learn
    trainer = Trainer(args, vocab=vocab, device="cpu")
    for part in trainer.model.parameters():
        part.data.zero_()
    model = trainer.model
    for i, unit in enumerate(vocab._id2unit):
        kinds = [unit.isalnum() and i > 1, unit == " ", unit == "."]
        model.embeddings.weight.data[i, :3] = torch.tensor(kinds).float()
    # (out, in, offset): is this sign alphanumeric, is the next, is this a space, is this a point
    for out, (channel, offset) in enumerate([(0, 1), (0, 2), (1, 1), (2, 1)]):
        model.conv_res[0].weight.data[out, channel, offset] = 1
    model.tok_clf.weight.data[0, :3] = torch.tensor([-10.0, -10, -100])
    model.tok_clf.bias.data.fill_(15)
    model.sent_clf.weight.data[0, 3] = 10
    model.sent_clf.bias.data.fill_(-5)
    model.mwt_clf.bias.data.fill_(-5)
    trainer.save(str(file))


def write_stanza_splitter(file: Path) -> None:
    "The model that cuts contracted words, such as English ones with an apostrophe; random."
    import torch
    from stanza.models.mwt.trainer import Trainer
    from stanza.models.mwt.vocab import Vocab

    vocab = Vocab([("".join(LETTERS), "".join(LETTERS))], "en_combined")
    sizes = dict(vocab_size=len(vocab), emb_dim=8, hidden_dim=8, num_layers=2, emb_dropout=0.0, dropout=0.0)
    kind = dict(dict_only=False, force_exact_pieces=True, ensemble_dict=True, augment_apos=0.0)
    learn = dict(optim="adam", lr=0.001, batch_size=32, max_dec_len=50, beam_size=1)
    args = dict(lang="en", shorthand="en_combined") | sizes | kind | learn
    torch.manual_seed(4)
    Trainer(args, vocab=vocab, device="cpu").save(str(file))


def write_stanza_charlm(file: Path, forward: bool) -> None:
    "A language model of characters, from the first to the last or backward; random."
    import torch
    from stanza.models.common.char_model import CharacterLanguageModel
    from stanza.models.common.vocab import CharVocab

    sizes = dict(char_emb_dim=8, char_hidden_dim=16, char_num_layers=1)
    args = sizes | dict(char_dropout=0.0, char_rec_dropout=0.0, char_unit_dropout=0.0)
    torch.manual_seed(5 + forward)
    vocab = {"char": CharVocab([[*LETTERS, "\n"]])}
    CharacterLanguageModel(args, vocab, is_forward_lm=forward).save(str(file))


def write_stanza_tagger(file: Path, words: Path, forward: Path, backward: Path) -> None:
    "The radiology tagger, on word vectors (written to `words`) and two models of characters; random."
    import torch
    from stanza.models.common.pretrain import Pretrain, PretrainedWordVocab
    from stanza.models.common.vocab import CharVocab, CompositeVocab
    from stanza.models.ner.trainer import Trainer
    from stanza.models.ner.vocab import MultiVocab
    from stanza.models.pos.vocab import WordVocab

    torch.manual_seed(7)
    known = PretrainedWordVocab(WORDS, lower=True)
    torch.save({"vocab": known.state_dict(), "emb": torch.randn(len(known), 8)}, words)
    kinds = ["ANATOMY", "ANATOMY_MODIFIER", "OBSERVATION", "OBSERVATION_MODIFIER", "UNCERTAINTY"]
    tags = ["O", *(f"{place}-{kind}" for place, kind in product("BIES", kinds))]
    name = "en_radiology"
    vocab = {
        "char": CharVocab([[*LETTERS, "\n"]]),
        "delta": WordVocab([[(word,) for word in WORDS]], name, cutoff=0, lower=True),
        "tag": CompositeVocab([[((tag,),)] for tag in tags], name, idx=0, sep=None),
        "word": known,
    }
    char = dict(char=True, charlm=True, char_emb_dim=8, char_hidden_dim=16, char_lowercase=False)
    files = dict(charlm_forward_file=str(forward), charlm_backward_file=str(backward))
    sizes = dict(word_emb_dim=8, hidden_dim=16, num_layers=1, input_transform=True, rec_dropout=0.0)
    drop = dict(dropout=0.0, word_dropout=0.0, locked_dropout=0.0, char_dropout=0.0, char_rec_dropout=0.0)
    bert = dict(bert_model=None, bert_finetune=False, use_peft=False)
    learn = dict(optim="sgd", lr=0.1, momentum=0.0, batch_size=32, emb_finetune=True, lowercase=True)
    args = dict(shorthand=name, lang="en", scheme="bioes") | char | files | sizes | drop | bert | learn
    trainer = Trainer(args, vocab=MultiVocab(vocab), pretrain=Pretrain(str(words)), device="cpu")
    for part in trainer.model.parameters():
        part.data.mul_(4)  # else one kind of word is all that it finds
    trainer.save(str(file))


def make_temporal(folder: Path) -> None:
    "stanza's folder: models by kind, and `resources.json`, in which it finds what a package consists of."
    from stanza.resources import default_packages as known

    place = folder / "stanza_resources"
    english, package = known.default_treebanks["en"], "radiology"
    files = {
        "pretrain": known.ner_pretrains["en"][package],
        "forward_charlm": known.ner_charlms["en"][package],
        "backward_charlm": known.ner_charlms["en"][package],
        "tokenize": english,
        "mwt": english,
        "ner": package,
    }
    path = {kind: place / "en" / kind / f"{name}.pt" for kind, name in files.items()}
    for file in path.values():
        file.parent.mkdir(parents=True)
    write_stanza_tokenizer(path["tokenize"])
    write_stanza_splitter(path["mwt"])
    write_stanza_charlm(path["forward_charlm"], True)
    write_stanza_charlm(path["backward_charlm"], False)
    write_stanza_tagger(path["ner"], path["pretrain"], path["forward_charlm"], path["backward_charlm"])
    models = {k: {files[k]: {"md5": hashlib.md5(path[k].read_bytes()).hexdigest()}} for k in files}
    needs = [{"model": kind, "package": name} for kind, name in list(files.items())[:3]]
    models["ner"][package]["dependencies"] = needs
    models["packages"] = {"default": {"tokenize": english, "mwt": english}}
    (place / "resources.json").write_text(json.dumps({"en": {"lang_name": "English"} | models}))


# --- CRIMSON: a language model that answers with JSON

CRIMSON = "rajpurkarlab/medgemma-4b-it-crimson"  # as RadEval names it
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn> {{ m['role'] }} {{ m['content'] }} <end_of_turn> "
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn> model{% endif %}"
)


def answers() -> list[str]:
    "Answers as CRIMSON wants them, of several scores."
    texts = []
    for urgent, right, false in product((False, True), (0, 1, 2), (0, 1)):
        findings = [{"id": f"R{i}", "clinical_significance": "actionable_not_urgent"} for i in range(3)]
        findings[0]["clinical_significance"] = "urgent" if urgent else "not_actionable_not_urgent"
        predicted = [{"id": f"P{i}", "clinical_significance": "actionable_not_urgent"} for i in range(3)]
        matched = [{"ref_id": f"R{i}", "pred_id": f"P{i}"} for i in range(right)]
        slip = [{"ref_id": "R0", "severity": "significant", "error_types": ["location"]}]
        errors = dict(false_findings=["P2"][:false], missing_findings=["R2"], attribute_errors=slip)
        names = dict(reference_findings=findings, predicted_findings=predicted)
        texts.append(json.dumps(names | dict(matched_findings=matched, errors=errors)))
    return texts


def write_words(folder: Path, replies: list[str]):
    "A tokenizer that knows a few words, and each reply as one token; written to `folder` and returned."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    numbers = {token: i for i, token in enumerate([*special, "user", "system", "model", *WORDS, *replies])}
    splitter = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    splitter.normalizer = normalizers.Lowercase()
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    splitter.add_special_tokens(special)
    names = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, **names)
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_crimson(folder: Path, model: str = CRIMSON) -> None:
    """A Gemma 3 with random weights that says one of `answers` and then ends its turn. As Gemma's own does,
    its `generation_config.json` asks for samples."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

    place, replies = snapshot(folder / "hub", model), answers()
    tokenizer = write_words(place, replies)
    text = dict(vocab_size=len(tokenizer), head_dim=16, num_key_value_heads=1, query_pre_attn_scalar=1)
    text = text | SMALL | dict(layer_types=["full_attention"] * 2)
    vision = dict(SMALL, image_size=28, patch_size=14)
    torch.manual_seed(8)
    config = Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    network = Gemma3ForConditionalGeneration(config).eval()
    steer(network, tokenizer, replies)
    network.generation_config = GenerationConfig(
        do_sample=True, top_k=64, top_p=0.95, bos_token_id=2, pad_token_id=0, eos_token_id=[1, 5]
    )
    network.save_pretrained(place)


def steer(network, tokenizer, replies: list[str]) -> None:
    """Reserve two channels: a reply follows a token that is none, and the end of the turn follows a reply.
    Which reply depends on the reports: what all questions share is taken out of the last layer."""
    import torch
    from radeval.metrics.crimson.crimson import _SYSTEM_MSG
    from radeval.metrics.crimson.prompt_parts import build_prompt

    numbers = tokenizer.convert_tokens_to_ids(replies)
    text, last = network.model.language_model, network.lm_head.weight.data
    for layer in text.layers:
        for part in layer.parameters():
            if part.ndim == 2:
                part.data.normal_()
        layer.self_attn.o_proj.weight.data[:2] = 0
        layer.mlp.down_proj.weight.data[:2] = 0
    words = text.embed_tokens.weight.data.normal_(std=0.3)
    words[:, :2] = torch.tensor([0.3, 0.0])
    words[numbers, :2] = torch.tensor([0.0, 0.3])
    question = build_prompt("", "", None, False, False, False)  # as this model is asked, without guidelines
    turns = [{"role": "system", "content": _SYSTEM_MSG}, {"role": "user", "content": question}]
    form = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
    shared = tokenizer.apply_chat_template(turns, **form)
    with torch.no_grad():
        seen = text(shared["input_ids"]).last_hidden_state[0, -1]
    last.zero_()
    rows = 4 * torch.randn(len(replies), last.shape[1])
    last[numbers] = rows - (rows @ seen)[:, None] * seen / seen.square().sum()
    last[numbers, 0] += 20
    last[numbers, 1] = -200
    last[tokenizer.convert_tokens_to_ids("<end_of_turn>"), 1] = 20


MAKERS = dict(srrbert=make_srrbert, radcliq=make_radcliq, temporal=make_temporal, crimson=make_crimson)

if __name__ == "__main__":
    stay_home(Path(sys.argv[1]).resolve())
    for metric in sys.argv[2:] or MAKERS:
        MAKERS[metric](Path(sys.argv[1]))
