"""Writes tests/data/tokenizers: small tokenizer.json files of every kind that is supported, trained on this repository's pages, and
for each a list of texts with the ids that Hugging Face's tokenizers gives.    usage: make_tokenizers.py FOLDER"""
import json
import pathlib
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CORPUS = [str(p) for p in sorted((ROOT / "docs/formats").glob("*.md"))]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = ["", " ", "Hello world", "  two  spaces\tand a tab\n\n\nlines\r\n", "It's we'll I'VE 12345 3.14", "naïve café \u0065\u0301 ﬁ Å", "日本語のテキスト 🙂👩‍👩‍👧", "<s>inside</s> x<s> y",
         "a" * 50, "tensor model_parallel layers.0.weight [2, 3] | `key`", "\u00a0\u2003odd\u3000spaces", "Zeile eins\nZeile zwei  ", "\U0001f9ea\x00\x7f", "(1+2)*3=9; x_y-z"]


def byte_letters():
    return pre_tokenizers.ByteLevel.alphabet()


def gpt2():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=byte_letters(), special_tokens=["<s>", "</s>"], show_progress=False))
    return t


def prefixed():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)])
    t.train(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=byte_letters(), special_tokens=["<s>"], show_progress=False))
    return t


def llama3():
    t = Tokenizer(models.BPE(ignore_merges=True))
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.train(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=byte_letters(), special_tokens=["<s>", "</s>"], show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", t.token_to_id("<s>")), ("</s>", t.token_to_id("</s>"))])
    return t


def llama2():
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    t.train(CORPUS, trainers.BpeTrainer(vocab_size=620, special_tokens=special, show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


def metaspace():
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>"], show_progress=False))
    t.add_special_tokens([AddedToken("</s>", lstrip=True, rstrip=True)])
    return t


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for make in (gpt2, prefixed, llama3, llama2, metaspace):
        t = make()
        t.save(str(folder / f"{make.__name__}.json"), pretty=False)
        (folder / f"{make.__name__}.expected.json").write_text(json.dumps([{"text": text, "ids": t.encode(text).ids} for text in TEXTS]))


if __name__ == "__main__":
    main()
