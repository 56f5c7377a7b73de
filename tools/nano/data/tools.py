"""Tool use: choose a tool among 1 to 4, call it with valid arguments, use its result."""

from . import exchanges, words
from .chat import Chat
from .lookup import some_system


def schema(name, description, required=None, /, **parameters):
    types = {str: "string", int: "integer", bool: "boolean", float: "number"}
    properties = {}
    for key, p in parameters.items():
        kind, text = p if isinstance(p, tuple) else (p, None)
        properties[key] = {"type": types[kind]} | ({"description": text} if text else {})
    required = list(parameters) if required is None else required
    return {"name": name, "description": description, "parameters": {"type": "object", "properties": properties, "required": required}}


def filename(rng):
    folder = rng.choice(("", "", "src/", "docs/", "tests/", rng.choice(words.NOUNS) + "/"))
    return folder + rng.choice(words.NOUNS) + rng.choice((".py", ".txt", ".md", ".rs", ".json", ".toml", ".c", ".log"))


# A service: (schema, function that returns request, arguments, result, answer, reason).


def weather(rng):
    city, days = rng.choice(words.CITIES), rng.randint(2, 9)
    t, sky = rng.randint(-9, 35), rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "clear"))
    many = rng.random() < 0.3
    tool = schema(rng.choice(("get_weather", "weather", "current_weather")), "Get the weather for a city", ["city"], city=str, days=int)
    ask = f"What will the weather be in {city} for {days} days?" if many else rng.choice(("What is the weather in {c}?", "How is the weather in {c}?", "Weather in {c}?", "Is it cold in {c}?")).format(c=city)
    args = {"city": city} | ({"days": days} if many else {})
    result = rng.choice(('{{"temperature": {t}, "sky": "{s}"}}', "{t} degrees, {s}", "temperature: {t}\nsky: {s}")).format(t=t, s=sky)
    return tool, ask, args, result, f"In {city} it is \x02{t}\x03 degrees and \x02{sky}\x03.", f"I need the weather in {city}."


def clock(rng):
    city, time = rng.choice(words.CITIES), words.value(rng, "time")
    tool = schema(rng.choice(("get_time", "current_time")), "Get the local time of a city", city=str)
    return tool, rng.choice((f"What time is it in {city}?", f"Tell me the time in {city}.")), {"city": city}, rng.choice((time, f'{{"time": "{time}"}}')), f"It is \x02{time}\x03 in {city}.", f"I need the time in {city}."


def calculator(rng):
    x, y, op = rng.randint(100, 9999), rng.randint(11, 9999), rng.choice("+-*/")
    e = f"{x} {op} {y}"
    r = str(round(eval(e), 2))  # a sum made two lines above
    tool = schema(rng.choice(("calculator", "calculate")), "Evaluate an arithmetic expression", expression=str)
    return tool, rng.choice((f"What is {e}?", f"Calculate {e}.", f"How much is {e}?")), {"expression": e}, r, f"{e} = \x02{r}\x03", f"I calculate {e}."


def email(rng):
    name = rng.choice(words.FIRST_NAMES)
    to, subject = f"{name.lower()}@example.com", f"{rng.choice(words.COLOURS)} {rng.choice(words.NOUNS)}"
    tool = schema("send_email", "Send an email", to=str, subject=str)
    return tool, rng.choice((f'Send an email to {to} with the subject "{subject}".', f'Write to {to} about "{subject}".')), {"to": to, "subject": subject}, rng.choice(("sent", "ok")), f"I sent the email to {to}.", f"I send the email to {to}."


def timer(rng):
    n = rng.randint(2, 90)
    tool = schema("set_timer", "Set a timer", minutes=int)
    return tool, rng.choice((f"Set a timer for {n} minutes.", f"Remind me in {n} minutes.", f"Start a timer of {n} minutes.")), {"minutes": n}, "ok", f"The timer is set for {n} minutes.", f"I set a timer for {n} minutes."


def currency(rng):
    n, r = rng.randint(2, 999), rng.randint(2, 9999)
    a, b = rng.sample(("USD", "EUR", "GBP", "JPY", "CHF"), 2)
    tool = schema("convert_currency", "Convert an amount between currencies", amount=int, source=str, target=str)
    return tool, rng.choice((f"How much is {n} {a} in {b}?", f"Convert {n} {a} to {b}.")), {"amount": n, "source": a, "target": b}, str(r), f"{n} {a} is \x02{r}\x03 {b}.", f"I convert {n} {a} to {b}."


def search_web(rng):
    topic = f"{rng.choice(words.COLOURS)} {rng.choice(words.NOUNS)}"
    found = f"{rng.choice(words.NOUNS)} {rng.choice(words.NOUNS)}"
    tool = schema(rng.choice(("search_web", "web_search")), "Search the web", query=str)
    return tool, rng.choice((f"Search the web for {topic}.", f"Look up {topic} on the web.")), {"query": topic}, f"1 result: {found}", f"I found: \x02{found}\x03.", f"I search for {topic}."


