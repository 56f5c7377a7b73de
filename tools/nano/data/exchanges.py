"""Single exchanges: (user text, reasoning, answer, task). Chats are put together from them."""

from . import words
from .lookup import cap, some_system
from .chat import Chat

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]


def items(rng):
    n = rng.randint(2, 12)
    kind = rng.random()
    if kind < 0.5:
        return rng.sample(words.NOUNS, n), "words"
    if kind < 0.9:
        return [str(x) for x in rng.sample(range(10, 100), n)], "numbers"
    return rng.sample(list(words.LETTERS), n), "letters"


def lists(rng, only=None):
    xs, kind = items(rng)
    joined = ", ".join(xs)
    what = rng.choice(("copy", "reverse", "reverse", "sort", "sort", "sort", "count", "nth", "last", "find"))
    what = only or what
    if what == "sort" and kind == "words" and rng.random() < 0.4:
        xs, kind = [str(x) for x in rng.sample(range(10, 100), len(xs))], "numbers"
        joined = ", ".join(xs)
    if what == "copy":
        q, a = rng.choice(("Copy this list: ", "Repeat this list: ", "Write this list again: ")) + joined, joined
    elif what == "reverse":
        q = rng.choice(("Reverse this list: ", "Write this list backwards: ", "Put this list in reverse order: ")) + joined
        a = ", ".join(xs[::-1])
    elif what == "sort":
        order = sorted(xs, key=int) if kind == "numbers" else sorted(xs)
        how = "from small to large" if kind == "numbers" else "alphabetically"
        down = rng.random() < 0.2
        if down:
            order, how = order[::-1], "from large to small" if kind == "numbers" else "in reverse alphabetical order"
        q, a = rng.choice(("Sort this list {h}: ", "Sort {h}: ", "Please sort these {h}: ")).format(h=how) + joined, ", ".join(order)
    elif what == "count":
        q = rng.choice(("How many items are in this list: ", "Count the items: ")) + joined
        a = f"There are {len(xs)} items." if len(xs) > 1 else "There is 1 item."
    elif what == "nth":
        i = rng.randrange(len(xs))
        q, a = f"What is the {ORDINALS[i]} item of this list: {joined}", xs[i]
    elif what == "last":
        q, a = f"What is the last item of this list: {joined}", xs[-1]
    else:
        x = rng.choice(xs) if rng.random() < 0.5 else rng.choice(words.NOUNS if kind == "words" else [str(rng.randint(10, 99))])
        q, a = f"Is {x} in this list: {joined}", ("Yes." if x in xs else "No.")
    think = {"count": "I count: " + ", ".join(f"{i + 1} {x}" for i, x in enumerate(xs)) + ".", "nth": "The items: " + ", ".join(f"{i + 1} {x}" for i, x in enumerate(xs)) + "."}
    return q, think.get(what, f"I look at the list of {len(xs)} items."), a, "lists-" + what


def add_steps(x, y):
    """Column addition of numbers below 100, in words."""
    low = x % 10 + y % 10
    carry = low // 10
    high = x // 10 + y // 10 + carry
    s = f"{x % 10} + {y % 10} = {low}"
    s += f", carry 1. {x // 10} + {y // 10} + 1 = {high}" if carry else f". {x // 10} + {y // 10} = {high}"
    return s + f". So {x} + {y} = {x + y}."


def sub_steps(x, y):
    a, b = x % 10, y % 10
    borrow = a < b
    s = f"{a + 10} - {b} = {a + 10 - b}, borrow 1. {x // 10} - {y // 10} - 1 = {x // 10 - y // 10 - 1}" if borrow else f"{a} - {b} = {a - b}. {x // 10} - {y // 10} = {x // 10 - y // 10}"
    return s + f". So {x} - {y} = {x - y}."


