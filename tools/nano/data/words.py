"""Word lists that tasks draw from. `use(facts, rare)` fills the ones that come from WordNet."""

FIRST_NAMES = """Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Quinn Rosa Sam Tara
Uma Victor Wendy Xenia Yara Zoe Adam Bella Carl Diana Eric Fiona George Helen Ivan Julia Karl Laura Mark Nina Oscar
Petra Ralph Sara Tom Ursula Vera Walter Alice Boris Cora Dora Edgar Frank Greta Hugo Ida Jonas Kira Lena Max Nora Otto
Pia Robert Sofia Tim Maria Peter John Mary James Susan Linda Simon Daniel Lucy Martin Ruth Andrew Jane Philip Rachel""".split()
CITIES = """Oslo Paris London Rome Madrid Berlin Vienna Lima Cairo Tokyo Delhi Athens Dublin Prague Warsaw Lisbon Boston
Chicago Denver Toronto Sydney Moscow Seoul Geneva Hamburg Milan Naples Venice Bergen Munich Zurich Havana Nairobi Quito
Ottawa Seattle Dallas Houston Miami Austin""".split()
COLOURS = "red green blue yellow orange purple black white grey brown pink silver golden violet amber crimson".split()
JOBS = """baker teacher doctor farmer painter lawyer nurse pilot writer singer carpenter miner gardener sailor tailor
cook judge driver clerk chemist""".split()
ANIMALS = "cat dog horse parrot rabbit hamster goat pony tortoise canary".split()
FRUITS = "apples pears plums oranges lemons cherries nuts eggs coins stamps books pencils marbles shells stones".split()
LETTERS = "ABCDEFGHKLMNPRSTVWXYZ"
SYLLABLES = "ba be bo da de do fa fe ga go ka ke ko la le lo ma me mo na ne no pa po ra re ro sa se ta te to va vo za zo".split()

NOUNS, FACTS, RARE = [], [], []


def use(facts, rare):
    FACTS[:] = {f["word"]: f for f in reversed(facts)}.values()  # one meaning per word
    known = {f["word"] for f in facts}
    RARE[:] = [w for w in rare if w not in known]
    NOUNS[:] = sorted({f["word"] for f in facts if f["kind"] == "noun" and 3 <= len(f["word"]) <= 8})


def invented(rng):
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def digits(rng, n):
    return str(rng.randint(10 ** (n - 1), 10**n - 1))


def value(rng, kind=None):
    """A value that cannot be guessed."""
    kind = kind or rng.choice(("number", "number", "code", "word", "words", "time", "invented"))
    if kind == "number":
        return digits(rng, rng.choice((2, 3, 4, 4, 4, 5, 6)))
    if kind == "code":
        return rng.choice(LETTERS) + rng.choice(LETTERS) + "-" + digits(rng, rng.choice((2, 3, 4)))
    if kind == "word":
        return rng.choice(NOUNS)
    if kind == "words":
        return f"{rng.choice(COLOURS)} {rng.choice(NOUNS)}"
    if kind == "time":
        return f"{rng.randint(10, 23)}:{rng.randint(10, 59)}"
    return invented(rng)


def keys(rng, n):
    """n different names of one kind."""
    kind = rng.choice(("noun", "noun", "name", "city", "invented", "pair", "numbered"))
    out = set()
    while len(out) < n:
        if kind == "noun" or (n > 30 and kind in ("name", "city")):
            out.add(rng.choice(NOUNS))
        elif kind == "name":
            out.add(rng.choice(FIRST_NAMES))
        elif kind == "city":
            out.add(rng.choice(CITIES))
        elif kind == "invented":
            out.add(invented(rng))
        elif kind == "pair":
            out.add(f"{rng.choice(COLOURS)} {rng.choice(NOUNS)}")
        else:
            out.add(f"{rng.choice(('room', 'box', 'unit', 'gate', 'line'))} {rng.randint(2, 99)}")
    out = sorted(out)
    rng.shuffle(out)
    return out
