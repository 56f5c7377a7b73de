"""Extract plain text and facts from Debian packages.

    python corpus.py PACKAGES OUT      PACKAGES: a folder where the .deb files are unpacked

Writes OUT/corpus.json: {"text": {source: [sentences]}, "facts": [...], "rare": [...]}.
The packages are wordnet-base (WordNet licence), dict-gcide (GPL-2+), python3.11-doc (PSF),
and debian-policy with debian-faq (GPL-2+).
"""

import collections
import gzip
import html
import json
import re
import sys
from pathlib import Path

N_NOUNS, N_ADJECTIVES, N_VERBS = 3000, 400, 400


def main(packages, out):
    share = Path(packages) / "usr/share"
    synsets = wordnet(share / "wordnet")
    text = {
        "wordnet": wordnet_sentences(synsets),
        "gcide": gcide(share / "dictd/gcide.dict.dz"),
        "python": prose((share / "doc/python3.11/html/_sources").rglob("*.txt")),
        "debian": prose((share / "doc/debian-policy/policy.html/_sources").rglob("*.txt")) + debian_faq(share / "doc/debian/FAQ"),
    }
    facts, rare = choose_facts(synsets, text)
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / "corpus.json", "w", encoding="utf-8") as f:
        json.dump({"text": text, "facts": facts, "rare": rare}, f, ensure_ascii=False)
    for name, sentences in text.items():
        print(f"{name}: {len(sentences)} sentences, {sum(map(len, sentences)) / 1e6:.1f} MB")
    print(f"{len(facts)} facts, {len(rare)} rare words")


# ------------------------------------------------------------------- WordNet


def wordnet(folder):
    """[(part of speech, offset, lemmas, gloss)] of all synsets."""
    out = []
    for pos in ("noun", "verb", "adj", "adv"):
        for line in open(folder / f"data.{pos}", encoding="utf-8"):
            if line.startswith(" "):
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            words = [fields[4 + 2 * i].split("(")[0] for i in range(int(fields[3], 16))]
            out.append((pos, fields[0], words, gloss.strip()))
    return out


def first_senses(folder):
    """{(pos, lemma): offset of the first sense} is what the index files list first."""
    out = {}
    for pos in ("noun", "verb", "adj"):
        for line in open(folder / f"index.{pos}", encoding="utf-8"):
            if not line.startswith(" "):
                fields = line.split()
                out[pos, fields[0]] = fields[-int(fields[2])]
    return out


def definition(gloss):
    """The first clause of a gloss without examples and brackets."""
    g = re.split(r'; ?"|;|: ', gloss)[0]
    g = re.sub(r"\([^()]*\)", "", g)
    return re.sub(r"\s+", " ", g).strip(" ,.`'\"")


def wordnet_sentences(synsets):
    out = []
    for pos, _, words, gloss in synsets:
        word, d = words[0].replace("_", " "), definition(gloss)
        if len(d) > 15 and pos == "noun":
            out.append(f"{word[0].upper()}{word[1:]} is {d}.")
        elif len(d) > 15 and pos == "verb":
            out.append(f"To {word} is to {d}.")
        for example in re.findall(r'"([^"]{15,140})"', gloss):
            out.append(example[0].upper() + example[1:].rstrip(" .;,") + ".")
    return [s for s in out if s.isascii()]


def choose_facts(synsets, text):
    """The most used words with a short definition; and words nobody is expected to know."""
    used = collections.Counter()
    for name in ("wordnet", "gcide", "python"):
        for s in text[name]:
            used.update(set(re.findall(r"[a-z]+", s.lower())))
    glosses = {(p, o): g for p, o, _, g in synsets}
    facts, rare = [], []
    wanted = {"noun": N_NOUNS, "adj": N_ADJECTIVES, "verb": N_VERBS}
    index = first_senses(Path(sys.argv[1]) / "usr/share/wordnet")
    for pos, limit in wanted.items():
        words = sorted((w for p, w in index if p == pos and re.fullmatch("[a-z]{3,12}", w)), key=lambda w: -used[w])
        taken = 0
        for w in words:
            gloss = glosses.get((pos, index[pos, w])) or glosses.get(("adj", index[pos, w]), "")
            d = definition(gloss)
            good = 12 <= len(d) <= 90 and d.isascii() and w not in re.findall("[a-z]+", d.lower()) and not re.search(r"[<>#]", d)
            if pos == "noun":
                good = good and re.match(r"(a|an|the|any|some|something|one|someone|material|substance|[a-z]+ing|[a-z]+ [a-z]+)\b", d) and not gloss.startswith("(")
            if good and taken < limit and used[w] >= 3:
                facts.append({"kind": pos, "word": w, "is": d, "count": bool(re.match(r"(a|an|any|someone) ", d)) and not w.endswith("s")})
                taken += 1
            elif pos == "noun" and used[w] == 1 and len(rare) < 6000:
                rare.append(w)
    facts += capitals(synsets)
    return facts, rare


def capitals(synsets):
    out, seen = [], set()
    for pos, _, words, gloss in synsets:
        m = re.match(r"(?:the )?(?:[a-z ,]+and )?(?:the )?(?:national )?capital (?:and largest city |and largest city and [a-z ]+ )?of ([A-Z][A-Za-z ]+?)(?=$|;| on | and | in |,)", gloss)
        if pos == "noun" and m and words[0][0].isupper() and m[1] not in seen:
            city = words[0].replace("_", " ")
            if city.isascii() and len(m[1]) < 25:
                seen.add(m[1])
                out.append({"kind": "capital", "word": m[1].strip(), "is": city})
    return out


# ------------------------------------------------------------------ other text


def sentences(paragraph):
    p = re.sub(r"\s+", " ", paragraph).strip()
    return [s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", p) if 20 <= len(s) <= 300 and s[-1] in ".!?" and s[0].isupper() and s.isascii()]


def gcide(path):
    body = gzip.open(path, "rt", encoding="utf-8", errors="replace").read()
    body = re.sub(r"\[(1913|PJC|WordNet|Century|R\.|Obs)[^\]]*\]", "", body)
    out = []
    for entry in body.split("\n\n"):
        entry = re.sub(r"--[A-Z][\w .&()]*", "", re.sub(r"[{}]", "", entry))
        entry = re.sub(r"^\s*\d+\.\s*", "", entry)
        entry = re.sub(r"\([A-Z][a-z]{1,8}\.\)\s*", "", entry)
        if "\\" in entry or "[" in entry:
            continue
        out += sentences(entry)
    return out


def prose(paths):
    out = []
    for path in sorted(paths):
        for block in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            if re.search(r"^(\s*\.\. |\s*:|\s*[=*#~^-]{3,}|.*>>>)", block, re.M):
                continue
            block = re.sub(r":[a-z:]+:`~?!?([^`<]*?)(\s*<[^`]*)?`", r"\1", block)
            block = re.sub(r"``([^`]*)``", r"\1", block)
            out += sentences(re.sub(r"[*|]|`_?", "", block))
    return out


def debian_faq(folder):
    out = []
    for path in sorted(folder.glob("*.html")):
        for block in re.findall(r"<p>(.*?)</p>", path.read_text(encoding="utf-8", errors="replace"), re.S):
            out += sentences(html.unescape(re.sub(r"<[^>]+>", "", block)))
    return out


if __name__ == "__main__":
    main(*sys.argv[1:])
