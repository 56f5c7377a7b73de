"""Finding a value by its name: bare lists, facts in a message, facts far apart in a long text.

All of these ask many questions per document. With one question in thousands of tokens the
signal is too thin for a small model to find the way from a name to its value.
"""

from . import words
from .chat import ANSWER, BOS, EOS, VALUE, Chat, Doc

ATTRIBUTES = {
    "code": "code", "password": "word", "room": "number", "number": "number", "key": "code", "locker": "number",
    "badge": "code", "price": "number", "time": "time", "secret word": "word", "label": "words", "nickname": "invented",
}  # fmt: skip

FACTS = [
    "The {a} for {n} is {v}.", "The {a} for {n} is {v}.", "The {a} of {n} is {v}.", "Here {v} is the {a} for {n}.",
    "Remember that the {a} for {n} is {v}.", "For {n} the {a} is {v}.", "Note that {n} has the {a} {v}.",
]  # fmt: skip
QUESTIONS = [
    "What is the {a} for {n}?", "What is the {a} for {n}?", "What is the {a} of {n}?", "Tell me the {a} for {n}.",
    "Which {a} does {n} have?", "I need the {a} for {n}.",
]  # fmt: skip
SHORT = [" Answer with the {a} only.", " Reply with the {a} only.", " Only the {a}, please."]
LISTS = ["{n} = {v}", "{n}: {v}", "{n} -> {v}", "{n} is {v}", "{n} {v}", '"{n}": "{v}"', "- {n}: {v}", "| {n} | {v} |"]


def pairs(rng, n):
    attribute = rng.choice(list(ATTRIBUTES))
    kind = ATTRIBUTES[attribute] if rng.random() < 0.8 else None
    names = words.keys(rng, n)
    values = []
    while len(values) < n:
        v = words.value(rng, kind)
        if v not in values and v not in names:
            values.append(v)
    return attribute, dict(zip(names, values))


def recall(rng, most=24):
    """No chat: a list of pairs, then the same pairs in other orders; the second mentions count."""
    doc = Doc()
    doc.marker(BOS, 0.0)
    n = rng.randint(2, most)
    _, table = pairs(rng, n)
    form = rng.choice(LISTS)
    end = rng.choice(("\n", "\n", "; ", ", ", ". "))
    again = form if rng.random() < 0.7 else rng.choice(LISTS)
    names = list(table)
    for name in names:
        doc.text(form.format(n=name, v=table[name]) + end, 0.02)
    if rng.random() < 0.3:
        doc.text("\n", 0.02)
    for _ in range(rng.randint(1, 3)):
        rng.shuffle(names)
        for name in names[: rng.randint(1, n)]:
            before, after = again.split("{v}")
            doc.text(before.format(n=name), 0.1)
            doc.items.append(("begin", "recall"))
            doc.text(table[name], VALUE)
            doc.items.append(("end", None))
            doc.text(after + end, 0.1)
    doc.marker(EOS, 0.5)
    return doc


def repeat(rng, sentences):
    """No chat: a run of tokens, then the same run again."""
    doc = Doc()
    doc.marker(BOS, 0.0)
    if rng.random() < 0.5:
        run = " ".join(rng.choice(words.NOUNS) for _ in range(rng.randint(4, 40)))
        doc.text(run + "\n", 0.02)
        for _ in range(rng.randint(1, 2)):
            doc.text(run[: run.index(" ")], 0.02)
            doc.text(run[run.index(" ") :] + "\n", ANSWER)
    else:
        run = sentences(rng, rng.randint(16, 100))
        doc.text(run, 0.02)
        doc.text(run.part(0, 2), 0.02)
        doc.text(run.part(2), ANSWER)
    doc.marker(EOS, 0.2)
    return doc


def ask(rng, chat, attribute, table, names, task, short=None):
    """One question per name, with answers."""
    short = rng.random() < 0.4 if short is None else short
    for i, name in enumerate(names):
        q = rng.choice(QUESTIONS).format(a=attribute, n=name)
        if short:
            q += rng.choice(SHORT).format(a=attribute)
        v = table[name]
        sentence = f"The {attribute} for {name} is \x02{v}\x03."
        think = sentence if v else f"I look for {name}. The text does not give its {attribute}."
        answer = (f"\x02{v}\x03" if short else sentence) if v else f"The text does not give the {attribute} for {name}."
        chat.user(q) if i else extend(chat, q)
        chat.assistant(answer, think=think, task=task, last=i == len(names) - 1)


def extend(chat, question):
    """The first question stands in the same message as the text.

    The full stop at the end of a filler belongs to one token with the line breaks after it.
    """
    kind, last, weight = chat.items[-1]
    stop = ""
    if not isinstance(last, str):
        stop = last.part(len(last.tokens) - 1).text()
        chat.items[-1] = (kind, last.part(0, len(last.tokens) - 1), weight)
    chat.text(stop + "\n\n" + question)
    chat.messages[-1]["content"] += "\n\n" + question


def lookup(rng, most=16, task="lookup"):
    """Facts in a message as sentences or a list; several questions."""
    n = rng.randint(2, most)
    attribute, table = pairs(rng, n)
    chat = Chat(system=some_system(rng), thinking=rng.random() < 0.35)
    if rng.random() < 0.5:
        one = rng.choice(FACTS) if rng.random() < 0.6 else None
        body = " ".join(cap((one or rng.choice(FACTS)).format(a=attribute, n=k, v=v)) for k, v in table.items())
    else:
        form = rng.choice(LISTS)
        body = f"Here is the {attribute} list.\n" + "\n".join(form.format(n=k, v=v) for k, v in table.items())
    chat.user(body)
    names = rng.sample(list(table), min(n, rng.randint(1, 8)))
    if rng.random() < 0.06:
        missing = words.keys(rng, 1)[0]
        if missing not in table:
            table[missing] = None
            names.append(missing)
            rng.shuffle(names)
    ask(rng, chat, attribute, table, names, task)
    return chat


def needle(rng, sentences, length, names, questions, thinking=None, short=None, task="needle"):
    """Facts about `names` different names spread over about `length` tokens of other text."""
    attribute, table = pairs(rng, names)
    chat = Chat(system=some_system(rng), thinking=rng.random() < 0.35 if thinking is None else thinking)
    gaps = sorted(rng.random() for _ in range(names))
    pieces, at = [], 0.0
    for place, (name, v) in zip(gaps, table.items()):
        if (place - at) * length > 10:
            pieces.append(sentences(rng, int((place - at) * length)))
            at = place
        pieces.append(" " + cap(rng.choice(FACTS[:4] if rng.random() < 0.8 else FACTS).format(a=attribute, n=name, v=v)))
    pieces.append(sentences(rng, max(10, int((1 - at) * length))))
    chat.user(rng.choice(("Read this text.\n\nText:", "Here is a text.\n\nText:", "Use this text to answer.\n\nText:")), *pieces)
    asked = [rng.choice(list(table)) for _ in range(questions)] if names == 1 else rng.sample(list(table), min(names, questions))
    ask(rng, chat, attribute, table, asked, task, short)
    return chat


def some_system(rng):
    return rng.choice(("", "", "", "You are a helpful assistant", "You are a helpful assistant.", "Be brief.", "Answer the question."))


def cap(s):
    return s[:1].upper() + s[1:]