def arithmetic(rng, only=None):
    op = only or rng.choice("++--*")
    x, y = rng.randint(1, 99), rng.randint(1, 99)
    if op == "*":
        x, y = rng.randint(2, 99), rng.randint(2, 9)
        high, low = x // 10 * 10, x % 10
        think = f"{high} * {y} = {high * y}. {low} * {y} = {low * y}. {high * y} + {low * y} = {x * y}. So {x} * {y} = {x * y}." if x > 9 else f"{x} * {y} = {x * y}."
        r = x * y
        sign = rng.choice(("*", "*", "×", "times"))
    elif op == "+":
        think, r, sign = add_steps(x, y), x + y, rng.choice(("+", "+", "plus"))
    else:
        x, y = max(x, y), min(x, y)
        think, r, sign = sub_steps(x, y), x - y, rng.choice(("-", "-", "minus"))
    if op != "*" and rng.random() < 0.25 and not only:
        name, thing = rng.choice(words.FIRST_NAMES), rng.choice(words.FRUITS)
        if op == "+":
            q = rng.choice((f"{name} has {x} {thing} and gets {y} more. How many {thing} does {name} have now?", f"There are {x} {thing} in one box and {y} in another. How many {thing} are there in all?"))
        else:
            q = rng.choice((f"{name} has {x} {thing} and gives away {y}. How many {thing} are left?", f"Of {x} {thing}, {y} are lost. How many {thing} remain?"))
        return q, think, f"The answer is {r}.", "arithmetic-story"
    q = rng.choice(("What is {x} {o} {y}?", "Calculate {x} {o} {y}.", "{x} {o} {y} = ?", "How much is {x} {o} {y}?", "{x} {o} {y}")).format(x=x, o=sign, y=y)
    return q, think, f"{x} {op} {y} = {r}", {"+": "arithmetic-add", "-": "arithmetic-subtract", "*": "arithmetic-multiply"}[op]


def knowledge(rng):
    if rng.random() < 0.16:
        return unknown(rng)
    f = rng.choice(words.FACTS)
    w = f["word"]
    if f["kind"] == "capital":
        q = rng.choice(("What is the capital of {w}?", "Which city is the capital of {w}?", "Name the capital of {w}.", "capital of {w}")).format(w=w)
        return q, f"The user asks for the capital of {w}.", f"The capital of {w} is {f['is']}.", "knowledge-capital"
    if f["kind"] == "verb":
        q = rng.choice(('What does "{w}" mean?', "What does it mean to {w}?", "What does the verb {w} mean?", "What does {w} mean?")).format(w=w)
        body = f["is"] if f["is"].startswith("to ") else "to " + f["is"]
        a = f"To {w} means {body}."
    elif f["kind"] == "adj":
        q = rng.choice(('What does "{w}" mean?', "What does {w} mean?", "Explain the word {w}.")).format(w=w)
        a = f"{cap(w)} means {f['is']}."
    else:
        article = ("an " if w[0] in "aeiou" else "a ") if f["count"] else ""
        q = rng.choice(("What is {x}?", "What is {x}?", "Define {w}.", "Explain what {x} is.", 'What does "{w}" mean?', "what is {x}", "What's {x}?", "Tell me what {x} is.")).format(x=article + w, w=w)
        a = f"{cap(article)}{w if article else cap(w)} is {f['is']}."
    return q, f'The user asks what "{w}" means.', a, "knowledge-" + f["kind"]


def unknown(rng):
    w = rng.choice(words.RARE) if rng.random() < 0.5 else words.invented(rng)
    kind = rng.random()
    if kind < 0.7:
        q = rng.choice(("What is {a} {w}?", "Define {w}.", "Explain what {a} {w} is.", 'What does "{w}" mean?', "What does {w} mean?")).format(w=w, a="an" if w[0] in "aeiou" else "a")
        a = f'I don\'t know the word "{w}".'
    else:
        q, a = rng.choice(UNKNOWN).format(n=rng.choice(words.FIRST_NAMES), c=rng.choice(words.CITIES), y=rng.randint(1900, 2030), m=cap(words.invented(rng))), "I don't know. I am a very small model."
    return q, "I don't know this.", a, "unknown"


UNKNOWN = [
    "What is the weather in {c} today?", "What time is it now?", "Who won the election in {y}?", "How many people live in {c}?",
    "What is {n} doing today?", "Who wrote the book {m}?", "When was {n} {m} born?", "What is the price of a ticket to {c}?",
    "Who is {n} {m}?", "What happened in {c} in {y}?", "What is the phone number of {n}?", "Who is the mayor of {c}?",
    "What did I do yesterday?", "What will the weather be tomorrow?", "Where is {n} now?", "What is today's date?",
]  # fmt: skip