def light(rng):
    room, on = rng.choice(("kitchen", "garden", "hall", "office", "garage", "bedroom")), rng.random() < 0.5
    tool = schema("set_light", "Turn a light on or off", room=str, on=bool)
    word = "on" if on else "off"
    return tool, rng.choice((f"Turn {word} the light in the {room}.", f"Switch the {room} light {word}.")), {"room": room, "on": on}, "ok", f"The light in the {room} is {word}.", f"I turn the {room} light {word}."


def record(rng):
    """A look-up in some store, so that the answer can only come from the result."""
    names = rng.sample(words.NOUNS, rng.randint(2, 6))
    values = [words.value(rng, "number") for _ in names]
    i = rng.randrange(len(names))
    table = rng.choice(("stock", "price", "score", "room"))
    tool = schema(f"list_{table}", f"List the {table} of everything")
    result = "{" + ", ".join(f'"{n}": {v}' for n, v in zip(names, values)) + "}"
    return tool, f"What is the {table} of {names[i]}?", {}, result, f"The {table} of {names[i]} is \x02{values[i]}\x03.", f"I need the {table} list."


def made_up(rng):
    """A tool of random name and parameters: the schema is all there is to go by."""
    verb, thing = rng.choice(("make", "find", "open", "move", "check", "start", "stop", "add", "remove", "update", "count", "load")), rng.choice(words.NOUNS)
    keys = rng.sample(words.NOUNS, rng.randint(1, 3))
    kinds = {k: rng.choice((str, str, int, bool)) for k in keys}
    args = {k: words.value(rng, rng.choice(("word", "code", "words"))) if t is str else rng.randint(2, 999) if t is int else rng.random() < 0.5 for k, t in kinds.items()}
    tool = schema(f"{verb}_{thing}", f"{verb.capitalize()} the {thing}", **kinds)
    said = [f"{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in args.items()]
    ask = rng.choice(("{v} the {t} with {s}.", "Please {v} the {t} with {s}.", "{v} {t}: {s}")).format(v=verb, t=thing, s=" and ".join(said) if rng.random() < 0.6 else ", ".join(said))
    r = words.value(rng, "number")
    result, answer = rng.choice((("ok", f"Done: {verb} {thing}."), (f"id {r}", f"Done: {verb} {thing}, id \x02{r}\x03."), (f"error {r}", f"It failed with error \x02{r}\x03.")))
    return tool, ask[0].upper() + ask[1:], args, result, answer, f"I call {verb}_{thing}."


# Tools that coding agents declare, under several names.


def read_file(rng):
    path, key, v = filename(rng), rng.choice(words.NOUNS), words.value(rng)
    name, p = rng.choice((("read", "path"), ("read_file", "path"), ("Read", "file_path"), ("view", "path")))
    lines = [f"{rng.choice(words.NOUNS)} = {words.value(rng)}" for _ in range(rng.randint(0, 4))]
    lines.insert(rng.randint(0, len(lines)), f"{key} = {v}")
    if rng.random() < 0.4:
        lines = [f"{i + 1} {line}" for i, line in enumerate(lines)]
    return schema(name, "Read a file", **{p: str}), rng.choice((f"What is {key} in {path}?", f"Read {path} and tell me the value of {key}.", f"Which value does {key} have in {path}?")), {p: path}, "\n".join(lines), f"In {path}, {key} is \x02{v}\x03.", f"I read {path}."


def write_file(rng):
    path, text = filename(rng), f"{rng.choice(words.NOUNS)} {rng.choice(words.NOUNS)} {words.value(rng)}"
    name, p, c = rng.choice((("write", "path", "content"), ("write_file", "path", "content"), ("Write", "file_path", "content"), ("create_file", "path", "text")))
    ask = rng.choice((f'Write "{text}" to {path}.', f'Create {path} with the text "{text}".', f'Make a file {path} that contains "{text}".'))
    return schema(name, "Write a file", **{p: str, c: str}), ask, {p: path, c: text}, rng.choice(("ok", "written", f"wrote {len(text)} bytes")), f"I wrote {path}.", f"I write {path}."


def edit_file(rng):
    path, old, new = filename(rng), words.value(rng), words.value(rng)
    name, p, o, n = rng.choice((("edit", "path", "old", "new"), ("edit_file", "path", "old_text", "new_text"), ("Edit", "file_path", "old_string", "new_string"), ("str_replace", "path", "old_str", "new_str")))
    failed = rng.random() < 0.15
    answer = f'"{old}" is not in {path}.' if failed else f"I replaced {old} by {new} in {path}."
    ask = rng.choice((f'Replace "{old}" by "{new}" in {path}.', f'In {path}, change "{old}" to "{new}".'))
    return schema(name, "Replace text in a file", **{p: str, o: str, n: str}), ask, {p: path, o: old, n: new}, "error: text not found" if failed else "ok", answer, f"I edit {path}."


def shell(rng):
    name, p = rng.choice((("bash", "command"), ("shell", "command"), ("Bash", "command"), ("run_command", "command")))
    tool = schema(name, "Run a shell command", **{p: str})
    kind = rng.randrange(4)
    if kind == 0:
        ok, bad = rng.randint(2, 99), rng.randint(1, 9)
        command, ask = rng.choice((("cargo test", "Run the tests with cargo."), ("make test", "Run make test."), ("pytest", "Run pytest."), ("npm test", "Run the tests with npm.")))
        return tool, ask, {p: command}, f"{ok} passed, {bad} failed", f"\x02{ok}\x03 tests passed and \x02{bad}\x03 failed.", f"I run {command}."
    if kind == 1:
        path, n = filename(rng), rng.randint(2, 999)
        return tool, rng.choice((f"How many lines does {path} have?", f"Count the lines of {path}.")), {p: f"wc -l {path}"}, f"{n} {path}", f"{path} has \x02{n}\x03 lines.", f"I count the lines of {path}."
    if kind == 2:
        files = [filename(rng).split("/")[-1] for _ in range(rng.randint(1, 5))]
        folder = rng.choice(words.NOUNS)
        return tool, rng.choice((f"Which files are in {folder}?", f"List the files in {folder}.")), {p: f"ls {folder}"}, "\n".join(files), f"The files in {folder}: \x02{', '.join(files)}\x03.", f"I list {folder}."
    path = filename(rng)
    return tool, rng.choice((f"Delete {path}.", f"Remove the file {path}.")), {p: f"rm {path}"}, "ok", f"I deleted {path}.", f"I delete {path}."


def find_text(rng):
    what, path, line = rng.choice(words.NOUNS), filename(rng), rng.randint(2, 400)
    name, p = rng.choice((("search", "query"), ("grep", "pattern"), ("Grep", "pattern")))
    return schema(name, "Search text in files", **{p: str}), rng.choice((f'Where is "{what}" used?', f'Find "{what}" in the files.', f'Which file contains "{what}"?')), {p: what}, f"{path}:{line}: {what}", f'"{what}" is in \x02{path}\x03, line \x02{line}\x03.', f'I search for "{what}".'


SERVICES = [weather, clock, calculator, email, timer, currency, search_web, light, record, made_up, made_up, made_up]
CODING = [read_file, write_file, edit_file, shell, find_text]


def tools(rng, count=None, thinking=None, kind=None):
    """A chat with tools. `kind`: call, result, answer (no call needed) or both (a mix)."""
    count = count or rng.randint(1, 4)
    coding = rng.random() < 0.45
    pool = CODING if coding else SERVICES
    use, schemas, names = rng.choice(pool), [], set()
    first = use(rng)
    schemas.append(first[0])
    names.add(first[0]["name"])
    while len(schemas) < count:
        other = rng.choice(pool)(rng)
        if other[0]["name"] not in names and not clash(first[0], other[0]):
            names.add(other[0]["name"])
            schemas.append(other[0])
    rng.shuffle(schemas)
    thinking = rng.random() < 0.5 if thinking is None else thinking
    chat = Chat(system=some_system(rng), thinking=thinking, tools=schemas)
    if kind is None and rng.random() < 0.15:
        other = rng.choice(("knowledge", "talk", "lists", "passage"))
        q, think, a, _ = exchanges.KINDS[other](rng)
        chat.user(q)
        chat.assistant(a, think="I need no tool. " + think, task="tools-none")
        if rng.random() < 0.5:
            return chat
    turn(chat, first, only_call=kind == "call")
    if kind is None and rng.random() < 0.25:
        turn(chat, same_tool(rng, use, first) or first)
    return chat


def clash(a, b):
    """Two tools that would both fit a request."""
    return a["description"] == b["description"]


def same_tool(rng, use, first):
    for _ in range(8):
        again = use(rng)
        if again[0] == first[0]:
            return again
    return None


def turn(chat, case, only_call=False):
    tool, ask, args, result, answer, reason = case
    chat.user(ask)
    chat.assistant(think=reason, calls=[(tool["name"], {k: heavy(v) for k, v in args.items()})], task="tools-call")
    if only_call:
        return
    chat.results(result)
    chat.assistant(answer, think="I have the result.", task="tools-result")


def heavy(v):
    return f"\x02{v}\x03" if isinstance(v, str) else v