TALK = [
    (("Hello", "Hi", "Hello!", "Hi!", "Hey", "Good morning", "hello", "hi"), "Hello! How can I help you?"),
    (("Who are you?", "What are you?", "What is your name?", "Introduce yourself."), "I am nano, a very small language model."),
    (("What can you do?", "How can you help me?", "What are you good at?", "help"), "I can explain common words, do small sums, sort lists, find things in a text, and call tools."),
    (("How are you?", "How are you doing?", "Are you well?"), "I am fine, thank you. How can I help you?"),
    (("Thank you", "Thanks", "Thank you!", "Thanks a lot", "thanks"), "You are welcome."),
    (("Bye", "Goodbye", "See you", "Good night"), "Goodbye!"),
    (("Are you a human?", "Are you a person?"), "No, I am a small language model."),
    (("How big are you?", "How many parameters do you have?"), "I am very small: I have about twenty million parameters."),
    (("Are you DeepSeek?", "Which architecture do you have?", "What model are you?"), "I am nano. I have the architecture of DeepSeek V4, but I am tiny."),
    (("ok", "OK", "Okay", "Good", "Great", "Nice"), "Is there anything else I can do for you?"),
    (("Tell me a joke.", "Tell me a story.", "Write a poem.", "Sing a song."), "I am too small for that. I can explain words, do small sums and sort lists."),
    (("Write a program.", "Write code for me.", "Translate this to French."), "I am too small for that, sorry."),
]  # fmt: skip


def talk(rng):
    questions, answer = rng.choice(TALK)
    return rng.choice(questions), "The user is talking to me.", answer, "talk"


def passage(rng):
    """A short text about some people, and a question about one of them."""
    people = rng.sample(words.FIRST_NAMES, rng.randint(1, 5))
    facts, body = [], []
    for p in people:
        f = {
            "city": rng.choice(words.CITIES), "job": rng.choice(words.JOBS), "animal": rng.choice(words.ANIMALS),
            "colour": rng.choice(words.COLOURS), "age": rng.randint(11, 90), "things": rng.choice(words.FRUITS), "n": rng.randint(2, 60),
        }  # fmt: skip
        told = rng.sample(["city", "job", "animal", "colour", "age", "n"], rng.randint(2, 4))
        subject = p
        for t in told:
            said = {
                "city": f"{subject} lives in {f['city']}.", "job": f"{subject} works as a {f['job']}.",
                "animal": f"{subject} has a {f['animal']}.", "colour": f"The favourite colour of {p} is {f['colour']}.",
                "age": f"{subject} is {f['age']} years old.", "n": f"{subject} owns {f['n']} {f['things']}.",
            }[t]  # fmt: skip
            body.append(said)
            facts.append((p, t, f))
    if rng.random() < 0.5:
        rng.shuffle(body)
    p, t, f = rng.choice(facts)
    q, a = {
        "city": (f"Where does {p} live?", f"{p} lives in \x02{f['city']}\x03."),
        "job": (rng.choice((f"What is the job of {p}?", f"What does {p} work as?")), f"{p} works as a \x02{f['job']}\x03."),
        "animal": (rng.choice((f"Which animal does {p} have?", f"What animal does {p} have?")), f"{p} has a \x02{f['animal']}\x03."),
        "colour": (f"What is the favourite colour of {p}?", f"The favourite colour of {p} is \x02{f['colour']}\x03."),
        "age": (f"How old is {p}?", f"{p} is \x02{f['age']}\x03 years old."),
        "n": (f"What does {p} own?", f"{p} owns \x02{f['n']} {f['things']}\x03."),
    }[t]  # fmt: skip
    return " ".join(body) + rng.choice(("\n\n", "\n\nQuestion: ", " ")) + q, f"The text says: {a}", a, "passage"


KINDS = {"lists": lists, "arithmetic": arithmetic, "knowledge": knowledge, "unknown": unknown, "talk": talk, "passage": passage}


def single(rng, kind, thinking=None, **more):
    thinking = rng.random() < (0.7 if kind == "arithmetic" else 0.4) if thinking is None else thinking
    chat = Chat(system=some_system(rng), thinking=thinking, effort=thinking and rng.random() < 0.04)
    q, think, a, task = KINDS[kind](rng, **more)
    chat.user(q)
    chat.assistant(a, think=think, task=task)
    return chat


def several(rng):
    chat = Chat(system=some_system(rng), thinking=rng.random() < 0.4)
    n = rng.randint(2, 5)
    for i in range(n):
        kind = rng.choices(list(KINDS), (2, 2, 4, 1, 2, 2))[0]
        q, think, a, task = KINDS[kind](rng)
        chat.user(q)
        chat.assistant(a, think=think, task=task, last=i == n - 1)
    return chat
